"""Mixes and traces: what files may say, and that a seed fixes everything that is offered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haomiao.errors import InputError
from haomiao.measure.mix import BUILT_IN, Mix, RequestClass, draw_trace, load_trace, open_mix, save_trace
from haomiao.measure.prompts import LETTERS


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("arrivals", ["poisson", "bursts", "uniform"])
def test_the_same_seed_gives_the_same_trace(name: str, arrivals: str) -> None:
    mix = open_mix(name)
    one, same, other = (
        draw_trace(mix, rate=20, count=50, seed=seed, arrivals=arrivals)  # type: ignore[arg-type]
        for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other
    assert [offer.due_ms for offer in one] == sorted(offer.due_ms for offer in one)


def test_another_rate_offers_the_same_requests() -> None:
    slow, fast = (draw_trace(BUILT_IN["mixed"], rate=rate, count=40, seed=3) for rate in (1, 100))
    assert [(o.kind, o.prompt) for o in slow] == [(o.kind, o.prompt) for o in fast]
    assert [o.due_ms for o in slow] == pytest.approx([100 * o.due_ms for o in fast])


@given(
    rate=st.floats(0.5, 200),
    seed=st.integers(0, 1000),
    arrivals=st.sampled_from(["poisson", "bursts", "uniform"]),
)
def test_the_rate_is_kept_on_average(rate: float, seed: int, arrivals: str) -> None:
    # as many as take a thousand seconds, so that bursts come often enough for a mean
    count = max(400, int(rate * 1000))
    mix = Mix("m", (RequestClass("a", 1, prompts=("x",)),))
    trace = draw_trace(mix, rate=rate, count=min(count, 4000), seed=seed, arrivals=arrivals)  # type: ignore[arg-type]
    if arrivals == "bursts" and trace[-1].due_ms < 200_000:
        return  # too few bursts to speak of a mean
    assert 1e3 * len(trace) / trace[-1].due_ms == pytest.approx(rate, rel=0.35)


def test_bursts_are_dense() -> None:
    mix = Mix("m", (RequestClass("a", 1, prompts=("x",)),))
    trace = draw_trace(mix, rate=50, count=5000, seed=0, arrivals="bursts")
    inside = sum((offer.due_ms + 10_000) % 20_000 < 2_000 for offer in trace)
    assert inside / len(trace) == pytest.approx(20 / 38, abs=0.05)  # ten times the rate in a tenth of the time


def test_shares_and_answers() -> None:
    trace = draw_trace(BUILT_IN["mixed"], rate=1, count=2000, seed=5)
    share = sum(offer.kind == "choice" for offer in trace) / len(trace)
    assert share == pytest.approx(0.60, abs=0.04)
    assert {offer.expect for offer in trace if offer.kind == "choice"} == set(LETTERS)
    beginnings = {offer.prompt[:300] for offer in trace if offer.kind == "choice"}
    assert len(beginnings) == 1  # so that a prefix cache has something to find


def test_a_trace_comes_back_from_its_file(tmp_path: Path) -> None:
    mix = BUILT_IN["mixed"]
    trace = draw_trace(mix, rate=5, count=10, seed=0)
    save_trace(tmp_path / "trace.jsonl", trace)
    assert load_trace(tmp_path / "trace.jsonl", mix) == trace
    with pytest.raises(InputError, match="lacks"):
        load_trace(tmp_path / "trace.jsonl", BUILT_IN["long"])


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text('{"prompt": "2+2=", "expect": "4"}\n{"prompt": "Hello"}\n')
    (tmp_path / "mix.yaml").write_text(
        "name: mine\n"
        "classes:\n"
        "  - {name: sums, share: 2, budget_ms: 200, options: ['4', '5'], prompts_file: questions.jsonl}\n"
        "  - {name: talk, share: 1, endpoint: chat, prompts: [Hi], body: {min_point: int8}}\n"
    )
    mix = open_mix(str(tmp_path / "mix.yaml"))
    assert mix.classes[0].options == ("4", "5")
    assert mix.classes[1].body == {"min_point": "int8"}
    (tmp_path / "mix.json").write_text(
        json.dumps(
            {
                "name": "mine",
                "classes": [
                    {
                        "name": "sums",
                        "share": 2,
                        "budget_ms": 200,
                        "options": ["4", "5"],
                        "prompts": [{"prompt": "2+2=", "expect": "4"}, {"prompt": "Hello"}],
                    },
                    {"name": "talk", "share": 1, "endpoint": "chat", "prompts": ["Hi"], "body": {"min_point": "int8"}},
                ],
            }
        )
    )
    assert open_mix(str(tmp_path / "mix.json")) == mix
    offers = draw_trace(mix, rate=1, count=60, seed=0)
    assert {(o.prompt, o.expect) for o in offers} == {("2+2=", "4"), ("Hello", None), ("Hi", None)}
    assert mix.scaled(3).classes[0].budget_ms == 600


CLASS = {"name": "a", "share": 1, "prompts": ["x"]}


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        ({"name": "m", "classes": []}, "at least one class"),
        ({"name": "m", "classes": [CLASS, CLASS]}, "same name"),
        ({"name": "m", "classes": [CLASS | {"budgetms": 3}]}, "budgetms"),
        ({"name": "m", "classes": [CLASS | {"budget_ms": 0}]}, "budget_ms"),
        ({"name": "m", "classes": [CLASS | {"share": -1}]}, "share"),
        ({"name": "m", "classes": [CLASS | {"max_tokens": 0}]}, "max_tokens"),
        ({"name": "m", "classes": [CLASS | {"text": "talk"}]}, "exactly one"),
        ({"name": "m", "classes": [{"name": "a", "share": 1}]}, "exactly one"),
        (
            {"name": "m", "classes": [{"name": "a", "share": 1, "prompts_file": "../../etc/passwd"}]},
            "leaves the folder",
        ),
        ({"name": "m", "classes": [{"name": "a", "share": 1, "prompts_file": "none.jsonl"}]}, "cannot read"),
        ([1], "Expected `object`"),
    ],
)
def test_what_a_mix_may_not_say(tmp_path: Path, mix: object, said: str) -> None:
    path = tmp_path / "mix.json"
    path.write_text(json.dumps(mix))
    with pytest.raises(InputError, match=said):
        open_mix(str(path))


@pytest.mark.parametrize("name", ["nothing", "none.yaml", "none.json", "/dev/null"])
def test_a_workload_that_is_not_there(name: str) -> None:
    with pytest.raises(InputError):
        open_mix(name)


@pytest.mark.parametrize("text", ["{", "[" * 200_000, "\x00"])
@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_file_that_is_not_what_it_is_called(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"mix{suffix}"
    path.write_text(text)
    with pytest.raises(InputError):
        open_mix(str(path))
