"""The torch executor on the CPU beside the reference: every family, point and KV type, and the executor's contract."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from haomiao.errors import InputError, ModelError, UnsupportedModelError
from haomiao.kernels import pack, rtn
from haomiao.load.artifact import Artifact
from haomiao.models import plan as ops
from haomiao.models.registry import plan_for
from haomiao.types import POINTS, Executor, StepBatch
from tests.golden.cases import CASES
from tests.golden.checkpoint import tokens_of
from tests.models.runs import Sequence1, make_artifact, make_executor, relative_error

torch = pytest.importorskip("torch", reason="torch is not installed")

from haomiao.engine.executors.torch.executor import TorchExecutor  # noqa: E402
from haomiao.engine.executors.torch.matrices import place  # noqa: E402

FAMILIES = (
    "llama-odd-bias",
    "mistral-window",
    "smollm3-nope",
    "qwen2-odd",
    "qwen3-head32",
    "gemma2-caps",
    "gemma3-v5",
    "phi3-short",
    "gpt2-odd",
)
RUNS = (
    ("full", "f32", 1e-4),
    ("bf16", "bf16", 1e-3),
    ("int8", "bf16", 1e-3),
    ("int8", "int8", 1e-3),
    ("int4", "bf16", 1e-3),
    ("int4-w", "bf16", 1e-3),
)
SCHEMES = {"int8": "nested", "int4": "nested", "int4-w": "nested"}
CASE = next(case for case in CASES if case.name == "gemma3-v4")
TOKENS = tokens_of(CASE)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Artifact]]:
    directory = tmp_path_factory.mktemp("torch")
    yield {scheme: make_artifact(CASE, directory, scheme) for scheme in ("full", "nested")}


def executor_at(artifacts: dict[str, Artifact], point: str, kind: str = "torch", **options: Any) -> Executor:
    return make_executor(kind, artifacts[SCHEMES.get(point, "full")], **options)


@pytest.mark.parametrize(("point", "kv_type", "bound"), RUNS)
@pytest.mark.parametrize("name", FAMILIES)
def test_torch_agrees_with_the_reference(name: str, point: str, kv_type: Any, bound: float, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    with make_artifact(case, tmp_path, SCHEMES.get(point, point)) as artifact:
        options = {"points": ("int8", "int4-w", "int4")} if point == "int4-w" else {}
        ours, theirs = (
            Sequence1(make_executor(kind, artifact, kv_type=kv_type, **options), point).feed(
                tokens_of(case, 44), [17, 18]
            )
            for kind in ("torch", "reference")
        )
    assert relative_error(ours, theirs) <= bound
    np.testing.assert_array_equal(ours.argmax(axis=1), theirs.argmax(axis=1))


def test_int4_w_lies_between_int8_and_int4(artifacts: dict[str, Artifact]) -> None:
    exact = Sequence1(executor_at(artifacts, "full"), "full").feed(TOKENS[:30])
    executor = executor_at(artifacts, "int8", points=("int8", "int4-w", "int4"))
    assert list(POINTS) == ["full", "bf16", "int8", "int4-w", "int4"]
    errors = {
        point: float(np.square(Sequence1(executor, point).feed(TOKENS[:30]) - exact).mean())
        for point in ("int8", "int4-w", "int4")
    }
    assert errors["int8"] < errors["int4-w"] < 1.1 * errors["int4"]


@pytest.mark.parametrize("cols", [32, 70, 256])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [31, 96])
def test_matrices_hold_what_was_packed(rows: int, cols: int, group: int) -> None:
    values = np.random.default_rng(rows + cols).normal(size=(rows, cols)).astype(np.float32)
    device = torch.device("cpu")
    for packed in (pack.pack_f32(values), pack.pack_bf16(values), rtn.quantize_int8(values, group)):
        placed = place(packed, device)
        np.testing.assert_array_equal(placed.values("hi+lo").numpy(), pack.unpack(packed))
    nested = rtn.quantize_planes(values, group)
    for planes in ("hi", "hi+lo"):
        np.testing.assert_array_equal(place(nested, device).values(planes).numpy(), pack.unpack(nested, planes))
    assert place(nested, device).nbytes == rows * -(-cols // group) * (group + 2)  # nothing but codes and scales


def test_company_cuts_and_blocks_change_nothing(artifacts: dict[str, Artifact]) -> None:
    alone = Sequence1(executor_at(artifacts, "int8"), "int8").feed(TOKENS[:40])
    executor = executor_at(artifacts, "int8")
    Sequence1(executor, "int8", [5, 1]).feed(TOKENS[:33], [7, 20])
    batch = StepBatch(
        token_ids=np.array([*TOKENS[:20], *TOKENS[33:40], *TOKENS[:3]], np.int32),
        span_starts=np.array([0, 20, 27, 30], np.int32),
        past=np.array([0, 33, 0], np.int32),
        block_tables=np.array([[2, -1], [5, 1], [7, -1]], np.int32),
        logit_rows=np.arange(30, dtype=np.int32),
        point="int8",
    )
    together = executor.step(batch).logits
    np.testing.assert_array_equal(together[:20], alone[:20])
    np.testing.assert_array_equal(together[20:27], alone[33:40])
    np.testing.assert_array_equal(together[27:], alone[:3])


def test_copied_blocks_are_real(artifacts: dict[str, Artifact]) -> None:
    executor = executor_at(artifacts, "int8", kv_type="int8")
    sequence = Sequence1(executor, "int8", [3, 4, 5])
    sequence.feed(TOKENS[:40])
    executor.copy_blocks(np.array([[3, 10], [4, 11]], np.int32))
    fork = Sequence1(executor, "int8", [10, 11, 12])
    fork.past = 40
    np.testing.assert_array_equal(fork.feed(TOKENS[40:44]), sequence.feed(TOKENS[40:44]))
    for pairs in ([[0, 24]], [[-1, 0]], [[0, 1, 2]]):
        with pytest.raises(InputError):
            executor.copy_blocks(np.array(pairs, np.int32))


def test_sequences_may_branch_off_within_a_step(artifacts: dict[str, Artifact]) -> None:
    executor = executor_at(artifacts, "int8", kv_type="int8")
    Sequence1(executor, "int8", [5, 1]).feed(TOKENS[:35])
    executor.copy_blocks(np.array([[1, 2]], np.int32))
    batch = StepBatch(
        token_ids=np.array(TOKENS[35:43], np.int32),
        span_starts=np.array([0, 5, 8], np.int32),
        past=np.array([35, 40], np.int32),
        block_tables=np.array([[5, 1], [5, 2]], np.int32),
        logit_rows=np.arange(8, dtype=np.int32),
        point="int8",
        copies=np.array([[token, 2] for token in range(5)], np.int32),
    )
    whole = Sequence1(executor_at(artifacts, "int8", kv_type="int8"), "int8").feed(TOKENS[:43])
    np.testing.assert_allclose(executor.step(batch).logits, whole[35:], rtol=1e-4, atol=1e-4)


def forked(executor: Executor) -> Any:
    """Logits of a sequence that goes on from copies of another's first tokens, in the same step."""
    batch = StepBatch(
        np.array([*TOKENS[:5], *TOKENS[5:8]], np.int32), np.array([0, 5, 8], np.int32), np.array([0, 5], np.int32),
        np.array([[1], [2]], np.int32), np.arange(8, dtype=np.int32), "int8",
        copies=np.array([[token, 2] for token in range(5)], np.int32),
    )  # fmt: skip
    return executor.step(batch).logits.copy()


def test_copies_within_a_step(artifacts: dict[str, Artifact]) -> None:
    ours = forked(executor_at(artifacts, "int8"))
    np.testing.assert_array_equal(ours, Sequence1(executor_at(artifacts, "int8"), "int8").feed(TOKENS[:8]))
    assert relative_error(ours, forked(executor_at(artifacts, "int8", "reference"))) <= 1e-3


def test_rows_and_their_greatest(artifacts: dict[str, Artifact]) -> None:
    whole = Sequence1(executor_at(artifacts, "full"), "full").feed(TOKENS[:10])
    executor = executor_at(artifacts, "full")
    batch = StepBatch(
        np.array(TOKENS[:10], np.int32), np.array([0, 10], np.int32), np.array([0], np.int32),
        np.array([[4]], np.int32), np.array([2, 9], np.int32), "full", np.array([True, False]),
    )  # fmt: skip
    result = executor.step(batch)
    np.testing.assert_array_equal(result.argmax, whole[[2, 9]].argmax(axis=1))
    np.testing.assert_array_equal(result.logits[1], whole[9])
    assert result.argmax.dtype == np.int32 and result.elapsed_ns > 0
    batch.logit_rows, batch.greedy = np.zeros(0, np.int32), None
    assert executor.step(batch).logits.shape == (0, executor.vocab_size)
    batch.token_ids = np.array([10**6] * 10, np.int32)
    with pytest.raises(InputError, match="vocabulary"):
        executor.step(batch)


def test_ties_go_to_the_lowest_id() -> None:
    from haomiao.engine.executors.torch.twins import greatest

    rows = torch.tensor([[1.0, 3.0, 3.0], [float("nan"), 0.0, 0.0], [float("-inf")] * 3])
    assert greatest(rows).tolist() == [1, 1, 0]


def test_it_is_an_executor(artifacts: dict[str, Artifact]) -> None:
    executor, reference = (executor_at(artifacts, "int8", kind, kv_blocks=3) for kind in ("torch", "reference"))
    assert isinstance(executor, Executor)
    for name in ("kv_blocks", "kv_type", "points", "max_step_tokens", "vocab_size"):
        assert getattr(executor, name) == getattr(reference, name)
    executor.close()
    executor.close()
    with pytest.raises(InputError, match="closed"):
        executor.copy_blocks(np.zeros((0, 2), np.int32))


def test_what_does_not_fit_is_refused(artifacts: dict[str, Artifact]) -> None:
    artifact = artifacts["full"]
    plan = plan_for(artifact.meta["config"])
    without = {name: t for name, t in artifact.tensors.items() if name != "layers.0.out"}
    with pytest.raises(ModelError, match=r"layers\.0\.out"):
        TorchExecutor(plan, without, artifact.vectors, points=("full",))
    with pytest.raises(ModelError, match="int8"):
        TorchExecutor(plan, artifact.tensors, artifact.vectors, points=("int8",))
    for points in ((), ("full", "int8"), ("warp",)):
        with pytest.raises(InputError):
            TorchExecutor(plan, artifact.tensors, artifact.vectors, points=points)
    newer = ops.Plan(**{**{f: getattr(plan, f) for f in plan.__slots__}, "version": 99})
    with pytest.raises(UnsupportedModelError, match="99"):
        TorchExecutor(newer, artifact.tensors, artifact.vectors, points=("full",))


def test_the_native_executor_refuses_int4_w(artifacts: dict[str, Artifact]) -> None:
    with pytest.raises(InputError, match="int4-w"):
        make_executor("native", artifacts["nested"], points=("int8", "int4-w"))
