"""What is set aside of a budget for the way from the engine to the client."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haomiao.serve.delivery import FORGET_NS, MOST, SHARE, WINDOW, Delivery
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
    assert sum(way <= aside for way in latest) >= SHARE * (len(latest) - 1)
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
def test_a_server_learns_it_from_its_answers_and_receipts_name_the_whole_budget(live: Running, stream: bool) -> None:
    noted = len(live.service.delivery._latest)
    body = {"prompt": "Once upon a time", "max_tokens": 3, "budget_ms": 30_000}
    first = live.http.post("/v1/completions", json={**body, "stream": stream})
    assert first.status_code == 200 and len(live.service.delivery._latest) == min(WINDOW, noted + 1)
    receipt = live.http.post("/v1/completions", json=body).json()["haomiao"]["receipt"]
    assert receipt["budget_ms"] == 30_000 and receipt["outcome"] == "met"


def test_the_engine_is_told_and_a_refusal_is_not_noted(live: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    submit = live.service.submit
    monkeypatch.setattr(live.service, "submit", lambda asked: (seen.append(asked), submit(asked))[1])
    live.chat(budget_ms=30_000)
    noted = len(live.service.delivery._latest)
    refused = live.chat(budget_ms=0.02)
    assert refused.status_code in (422, 504) and len(live.service.delivery._latest) == noted
    asked = seen[0]
    assert asked.deadline_ns - asked.arrival_ns == 30_000 * MS
    assert 0 < asked.delivery_ns <= 30_000 * MS // MOST
