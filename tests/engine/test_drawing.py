"""Rows that the executor draws by itself: when the engine asks for it, and that nobody notices a difference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.engine.draw import Drawing, Filters, draw, row_draws
from haomiao.engine.monitor import Monitor
from haomiao.engine.random import uniform
from haomiao.engine.sampler import Sampler
from haomiao.errors import EngineError
from haomiao.types import F32, RowDraws, SamplingParams, StepBatch, StepResult
from tests.engine.fakes import FakeExecutor, PatternConstraint, answer, ask, collected, done_of, make_engine, prompt_of
from tests.engine.speculating import LikeMinded, speculating


def drawn(logits: F32, draws: RowDraws, row: int) -> int:
    """What the rule gives."""
    scaled = (logits - logits.max()) / draws.temperature[row]
    filters = Filters(int(draws.top_k[row]), float(draws.top_p[row]), float(draws.min_p[row]))
    return draw(scaled, filters, float(draws.uniform[row]))


class DrawingExecutor(LikeMinded):
    """Draws by the rule, now and then leaves a row open, and shows nobody the logits of what it drew."""

    draws = True
    open_every = 5

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.drawn = self.left_open = 0

    def step(self, batch: StepBatch) -> StepResult:
        result = super().step(batch)
        if batch.draws is None:
            return result
        assert batch.draws.temperature.shape == batch.logit_rows.shape
        tokens = np.full(batch.logit_rows.size, -1, np.int32)
        for row in np.flatnonzero(batch.draws.temperature > 0):
            assert batch.greedy is None or not batch.greedy[row]
            self.drawn += 1
            if self.drawn % self.open_every == 0 or not np.isfinite(result.logits[row]).all():
                self.left_open += 1
                continue
            tokens[row] = drawn(result.logits[row], batch.draws, int(row))
            result.logits[row] = np.nan
        result.drawn = tokens
        return result


def sampler_of(vocab_size: int = 61, **params: Any) -> Sampler:
    return Sampler(SamplingParams(**params), vocab_size=vocab_size, seed=7, sample=2, end_ids=(0,))


def test_what_needs_nothing_but_the_draw_says_how() -> None:
    sampler = sampler_of(temperature=0.7, top_k=40, top_p=0.9, min_p=0.1)
    assert sampler.drawing(3, 50) == Drawing(0.7, 40, 0.9, 0.1, 7, 50, 2)
    assert sampler_of(temperature=1e-9, top_k=61).drawing(0, 1) == Drawing(1e-6, 0, 1.0, 0.0, 7, 1, 2)
    for more in (
        {"temperature": 0.0}, {"logprobs": 0}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5}, {"logit_bias": {3: 1.0}},
    ):  # fmt: skip
        assert sampler_of(**{"temperature": 1.0, **more}).drawing(9, 50) is None
    withheld = sampler_of(temperature=1.0, min_tokens=5)
    assert withheld.drawing(4, 50) is None and withheld.drawing(5, 51) is not None
    assert row_draws([None, None]) is None and row_draws([]) is None
    draws = row_draws([None, sampler.drawing(3, 50)])
    assert draws is not None and draws.temperature.tolist() == [0.0, np.float32(0.7)]
    assert draws.uniform[1] == uniform(7, 50, 2) and draws.top_p[1] == 0.9


REQUESTS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "n": 3},
    {"temperature": 1.5, "top_k": 5, "min_p": 0.05, "min_tokens": 6},
    {"temperature": 0.9, "repetition_penalty": 1.3},
    {"temperature": 1.0, "logprobs": 2},
    {"temperature": 0.0},
    {"temperature": 1.0, "prompt_logprobs": 1},
    {"temperature": 1.0, "constraint": PatternConstraint([[3, 4, 5]] * 6)},
)


@given(seed=st.integers(0, 2**53), which=st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=5))
@settings(max_examples=40)
def test_nothing_but_the_place_of_the_draw_changes(seed: int, which: list[dict[str, Any]]) -> None:
    found = []
    for executor in (LikeMinded(), DrawingExecutor()):
        engine = make_engine(executor)
        requests = [
            ask(prompt_of(5 + 9 * index, index), seed=seed + index, max_tokens=12, **fields)
            for index, fields in enumerate(which)
        ]
        ids = [engine.submit(request) for request in requests]
        events = engine.run_until()
        found.append([
            collected(events, each, sample)
            for each, request in zip(ids, requests, strict=True)
            for sample in range(request.sampling.n)
        ])  # fmt: skip
        engine.check_integrity()
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["suffix", "self", "draft"])
def test_drafts_are_judged_by_what_is_drawn(kind: str) -> None:
    request = ask(prompt_of(20), seed=3, temperature=0.6, max_tokens=60, top_p=0.95)
    engine = make_engine(LikeMinded())
    plain = answer(engine, engine.submit(request))
    executor = DrawingExecutor()
    engine = speculating(kind, executor)
    events = engine.run_until(each := engine.submit(request))
    assert collected(events, each) == plain
    assert done_of(events, each).receipt.accepted_tokens > 0
    assert executor.drawn >= len(plain[0])


def test_the_engine_asks_who_draws() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor)
    answer(engine, engine.submit(ask(prompt_of(9), temperature=1.0, seed=1, max_tokens=4)))
    assert all(batch.draws is None for batch in executor.batches)
    drawing = DrawingExecutor()
    engine = make_engine(drawing)
    ids = [
        engine.submit(ask(prompt_of(9), temperature=1.0, seed=1, max_tokens=4, ignore_eos=True)),
        engine.submit(ask(prompt_of(8), max_tokens=4, ignore_eos=True)),
    ]
    events = engine.run_until(*ids)
    assert [done_of(events, each).receipt.completion_tokens for each in ids] == [4, 4]
    last = drawing.batches[-1].draws
    assert last is not None and sorted(last.temperature > 0) == [False, True]
    assert drawing.drawn == 4 and drawing.left_open == 0


def test_what_is_not_finite_is_the_error_it_was() -> None:
    class Broken(DrawingExecutor):
        def logits_of(self, history: np.ndarray) -> np.ndarray:
            logits = super().logits_of(history)
            logits[7] = np.nan
            return logits

    executor = Broken()
    engine = make_engine(executor)
    done = done_of(engine.run_until(each := engine.submit(ask(prompt_of(9), temperature=1.0, seed=1))), each)
    assert isinstance(done.error, EngineError) and "not finite" in str(done.error)
    assert executor.drawn == executor.left_open == 1


def test_the_monitor_looks_at_what_was_drawn() -> None:
    """It runs the step again where the row is not here; figures and answer are the same."""
    found = []
    for executor in (LikeMinded(), DrawingExecutor()):
        monitor = Monitor(1.0)
        engine = make_engine(executor, monitor=monitor, point="int4")
        tokens, _ = answer(engine, engine.submit(ask(prompt_of(9), temperature=1.0, seed=1, max_tokens=9)))
        found.append((tokens, monitor.step_figures()["int4"]))
    assert found[0] == found[1] and found[0][1].samples == len(found[0][0])
