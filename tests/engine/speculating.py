"""Engines that speculate, requests for them, and everything that a caller is told."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from haomiao.engine.engine import Engine
from haomiao.engine.request import DoneEvent, EngineRequest
from haomiao.engine.speculate.costs import Allowance, StepCosts
from haomiao.engine.speculate.draft_model import DraftModelProposer
from haomiao.engine.speculate.forced import ForcedProposer
from haomiao.engine.speculate.own_plane import OwnPlaneProposer
from haomiao.engine.speculate.proposer import Proposer
from haomiao.engine.speculate.speculator import Speculator
from haomiao.engine.speculate.suffix import SuffixProposer
from haomiao.types import StepBatch, StepResult
from tests.engine.fakes import (
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
