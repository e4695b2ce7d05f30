"""Artifacts with tile masks in the engine: the bits of the same matrix with zeros, whatever stands beside a request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.engine.executors.native import NativeExecutor
from haomiao.engine.executors.reference import ReferenceExecutor
from haomiao.kernels import pack
from haomiao.kernels.isa import available
from haomiao.load.artifact import Artifact
from haomiao.models.plan import Plan
from haomiao.models.registry import plan_for
from haomiao.types import F32
from tests.compress.test_job import run
from tests.engine.tiny import KV, assert_same_bits, run_alone, run_in_company, tokens_of
from tests.golden.cases import CASES

CASE = CASES[0]
VOCAB = CASE.config["vocab_size"]
RECIPES: dict[str, dict[str, Any]] = {
    "nested": {"prune": ["tile:0.3"]},
    "int8": {"prune": ["tile:0.3"], "bits": 8},
    "int4": {"prune": ["tile:0.3"], "lo": False, "order": "static"},
}


@dataclass
class Opened:
    """A compressed model: its plan, its weights as they are stored, and the same with the zeros written out."""

    plan: Plan
    points: tuple[str, ...]
    tensors: dict[str, Any]
    vectors: dict[str, F32]

    def native(self, threads: int, *, dense: bool = False, **options: Any) -> NativeExecutor:
        tensors = {name: pack.whole(t) for name, t in self.tensors.items()} if dense else self.tensors
        settings: dict[str, Any] = {"kv_blocks": 64, "max_step_tokens": 256, "pin": False, **options}
        return NativeExecutor(self.plan, tensors, self.vectors, points=self.points, threads=threads, **settings)


@pytest.fixture(scope="module", params=RECIPES)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    folder: Path = tmp_path_factory.mktemp("tiles") / "out"
    artifact: Artifact = run(folder, CASE, RECIPES[request.param])
    layers = [tensor for name, tensor in artifact.tensors.items() if name.startswith("layers.")]
    assert layers and all(tensor.kept is not None and 0.5 < tensor.share < 0.9 for tensor in layers)
    points = tuple(artifact.meta["points"])
    yield Opened(plan_for(artifact.meta["config"]), points, dict(artifact.tensors), dict(artifact.vectors))


@pytest.mark.parametrize("kv", KV)
def test_the_same_bits_as_with_the_zeros_written_out(opened: Opened, kv: Any) -> None:
    tokens = tokens_of(60, 3, VOCAB)
    for point in opened.points:
        for isa in available():
            found = [
                run_alone(opened.native(threads, dense=dense, kv_type=kv, isa=isa), tokens, point)
                for threads, dense in ((1, True), (1, False), (2, False))
            ]
            assert_same_bits(found[0], found[1])
            assert_same_bits(found[0], found[2])


def test_agrees_with_the_reference(opened: Opened) -> None:
    tokens = tokens_of(60, 4, VOCAB)
    for point in opened.points:
        reference = ReferenceExecutor(
            opened.plan,
            opened.tensors,
            opened.vectors,
            points=(point,),
            kv_type="f32",
            kv_blocks=8,
            max_step_tokens=256,
        )
        expected = run_alone(reference, tokens, point)
        error = np.abs(run_alone(opened.native(2, kv_type="f32"), tokens, point) - expected)
        # rounding of activations to int8 turns a last-bit difference into a step now and then
        assert np.median(error) <= 0.01 * np.abs(expected).max()
        assert error.max() <= 0.2 * np.abs(expected).max()


@given(
    point=st.integers(0, 1),
    kv=st.sampled_from(KV),
    threads=st.integers(1, 2),
    length=st.integers(1, 100),
    cuts=st.lists(st.integers(1, 99), max_size=5),
    company=st.lists(st.integers(1, 70), max_size=4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_neither_company_nor_cuts_nor_threads_change_a_bit(
    opened: Opened, point: int, kv: Any, threads: int, length: int, cuts: list[int], company: list[int], seed: int
) -> None:
    name = opened.points[point % len(opened.points)]
    tokens = tokens_of(length, seed, VOCAB)
    alone = run_alone(opened.native(1, kv_type=kv), tokens, name)
    executor = opened.native(threads, kv_type=kv)
    assert_same_bits(run_alone(executor, tokens, name, tuple(cuts), first_block=9), alone)
    others = [tokens_of(n, seed + i + 1, VOCAB) for i, n in enumerate(company)]
    assert_same_bits(run_in_company(executor, tokens, name, cuts, others), alone)
