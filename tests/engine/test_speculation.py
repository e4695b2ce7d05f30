"""Speculation changes how many steps an answer takes, and nothing else: on a fake executor that sees every mistake."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.engine.engine import Engine
from haomiao.engine.request import DoneEvent, EngineRequest
from haomiao.engine.speculate.costs import Allowance, StepCosts
from haomiao.engine.speculate.draft_model import DraftModelProposer
from haomiao.engine.speculate.forced import ForcedProposer
from haomiao.engine.speculate.own_plane import OwnPlaneProposer
from haomiao.engine.speculate.proposer import Proposer
from haomiao.engine.speculate.speculator import MOST_DRAFTED, Speculator
from haomiao.engine.speculate.suffix import SuffixProposer
from haomiao.errors import CancelledError, EngineError, InputError
from haomiao.types import StepBatch, StepResult
from tests.engine.fakes import (
    EOS,
    VOCAB,
    Clock,
    FakeExecutor,
    LetterMatcher,
    PatternConstraint,
    ask,
    done_of,
    letter,
    make_engine,
    prompt_of,
    text_of,
    tokens_of,
)

MS = 1_000_000
PROPOSERS = ["suffix", "self", "draft", "forced"]


class LikeMinded(FakeExecutor):
    """Its points, and other executors of its kind, mostly agree; the text falls into loops, as small models' does."""

    def __init__(self, *, agreement: float = 0.3, memory: int = 2, **options: Any) -> None:
        super().__init__(**options)
        self.agreement = agreement
        self.memory = memory

    def logits_of(self, history: np.ndarray) -> np.ndarray:
        recent = np.ascontiguousarray(history[-self.memory :, 0])
        own = super().logits_of(np.concatenate([np.zeros((1, 2), np.int64), history]))
        return (super().logits_of(np.stack([recent, 0 * recent], 1)) + self.agreement * own).astype(np.float32)

    def step(self, batch: StepBatch) -> StepResult:
        result = super().step(batch)
        return StepResult(result.logits, result.argmax, self.step_ns // (1 if batch.point == "int8" else 8))


class Generous(Allowance):
    """Never stops drafting."""

    @property
    def open(self) -> bool:
        return True


def speculating(
    kind: str,
    executor: LikeMinded | None = None,
    *,
    rate: float = 0.7,
    known: dict[int, list[int]] | None = None,
    generous: bool = True,
    draft_blocks: int = 24,
    **options: Any,
) -> Engine:
    executor = executor or LikeMinded()
    costs = StepCosts()
    proposers: dict[str, Any] = {
        "suffix": SuffixProposer,
        "self": lambda: OwnPlaneProposer(executor, "int4", costs),
        "draft": lambda: DraftModelProposer(
            LikeMinded(
                points=("int4",),
                kv_blocks=draft_blocks,
                max_step_tokens=40,
                memory=executor.memory,
                agreement=executor.agreement,
            ),
            "int4",
            512,
            costs,
        ),
        "forced": lambda: ForcedProposer(lambda sequence: (known or {}).get(sequence.job.id, []), rate),
    }
    proposer: Proposer = proposers[kind]()
    speculator = Speculator([proposer], costs=costs, clock=lambda: 0)
    if generous:
        speculator.allowance = Generous()
    engine = make_engine(executor, speculator=speculator, **options)
    engine.proposer = proposer  # type: ignore[attr-defined]
    return engine


def run(engine: Engine, requests: list[EngineRequest], gaps: list[int], clock: Clock) -> list[Any]:
    """Submit with gaps between, step to the end; integrity after every step."""
    events, ids = [], []

    def step() -> None:
        nonlocal events
        clock.now += 50 * MS
        events += engine.step()
        engine.check_integrity()

    for request, gap in zip(requests, gaps, strict=False):
        ids.append(engine.submit(request))
        for _ in range(gap):
            step()
    while engine.busy:
        step()
    assert engine.pool.available == engine.pool.blocks
    return [told(events, each, request.sampling.n) for each, request in zip(ids, requests, strict=True)]


def told(events: list[Any], request_id: int, samples: int) -> list[Any]:
    """Everything that a caller is told of a request: tokens, text, logprobs and the end of each sample."""
    out = []
    for sample in range(samples):
        done = done_of(events, request_id, sample)
        assert done.error is None
        logprobs = [
            (entry.token_id, entry.logprob, entry.top)
            for event in events
            if not isinstance(event, DoneEvent) and (event.request_id, event.sample) == (request_id, sample)
            for entry in event.logprobs or ()
        ]
        out.append((tokens_of(events, request_id, sample), text_of(events, request_id, sample), logprobs,
                    done.finish_detail, done.receipt.completion_tokens))  # fmt: skip
    return out


def made(
    length: int, seed: int, tokens: int, temperature: float, logprobs: int | None, extra: str, point: str | None
) -> EngineRequest:
    options: dict[str, Any] = {}
    match extra:
        case "penalties":
            options = {"repetition_penalty": 1.2, "presence_penalty": 0.3, "logit_bias": {5: 2.0}}
        case "stop":
            options = {"stop": (letter(8), letter(9) + letter(3)), "stop_token_ids": (17,)}
        case "samples":
            options = {"n": 3}
        case "filters":
            options = {"top_k": 9, "top_p": 0.9, "min_tokens": min(4, tokens)}
    request = ask(
        [*prompt_of(40, 1), *prompt_of(length, seed)], max_tokens=tokens, temperature=temperature, seed=seed,
        logprobs=logprobs, point=point, **options,
    )  # fmt: skip
    more: dict[str, Any] = {}
    if extra == "stop":
        more["stop"] = lambda: LetterMatcher(request.sampling.stop)
    if extra == "grammar":
        rng = np.random.default_rng(seed)
        choices = [sorted(rng.choice(VOCAB - 1, int(rng.integers(1, 4)), replace=False) + 1) for _ in range(tokens)]
        more["constraint"] = PatternConstraint([[int(each) for each in some] for some in choices])
    if extra == "prompt_logprobs":
        more["prompt_logprobs"] = 1
    fields = {name: getattr(request, name) for name in EngineRequest.__dataclass_fields__}
    return EngineRequest(**{**fields, **more})


REQUESTS = st.builds(
    made,
    length=st.integers(1, 70),
    seed=st.integers(0, 9),
    tokens=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.4, 1.0]),
    logprobs=st.sampled_from([None, None, 2]),
    extra=st.sampled_from(["", "", "penalties", "stop", "samples", "filters", "grammar", "prompt_logprobs"]),
    point=st.sampled_from([None, None, "int4"]),
)


@given(
    kind=st.sampled_from(PROPOSERS),
    requests=st.lists(REQUESTS, min_size=1, max_size=4),
    step_tokens=st.sampled_from([1, 7, 32, 200]),
    kv_blocks=st.sampled_from([10, 16, 64]),
    prefix_cache=st.booleans(),
    rate=st.sampled_from([0.0, 0.6, 1.0]),
    draft_blocks=st.sampled_from([3, 40]),
    gaps=st.lists(st.integers(0, 6), min_size=4, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_nothing_but_the_number_of_steps_depends_on_speculation(
    kind: str,
    requests: list[EngineRequest],
    step_tokens: int,
    kv_blocks: int,
    prefix_cache: bool,
    rate: float,
    draft_blocks: int,
    gaps: list[int],
) -> None:
    """Any proposer, any company, temperature, penalties, grammar, stop strings, samples, chunks and preemption."""
    options: dict[str, Any] = {"max_step_tokens": step_tokens, "kv_blocks": kv_blocks}
    clock = Clock()
    plain = make_engine(LikeMinded(**options), prefix_cache=prefix_cache, clock=clock)
    expected = run(plain, requests, gaps, clock)
    known = {index: answers[0][0] for index, answers in enumerate(expected, 1)}
    clock = Clock()
    engine = speculating(
        kind, LikeMinded(**options), rate=rate, known=known, draft_blocks=draft_blocks,
        prefix_cache=prefix_cache, clock=clock,
    )  # fmt: skip
    assert run(engine, requests, gaps, clock) == expected
    if kind == "draft":
        engine.proposer.check_integrity()  # type: ignore[attr-defined]
        assert not engine.proposer._reads  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", PROPOSERS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drafts_stand_and_save_steps(kind: str, temperature: float) -> None:
    request = ask(prompt_of(30), max_tokens=120, temperature=temperature, seed=3, ignore_eos=True)
    plain = make_engine(LikeMinded(memory=1, agreement=0.05))
    expected = tokens_of(plain.run_until(plain.submit(request)), 1)
    executor = LikeMinded(memory=1, agreement=0.05)
    engine = speculating(kind, executor, known={1: expected}, rate=1.0)
    events = engine.run_until(engine.submit(request))
    receipt = done_of(events, 1).receipt
    assert tokens_of(events, 1) == expected
    assert receipt.drafted_tokens >= receipt.accepted_tokens > (5 if kind == "suffix" and temperature else 50)
    served = [batch for batch in executor.batches if batch.point == "int8"]
    assert len(served) == 120 - receipt.accepted_tokens
    assert sum(entry.tokens for entry in receipt.schedule) == 30 + 119, "only what stood counts as computed"
    assert sum(entry.steps for entry in receipt.schedule) == len(served)


def test_blocks_are_published_only_when_their_tokens_stand() -> None:
    request = ask(prompt_of(20), max_tokens=60, ignore_eos=True)
    plain = make_engine(LikeMinded())
    answer = tokens_of(plain.run_until(plain.submit(request)), 1)
    engine = speculating("forced", known={1: answer}, rate=0.5)
    while engine.busy or not engine._roster.jobs:
        if not engine.busy:
            engine.submit(request)
        engine.step()
        full = {tuple([*prompt_of(20), *answer][: 32 * (i + 1)]) for i in range(3)}
        assert engine.pool.cached <= len(full)
        if not engine.busy:
            break
    again = engine.run_until(engine.submit(ask([*prompt_of(20), *answer, 7], max_tokens=5, ignore_eos=True)))
    fresh = make_engine(LikeMinded(), prefix_cache=False)
    expected = fresh.run_until(fresh.submit(ask([*prompt_of(20), *answer, 7], max_tokens=5, ignore_eos=True)))
    assert tokens_of(again, 2) == tokens_of(expected, 1)
    assert done_of(again, 2).receipt.cached_tokens == 64, "the answer's blocks are found"


@pytest.mark.parametrize("kind", PROPOSERS)
def test_sessions_keep_what_stood(kind: str) -> None:
    answers = []
    for engine in (make_engine(LikeMinded()), speculating(kind, known={1: [1] * 30})):
        session = engine.open_session()
        first = tokens_of(engine.run_until(engine.submit(ask(prompt_of(50), max_tokens=30, session=session))), 1)
        longer = ask([*prompt_of(50), *first, 5, 6], max_tokens=30, session=session)
        second = tokens_of(engine.run_until(engine.submit(longer)), 2)
        engine.check_integrity()
        engine.close_session(session)
        engine.check_integrity()
        answers.append((first, second))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", PROPOSERS)
def test_cancelling_and_failing_lose_nothing(kind: str) -> None:
    engine = speculating(kind, known={1: [1] * 99, 2: [2] * 99})
    first = engine.submit(ask(prompt_of(50), max_tokens=99, ignore_eos=True))
    second = engine.submit(ask(prompt_of(50, 2), max_tokens=99, ignore_eos=True))
    for _ in range(9):
        engine.step()
    engine.cancel(first)
    events = engine.step()
    assert isinstance(done_of(events, first).error, CancelledError)
    engine.check_integrity()

    def fail(batch: StepBatch) -> None:
        raise RuntimeError("the executor broke")

    engine.executor.before_step = fail  # type: ignore[attr-defined]
    events = engine.run_until(second)
    assert isinstance(done_of(events, second).error, EngineError)
    engine.check_integrity()
    assert engine.pool.available == engine.pool.blocks


def test_an_interrupt_while_drafting_changes_nothing() -> None:
    request = ask(prompt_of(50), max_tokens=40, ignore_eos=True)
    plain = make_engine(LikeMinded())
    expected = tokens_of(plain.run_until(plain.submit(request)), 1)
    engine = speculating("self")
    executor: Any = engine.executor
    engine.submit(request)
    events, interrupts = [], 0

    def interrupt(batch: StepBatch) -> None:
        if batch.point == "int4" and len(executor.batches) % 5 == 3:
            executor.batches.append(batch)
            raise KeyboardInterrupt

    executor.before_step = interrupt
    while engine.busy:
        try:
            events += engine.step()
        except KeyboardInterrupt:
            interrupts += 1
            engine.check_integrity()
    assert interrupts and tokens_of(events, 1) == expected


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
