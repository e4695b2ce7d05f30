"""Same bits on real executors: whatever else is in the batch, however the prompt was cut, with or without reuse.

The reference executor sums floats through BLAS, whose order depends on the batch, and torch promises no order: of these
two, tokens are compared; of the native one, logprobs to the last bit, and at several thread counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from haomiao.engine.engine import Engine
from haomiao.engine.request import DoneEvent, EngineRequest
from haomiao.engine.speculate.costs import Allowance, StepCosts
from haomiao.engine.speculate.own_plane import OwnPlaneProposer
from haomiao.engine.speculate.speculator import Speculator
from haomiao.engine.speculate.suffix import SuffixProposer
from haomiao.load.artifact import Artifact
from haomiao.types import Executor
from tests.engine.fakes import ask, tokens_of
from tests.golden.cases import CASES
from tests.models.runs import make_artifact, make_executor

SCHEMES = {"full": "full", "int8": "nested", "int4": "nested"}
PICKED = [next(case for case in CASES if case.name.startswith(family)) for family in ("qwen2", "gemma2")]
VOCAB = min(int(case.config["vocab_size"]) for case in PICKED)


@pytest.fixture(scope="module", params=PICKED, ids=lambda case: str(case.name))
def artifacts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    directory = tmp_path_factory.mktemp("identity")
    return {scheme: make_artifact(request.param, directory, scheme) for scheme in ("full", "nested")}


@pytest.fixture(scope="module", params=["reference", "native", "torch"])
def runs(request: pytest.FixtureRequest, artifacts: dict[str, Artifact]) -> Iterator[Any]:
    """Makes an engine of the executor under test; executors are kept, since engines leave no trace in them."""
    kind: str = request.param
    made: dict[tuple[Any, ...], Executor] = {}

    def engine(
        point: str, step_tokens: int = 128, kv_blocks: int = 24, prefix_cache: bool = False, way: str = "off"
    ) -> Engine:
        key = (SCHEMES[point], step_tokens, kv_blocks)
        if key not in made:
            made[key] = make_executor(kind, artifacts[key[0]], max_step_tokens=step_tokens, kv_blocks=kv_blocks)
        costs = StepCosts()
        ways: dict[str, Any] = {"suffix": SuffixProposer, "self": lambda: OwnPlaneProposer(made[key], "int4", costs)}
        speculator = Speculator([ways[way]()] if way != "off" else [], costs=costs)
        speculator.allowance = Allowance(share=1.0, steps=1e9)
        return Engine(
            made[key], eos_ids=(0,), max_context=200,
            prefix_cache=prefix_cache, model_key="m", point=point, speculator=speculator,
        )  # fmt: skip

    engine.kind = kind  # type: ignore[attr-defined]
    yield engine
    for executor in made.values():
        executor.close()


def prompt(length: int, seed: int) -> list[int]:
    return [int(each) for each in np.random.default_rng(seed).integers(1, VOCAB, size=length)]


def answers(engine: Engine, requests: list[EngineRequest], gap: int = 0) -> list[tuple[list[int], list[float]]]:
    events, ids = [], []
    for request in requests:
        ids.append(engine.submit(request))
        for _ in range(gap):
            events += engine.step()
    events += engine.run_until()
    engine.check_integrity()
    for event in events:
        assert not isinstance(event, DoneEvent) or event.error is None, event
    return [
        (
            tokens_of(events, each),
            [
                entry.logprob
                for event in events
                if not isinstance(event, DoneEvent) and event.request_id == each
                for entry in event.logprobs or ()
            ],
        )
        for each in ids
    ]


@given(
    point=st.sampled_from(["int8", "int4", "full"]),
    lengths=st.lists(st.integers(1, 70), min_size=2, max_size=4),
    step_tokens=st.sampled_from([5, 33, 128]),
    kv_blocks=st.sampled_from([5, 24]),
    prefix_cache=st.booleans(),
    gap=st.integers(0, 3),
    temperature=st.sampled_from([0.0, 0.8]),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_company_cuts_and_reuse_change_nothing(
    runs: Any,
    point: str,
    lengths: list[int],
    step_tokens: int,
    kv_blocks: int,
    prefix_cache: bool,
    gap: int,
    temperature: float,
) -> None:
    requests = [
        ask([*prompt(40, 1), *prompt(length, length)], max_tokens=8, temperature=temperature, seed=index, logprobs=1)
        for index, length in enumerate(lengths)
    ]
    together = answers(runs(point, step_tokens, kv_blocks, prefix_cache), requests, gap)
    for request, found in zip(requests, together, strict=True):
        (alone,) = answers(runs(point), [request])
        if runs.kind == "native":
            assert found == alone
        elif temperature == 0:
            assert found[0] == alone[0]
            assert found[1] == pytest.approx(alone[1], abs=1e-4)


@pytest.mark.parametrize("way", ["suffix", "self"])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_speculation_changes_no_bit(runs: Any, way: str, temperature: float) -> None:
    """Tokens and logprobs to the last bit, in company, on real kernels: rows of one step are those of many."""
    if runs.kind != "native":
        pytest.skip("the reference's float sums depend on the batch")
    requests = [
        ask(prompt(12, 3) * 4, max_tokens=60, temperature=temperature, seed=index, logprobs=1, ignore_eos=True)
        for index in range(2)
    ]
    engine = runs("int8", step_tokens=64, way=way)
    found = answers(engine, requests, gap=3)
    for request, answer in zip(requests, found, strict=True):
        assert [answer] == answers(runs("int8", step_tokens=64), [request])


def test_sessions_and_forks(runs: Any) -> None:
    engine: Engine = runs("int8", prefix_cache=True)
    session = engine.open_session()
    text = prompt(50, 7)
    engine.run_until(engine.submit(EngineRequest(text[:33], work="prefill", session=session)))
    events = engine.run_until(engine.submit(ask(text, max_tokens=6, n=3, temperature=0.7, seed=1, session=session)))
    plain: Engine = runs("int8")
    expected = plain.run_until(plain.submit(ask(text, max_tokens=6, n=3, temperature=0.7, seed=1)))
    if runs.kind == "native":
        assert [tokens_of(events, 2, sample) for sample in range(3)] == [tokens_of(expected, 1, s) for s in range(3)]
    assert len(tokens_of(events, 2)) == len(tokens_of(expected, 1))
    engine.close_session(session)
    engine.check_integrity()


@pytest.mark.parametrize("point", ["int8", "int4", "full"])
def test_thread_counts(artifacts: dict[str, Artifact], point: str) -> None:
    pytest.importorskip("haomiao.engine.executors.native", reason="the native executor is not built")
    from haomiao.engine.executors.native import NativeExecutor
    from haomiao.models.registry import plan_for

    artifact = artifacts[SCHEMES[point]]
    found = []
    for threads in (1, 2, 3, 4):
        executor = NativeExecutor(
            plan_for(artifact.meta["config"], None), artifact.tensors, artifact.vectors,
            points=tuple(artifact.meta["points"]), kv_type=None, kv_blocks=24, max_step_tokens=64, threads=threads,
        )  # fmt: skip
        engine = Engine(executor, max_context=200, point=point)
        requests = [ask(prompt(45, seed), max_tokens=8, logprobs=1, temperature=0.5, seed=seed) for seed in (1, 2)]
        found.append(answers(engine, requests))
        executor.close()
    assert found[0] == found[1] == found[2] == found[3]
