"""The reference executor: independent of company and cuts, real paged state, the exact int rule, bad batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.engine.executors.reference import ReferenceExecutor, activate, as_stored
from haomiao.errors import InputError, ModelError, UnsupportedModelError
from haomiao.kernels import reference
from haomiao.load.artifact import Artifact
from haomiao.models import plan as ops
from haomiao.models.registry import plan_for
from haomiao.types import F32, KV_BLOCK_TOKENS, Executor, StepBatch
from tests.golden.cases import CASES
from tests.golden.checkpoint import tokens_of
from tests.models.runs import Sequence1, make_artifact, make_executor, relative_error

CASE = next(case for case in CASES if case.name == "gemma3-v4")  # windows, norms on heads, two rotations
TOKENS = tokens_of(CASE)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Artifact]]:
    directory = tmp_path_factory.mktemp("reference")
    yield {scheme: make_artifact(CASE, directory, scheme) for scheme in ("full", "bf16", "nested")}


def executor_at(artifacts: dict[str, Artifact], point: str, **options: Any) -> Executor:
    scheme = {"int8": "nested", "int4": "nested"}.get(point, point)
    return make_executor("reference", artifacts[scheme], **options)


def kl(ours: F32, theirs: F32) -> float:
    """Mean KL divergence of `ours` from `theirs`, nats a token."""

    def log_softmax(x: F32) -> Any:
        wide = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
        return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))

    p, q = log_softmax(theirs), log_softmax(ours)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


@pytest.mark.parametrize("point", ["full", "bf16", "int8", "int4"])
@settings(max_examples=6, deadline=None)
@given(cuts=st.sets(st.integers(1, 39), max_size=6), blocks=st.permutations(range(8)))
def test_cuts_and_blocks_change_nothing(
    point: str, cuts: set[int], blocks: Sequence[int], artifacts: dict[str, Artifact]
) -> None:
    whole = Sequence1(executor_at(artifacts, point), point).feed(TOKENS[:40])
    cut = Sequence1(executor_at(artifacts, point), point, blocks).feed(TOKENS[:40], sorted(cuts))
    np.testing.assert_array_equal(cut, whole)


@pytest.mark.parametrize("point", ["full", "int8"])
def test_company_changes_nothing(point: str, artifacts: dict[str, Artifact]) -> None:
    alone = Sequence1(executor_at(artifacts, point), point).feed(TOKENS[:40])
    executor = executor_at(artifacts, point)
    first = Sequence1(executor, point, [5, 1])
    first.feed(TOKENS[:33])
    batch = StepBatch(  # a decoding sequence beside two that begin
        token_ids=np.array([*TOKENS[:20], *TOKENS[33:40], *TOKENS[:3]], np.int32),
        span_starts=np.array([0, 20, 27, 30], np.int32),
        past=np.array([0, 33, 0], np.int32),
        block_tables=np.array([[2, -1], [5, 1], [7, -1]], np.int32),
        logit_rows=np.arange(30, dtype=np.int32),
        point=point,
    )
    together = executor.step(batch).logits
    np.testing.assert_array_equal(together[:20], alone[:20])
    np.testing.assert_array_equal(together[20:27], alone[33:40])
    np.testing.assert_array_equal(together[27:], alone[:3])


def test_sequences_may_branch_off_within_a_step(artifacts: dict[str, Artifact]) -> None:
    executor = executor_at(artifacts, "int8")
    Sequence1(executor, "int8", [5, 1]).feed(TOKENS[:35])
    executor.copy_blocks(np.array([[1, 2]], np.int32))
    batch = StepBatch(  # five more of a sequence, and what goes on from there in a copy of its last block
        token_ids=np.array([*TOKENS[35:40], *TOKENS[40:43]], np.int32),
        span_starts=np.array([0, 5, 8], np.int32),
        past=np.array([35, 40], np.int32),
        block_tables=np.array([[5, 1], [5, 2]], np.int32),
        logit_rows=np.arange(8, dtype=np.int32),
        point="int8",
        copies=np.array([[token, 2] for token in range(5)], np.int32),
    )
    whole = Sequence1(executor_at(artifacts, "int8"), "int8").feed(TOKENS[:43])
    np.testing.assert_array_equal(executor.step(batch).logits, whole[35:])
    for copies in ([[8, 2]], [[0, 24]], [[1, 2], [0, 2]], [[0, 1, 2]]):
        batch.copies = np.array(copies, np.int32)
        with pytest.raises(InputError, match="copies"):
            executor.step(batch)


def test_points_order_by_error_and_share_their_state(artifacts: dict[str, Artifact]) -> None:
    full = Sequence1(executor_at(artifacts, "full"), "full").feed(TOKENS)
    errors = {p: kl(Sequence1(executor_at(artifacts, p), p).feed(TOKENS), full) for p in ("bf16", "int8", "int4")}
    assert errors["bf16"] < 1e-3 and errors["int8"] < 5e-3 and errors["int8"] < errors["int4"] < 1.0
    executor = executor_at(artifacts, "int8")
    sequence = Sequence1(executor, "int8")
    sequence.feed(TOKENS[:30])
    sequence.point = "int4"  # the state that int8 wrote goes on at int4
    assert np.isfinite(sequence.feed(TOKENS[30:40])).all()


@pytest.mark.parametrize(("kv_type", "bound"), [("f32", 1e-6), ("bf16", 0.05), ("int8", 0.1)])
def test_kv_types(kv_type: Any, bound: float, artifacts: dict[str, Artifact]) -> None:
    exact = Sequence1(executor_at(artifacts, "full", kv_type="f32"), "full").feed(TOKENS)
    stored = Sequence1(executor_at(artifacts, "full", kv_type=kv_type), "full").feed(TOKENS)
    assert relative_error(stored, exact) <= bound


def test_copied_blocks_are_real(artifacts: dict[str, Artifact]) -> None:
    executor = executor_at(artifacts, "int8")
    sequence = Sequence1(executor, "int8", [3, 4, 5])
    sequence.feed(TOKENS[:40])
    executor.copy_blocks(np.array([[3, 10], [4, 11]], np.int32))
    fork = Sequence1(executor, "int8", [10, 11, 12])
    fork.past = 40
    other = fork.feed(TOKENS[:4])  # writes into the copy only
    again = Sequence1(executor_at(artifacts, "int8"), "int8")
    again.feed(TOKENS[:40])
    np.testing.assert_array_equal(sequence.feed(TOKENS[40:44]), again.feed(TOKENS[40:44]))
    assert not np.array_equal(other, again.feed(TOKENS[:4]))
    for pairs in ([[0, 24]], [[-1, 0]], [[0, 1, 2]]):
        with pytest.raises(InputError):
            executor.copy_blocks(np.array(pairs, np.int32))


def test_int_layers_follow_the_exact_rule(artifacts: dict[str, Artifact]) -> None:
    executor = executor_at(artifacts, "int8")
    assert isinstance(executor, ReferenceExecutor)
    packed = artifacts["nested"].tensors["layers.0.qkv"]
    x = np.random.default_rng(0).normal(size=(5, packed.cols)).astype(np.float32)
    for planes in ("hi", "hi+lo"):
        ours = executor.linear("layers.0.qkv", x, planes, None)
        np.testing.assert_array_equal(ours, reference.linear(packed, x, planes))


def test_only_the_rows_asked_for(artifacts: dict[str, Artifact]) -> None:
    whole = Sequence1(executor_at(artifacts, "full"), "full").feed(TOKENS[:10])
    executor = executor_at(artifacts, "full")
    good = batch_of()
    good.logit_rows = np.array([2, 9], np.int32)
    result = executor.step(good)
    np.testing.assert_array_equal(result.logits, whole[[2, 9]])
    np.testing.assert_array_equal(result.argmax, whole[[2, 9]].argmax(axis=1))
    good.logit_rows = np.zeros(0, np.int32)
    assert executor.step(good).logits.shape == (0, executor.vocab_size)


def batch_of(**changes: Any) -> StepBatch:
    batch = StepBatch(
        token_ids=np.array(TOKENS[:10], np.int32),
        span_starts=np.array([0, 10], np.int32),
        past=np.array([0], np.int32),
        block_tables=np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8]], np.int32),
        logit_rows=np.array([9], np.int32),
        point="full",
    )
    for name, value in changes.items():
        setattr(batch, name, value if isinstance(value, str) else np.array(value, np.int32))
    return batch


@pytest.mark.parametrize(
    "changes",
    [
        {"point": "int8"},
        {"point": "warp"},
        {"token_ids": [97, *TOKENS[1:10]]},
        {"token_ids": [-1, *TOKENS[1:10]]},
        {"token_ids": []},
        {"token_ids": [1] * 200, "span_starts": [0, 200]},
        {"span_starts": [0, 9]},
        {"span_starts": [1, 10]},
        {"span_starts": [0, 10, 10]},
        {"span_starts": [0]},
        {"span_starts": [0, 5, 10]},
        {"past": [-1]},
        {"past": [0, 0]},
        {"past": [250]},
        {"past": [10**9]},
        {"block_tables": [[-1]]},
        {"block_tables": [[24]]},
        {"block_tables": [[]]},
        {"past": [30], "block_tables": [[0]]},
        {"logit_rows": [10]},
        {"logit_rows": [-1]},
        {"logit_rows": [3, 3]},
    ],
    ids=str,
)
def test_batches_that_contradict_themselves(changes: dict[str, Any], artifacts: dict[str, Artifact]) -> None:
    executor = executor_at(artifacts, "full")
    with pytest.raises(InputError):
        executor.step(batch_of(**changes))
    executor.step(batch_of())


def test_weights_and_plans_that_do_not_fit(artifacts: dict[str, Artifact]) -> None:
    artifact = artifacts["full"]
    plan = plan_for(artifact.meta["config"])
    without = {name: t for name, t in artifact.tensors.items() if name != "layers.0.out"}
    with pytest.raises(ModelError, match=r"layers\.0\.out"):
        ReferenceExecutor(plan, without, artifact.vectors, points=("full",))
    wrong = {**artifact.tensors, "layers.0.out": artifact.tensors["embed"]}
    with pytest.raises(ModelError, match=r"layers\.0\.out"):
        ReferenceExecutor(plan, wrong, artifact.vectors, points=("full",))
    newer = ops.Plan(**{**{f: getattr(plan, f) for f in plan.__slots__}, "version": 99})
    with pytest.raises(UnsupportedModelError, match="99"):
        ReferenceExecutor(newer, artifact.tensors, artifact.vectors, points=("full",))


def test_stored_values() -> None:
    x = np.array([[0.0, 1.0, -2.0, 0.004], [0.0, 0.0, 0.0, 0.0], [1e-42, 0.0, 0.0, 0.0]], np.float32)
    np.testing.assert_allclose(as_stored(x, "int8")[0], [0, 1, -2, 0], atol=0.008)
    assert not as_stored(x, "int8")[1:].any()
    assert as_stored(x, "f32") is x
    assert as_stored(np.array([1 + 2**-9], np.float32), "bf16")[0] == 1.0


def test_activations() -> None:
    x = np.array([-1e4, -1.0, 0.0, 2.0, 1e4], np.float32)
    np.testing.assert_allclose(activate(x, "silu"), [0, -0.26894142, 0, 1.76159416, 1e4], atol=1e-7)
    np.testing.assert_allclose(activate(x, "gelu"), [0, -0.15865525, 0, 1.95449974, 1e4], atol=1e-7)
    np.testing.assert_allclose(activate(x, "gelu_tanh"), [0, -0.15880801, 0, 1.95459769, 1e4], atol=1e-7)
    np.testing.assert_array_equal(activate(x, "relu"), [0, 0, 0, 2, 1e4])


def test_it_is_an_executor(artifacts: dict[str, Artifact]) -> None:
    executor = executor_at(artifacts, "int8", kv_blocks=3)
    assert isinstance(executor, Executor)
    assert (executor.kv_blocks, executor.kv_type, executor.points) == (3, "bf16", ("int8", "int4"))
    assert executor.kv_bytes_per_block > 0 and executor.max_step_tokens == 128
    assert KV_BLOCK_TOKENS == 32
