"""When drafting stops, is left out or is not begun."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from haomiao.engine.speculate.speculator import MOST_DRAFTED, Speculator
from haomiao.engine.speculate.suffix import SuffixProposer
from haomiao.errors import InputError
from haomiao.types import StepBatch
from tests.engine.fakes import (
    EOS,
    Clock,
    ask,
    done_of,
    make_engine,
    prompt_of,
    tokens_of,
)
from tests.engine.speculating import MS, PROPOSERS, LikeMinded, speculating


def test_a_proposer_that_fails_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    request = ask(prompt_of(50), max_tokens=40, ignore_eos=True)
    engine = speculating("draft")
    engine.proposer._executor.before_step = lambda batch: 1 / 0  # type: ignore[attr-defined]
    events = engine.run_until(engine.submit(request))
    plain = make_engine(LikeMinded())
    assert tokens_of(events, 1) == tokens_of(plain.run_until(plain.submit(request)), 1)
    assert done_of(events, 1).receipt.drafted_tokens == 0
    assert len([record for record in caplog.records if "draft" in record.getMessage()]) == 1


def test_requests_choose_how_tokens_are_drafted() -> None:
    engine = speculating("suffix", LikeMinded(memory=1, agreement=0.05))
    quiet = engine.submit(ask([1, 2] * 20, max_tokens=40, ignore_eos=True, speculate="off"))
    loud = engine.submit(ask([1, 2] * 20, max_tokens=40, ignore_eos=True, speculate="suffix"))
    events = engine.run_until()
    assert tokens_of(events, quiet) == tokens_of(events, loud)
    assert done_of(events, quiet).receipt.drafted_tokens == 0 < done_of(events, loud).receipt.accepted_tokens
    with pytest.raises(InputError, match="speculate must be one of off, auto, suffix, not 'self'"):
        engine.submit(ask([1, 2], speculate="self"))
    with pytest.raises(InputError, match="speculate"):
        Speculator([SuffixProposer()], "nonsense")
    assert make_engine().submit(ask([1], speculate="off")) == 1


@pytest.mark.parametrize(("limit", "drafts"), [({}, True), ({"budget": 1.4}, False), ({"itl": 1.1}, False)])
def test_budgets_bound_how_long_drafting_may_take(limit: dict[str, float], drafts: bool) -> None:
    clock = Clock()
    engine = speculating("self", LikeMinded(agreement=0.05), clock=clock)
    executor: Any = engine.executor
    deadline = clock.now + int(limit["budget"] * MS) if "budget" in limit else None
    itl = int(limit["itl"] * MS) if "itl" in limit else None
    engine.submit(ask(prompt_of(5), max_tokens=60, ignore_eos=True, deadline_ns=deadline, itl_ns=itl))
    for _ in range(8):
        engine.step()
    assert any(batch.point == "int4" for batch in executor.batches) == drafts


def test_what_only_costs_is_given_up() -> None:
    """Drafts that never stand: the steps lost are bounded, however long the answer is."""
    request = ask(prompt_of(20), max_tokens=400, ignore_eos=True)
    for kind, cost in (("forced", 3.0), ("self", 1.0)):
        executor = LikeMinded(agreement=50.0, step_ns=MS)
        step = executor.step

        def timed(batch: StepBatch, step: Any = step, executor: Any = executor, cost: float = cost) -> Any:
            executor.step_ns = int(MS * (1 + cost * (batch.tokens - 1)))
            return step(batch)

        executor.step = timed  # type: ignore[method-assign]
        engine = speculating(kind, executor, known={1: [1] * 400}, rate=0.0, generous=False)
        engine._speculator._most = 4
        taken = 0
        engine.submit(request)
        while engine.busy:
            before = len(executor.batches)
            engine.step()
            taken += sum(int(MS * (1 + cost * (b.tokens - 1))) for b in executor.batches[before:] if b.tokens < 20)
        assert taken < (400 * 1.05 + 20) * MS


def test_many_streams_leave_nothing_to_draft_for() -> None:
    """Where a step's time grows with its tokens, drafts in company are worth less than alone."""
    executor = LikeMinded(memory=1, agreement=0.05, max_step_tokens=200, kv_blocks=400)
    step = executor.step

    def timed(batch: StepBatch) -> Any:
        executor.step_ns = int(MS * max(1.0, batch.tokens / 4))
        return step(batch)

    executor.step = timed  # type: ignore[method-assign]
    engine = speculating("suffix", executor, generous=False)
    for seed in range(24):
        engine.submit(ask(prompt_of(8, seed), max_tokens=200, ignore_eos=True))
    events = engine.run_until()
    crowd = [done_of(events, each).receipt for each in range(1, 25)]
    alone = engine.submit(ask(prompt_of(8, 30), max_tokens=200, ignore_eos=True))
    single = done_of(engine.run_until(alone), alone).receipt
    assert sum(receipt.drafted_tokens for receipt in crowd) / 24 < single.drafted_tokens / 4
    assert single.accepted_tokens > 50


def test_an_answer_never_grows_beyond_what_it_may() -> None:
    for kind in PROPOSERS:
        for tokens in range(1, MOST_DRAFTED + 4):
            engine = speculating(kind, known={1: [1] * 50}, max_context=20 + tokens)
            events = engine.run_until(engine.submit(ask(prompt_of(20), max_tokens=tokens, ignore_eos=True)))
            assert len(tokens_of(events, 1)) == tokens
            assert all(
                int(batch.past[i] + np.diff(batch.span_starts)[i]) < 20 + tokens
                for batch in engine.executor.batches  # type: ignore[attr-defined]
                for i in range(len(batch.past))
            )


def test_an_end_is_not_drafted() -> None:
    engine = speculating("self", LikeMinded(eos_bias=6.0))
    events = engine.run_until(engine.submit(ask(prompt_of(20), max_tokens=50, min_tokens=10)))
    assert tokens_of(events, 1)[-1] == EOS
    assert done_of(events, 1).finish_detail == "eos"
