"""What is set aside of a budget for the way from the engine to the client."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haomiao.serve.client import Answer
from haomiao.serve.delivery import FORGET_NS, MOST, SHARE, WINDOW, Delivery
from haomiao.serve.messages import Submit
from tests.serve.conftest import Running

MS = 1_000_000


@given(st.lists(st.integers(0, 50 * MS), min_size=1, max_size=3 * WINDOW), st.integers(0, 1000 * MS))
def test_most_ways_fit_into_what_is_set_aside_and_it_is_never_more_than_a_part(ways: list[int], budget: int) -> None:
    delivery = Delivery()
    assert delivery.set_aside(0, budget) == 0, "nothing is known yet"
    for now, way in enumerate(ways):
        delivery.note(now, way)
    latest = ways[-WINDOW:]
    aside = delivery.set_aside(len(ways), 1000 * MS)
    assert sum(way <= aside for way in latest) >= SHARE * len(latest)
    assert delivery.set_aside(len(ways), budget) == min(aside, budget // MOST)


def test_a_bad_minute_is_forgotten() -> None:
    delivery = Delivery()
    for _ in range(20):
        delivery.note(0, 30 * MS)
    delivery.note(FORGET_NS // 2, 2 * MS)
    assert delivery.set_aside(FORGET_NS, 1000 * MS) == 30 * MS
    assert delivery.set_aside(FORGET_NS + 1, 1000 * MS) == 2 * MS
    assert delivery.set_aside(2 * FORGET_NS, 1000 * MS) == 0
    delivery.note(2 * FORGET_NS, -5)
    assert delivery.set_aside(2 * FORGET_NS, 1000 * MS) == 0, "clocks that are read in two processes may cross"


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_learns_it_from_its_answers_and_receipts_name_the_whole_budget(
    live: Running, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    noted: list[int] = []
    delivery = Delivery()
    monkeypatch.setattr(delivery, "note", lambda now, way_ns: noted.append(way_ns))
    monkeypatch.setattr(live.service, "delivery", delivery)
    body = {"prompt": "Once upon a time", "max_tokens": 3, "budget_ms": 30_000}
    assert live.http.post("/v1/completions", json={**body, "stream": stream}).status_code == 200
    receipt = live.http.post("/v1/completions", json=body).json()["haomiao"]["receipt"]
    until = time.monotonic() + 10
    while len(noted) < 2 and time.monotonic() < until:
        time.sleep(0.01)  # the client has its last byte before the server notes it
    assert len(noted) == 2 and all(0 < way < 10_000 * MS for way in noted)
    assert receipt["budget_ms"] == 30_000 and receipt["outcome"] == "met"


def test_the_engine_is_told_and_a_tight_budget_loses_a_part_only(
    live: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Submit] = []
    submit = live.service.submit

    def watched(asked: Submit) -> Answer:
        seen.append(asked)
        return submit(asked)

    monkeypatch.setattr(live.service, "submit", watched)
    delivery = Delivery()
    delivery.note(time.monotonic_ns(), 700 * MS)
    monkeypatch.setattr(live.service, "delivery", delivery)
    assert [live.chat(budget_ms=ms).status_code for ms in (4000, 30_000)] == [200, 200]
    assert [(asked.deadline_ns or 0) - asked.arrival_ns for asked in seen] == [4000 * MS, 30_000 * MS]
    assert [asked.delivery_ns for asked in seen] == [500 * MS, 700 * MS]
