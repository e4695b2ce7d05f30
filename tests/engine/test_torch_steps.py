"""Whole steps of Triton kernels beside the twins' steps, in Triton's interpreter on the CPU."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: it reads it once
torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="triton is not installed")
if os.environ["TRITON_INTERPRET"] != "1":
    pytest.skip("TRITON_INTERPRET=0: kernels are compiled, benchmarks.gpu checks them", allow_module_level=True)

from haomiao.engine.executors.torch import fast, launch  # noqa: E402
from haomiao.engine.executors.torch import inputs as step_inputs  # noqa: E402
from haomiao.engine.executors.torch.executor import TorchExecutor  # noqa: E402
from haomiao.engine.executors.torch.lowering import AttentionStage, MatrixStage, lower  # noqa: E402
from haomiao.models import plan as ops  # noqa: E402
from haomiao.models.registry import plan_for  # noqa: E402
from haomiao.types import StepBatch  # noqa: E402
from tests.golden.cases import CASES  # noqa: E402
from tests.golden.checkpoint import tokens_of  # noqa: E402
from tests.models.runs import Sequence1, make_artifact, make_executor, relative_error  # noqa: E402

STEPS = (
    ("llama-odd-bias", "full", "f32", 1e-4),
    ("gpt2-odd", "bf16", "bf16", 2e-2),
    # an activation code that falls the other way moves a logit by more than rounding
    ("gemma3-v5", "int8", "int8", 5e-2),
    ("phi3-short", "int4-w", "bf16", 2e-2),
)


@pytest.fixture
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, since each costs the interpreter milliseconds; few buckets, so that five tokens are many."""
    monkeypatch.setattr(launch, "BLOCKS", launch.Blocks(gemv_bytes=1 << 20, gemv_most=128, gemm_rows=128))
    monkeypatch.setattr(fast, "BUCKETS", (1, 2, 4))
    monkeypatch.setattr(step_inputs, "LEAST_SPLIT", 256)


@pytest.mark.parametrize(("name", "point", "kv_type", "bound"), STEPS)
def test_steps_agree_with_the_twins(
    name: str, point: str, kv_type: Any, bound: float, tmp_path: Path, large_blocks: None
) -> None:
    """Five tokens kernel by kernel, then one, and two with padding, as graphs would have them."""
    case = next(case for case in CASES if case.name == name)
    scheme = {"int8": "nested", "int4-w": "nested"}.get(point, point)
    tokens = tokens_of(case, 9)
    with make_artifact(case, tmp_path, scheme) as artifact:
        points = ("int8", "int4-w") if scheme == "nested" else (point,)
        plan = plan_for(artifact.meta["config"])
        executor = TorchExecutor(
            plan, artifact.tensors, artifact.vectors, points=points, kv_type=kv_type, kv_blocks=4, fast=True
        )
        slow = make_executor("torch", artifact, points=points, kv_type=kv_type, kv_blocks=4)
        ours, theirs = (Sequence1(each, point).feed(tokens, [5, 6]) for each in (executor, slow))
    assert relative_error(ours, theirs) <= bound
    assert float(np.median(np.abs(ours - theirs))) <= (1e-5 if point == "full" else 5e-3) * np.abs(theirs).max()


def test_a_step_of_many_sequences(tmp_path: Path, large_blocks: None) -> None:
    """Company, rows that are asked for, greedy rows, in both kinds of step."""
    case = next(case for case in CASES if case.name == "qwen2-tied")
    with make_artifact(case, tmp_path, "nested") as artifact:
        plan = plan_for(artifact.meta["config"])
        found = []
        for which in (True, False):
            executor = TorchExecutor(
                plan, artifact.tensors, artifact.vectors, points=("int8", "int4-w", "int4"), kv_blocks=8, fast=which
            )
            for starts, rows in (([0, 1, 3], [0, 2]), ([0, 1, 6], [0, 4, 5])):
                batch = StepBatch(
                    np.arange(1, starts[-1] + 1, dtype=np.int32), np.array(starts, np.int32), np.zeros(2, np.int32),
                    np.array([[5, -1], [2, 3]], np.int32), np.array(rows, np.int32), "int4-w",
                    np.array([True] * (len(rows) - 1) + [False]),
                )  # fmt: skip
                result = executor.step(batch)
                found.append((which, result.logits[-1].copy(), result.argmax))
            # the second sequence goes on from a copy of the first one's token, written in the same step
            batch.past, batch.copies = np.array([0, 1], np.int32), np.array([[0, 2]], np.int32)
            batch.logit_rows, batch.greedy = np.array([5], np.int32), None
            result = executor.step(batch)
            found.append((which, result.logits[-1].copy(), result.argmax))
    for ours, theirs in zip(found[:3], found[3:], strict=True):
        assert relative_error(ours[1], theirs[1]) <= 2e-2
        np.testing.assert_array_equal(ours[2], theirs[2])


def test_lowering_fuses_only_what_nobody_reads() -> None:
    case = next(case for case in CASES if case.name == "llama-gqa-tied")
    plan = plan_for(case.config)
    kinds = [type(stage).__name__ for stage in lower(plan)]
    layer = ["MatrixStage", "AttentionStage", "MatrixStage", "MatrixStage", "MatrixStage"]
    assert kinds == ["Embed", *layer * 2, "MatrixStage"]
    matrices = [stage for stage in lower(plan) if isinstance(stage, MatrixStage)]
    assert [stage.into for stage in matrices] == [None, "x", None, "x"] * 2 + [None]
    assert all(stage.before is not None for stage in matrices if stage.into is None)
    twice = ops.Plan(**{f: getattr(plan, f) for f in plan.__slots__} | {"ops": (*plan.ops, ops.Add("x", "h"))})
    assert [type(stage).__name__ for stage in lower(twice)][-3:] == ["Norm", "MatrixStage", "Add"]
    attention = next(stage for stage in lower(plan) if isinstance(stage, AttentionStage))
    assert attention.q_rope is not None and attention.k_norm is None


def test_fast_kernels_need_the_interpreter_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from haomiao.errors import InputError

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    case = next(case for case in CASES if case.name == "qwen2-tied")
    with make_artifact(case, tmp_path, "full") as artifact:
        plan = plan_for(artifact.meta["config"])
        with pytest.raises(InputError, match="interpreter"):
            TorchExecutor(plan, artifact.tensors, artifact.vectors, points=("full",), fast=True)


def test_splits_cover_every_context() -> None:
    """No more than a merge can hold, none cut across a turn of keys, and one alone where one is enough."""
    for context in (32, 64, 96, 1024, 1504, 4096, 131072):
        size = step_inputs.decode_size(4, context)
        assert size.splits <= step_inputs.MOST_SPLITS and size.split % launch.BLOCKS.keys == 0
        assert (size.splits - 1) * size.split < context <= size.splits * size.split


def test_everything_is_made_ready_ahead(tmp_path: Path, large_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every point, number of tokens and context once; what padding writes is read by nobody."""
    monkeypatch.setattr(fast, "BUCKETS", (1, 2))
    monkeypatch.setattr(launch, "DEQUANTIZED_FROM", 5)
    case = next(case for case in CASES if case.name == "llama-gqa-tied")
    with make_artifact(case, tmp_path, "nested") as artifact:
        plan = plan_for({**artifact.meta["config"], "max_position_embeddings": 1500, "num_hidden_layers": 1})
        executor = TorchExecutor(
            plan, artifact.tensors, artifact.vectors, points=("int8", "int4"), kv_blocks=3, fast=True
        )
        runner = executor._fast
        assert runner is not None and runner.contexts == (1024, 1504)
        assert [size.tokens for size in runner._long_sizes()] == [3, 5]
        launched: list[int] = []
        eager = runner._eager
        monkeypatch.setattr(
            runner, "_eager", lambda point, made: (launched.append(made.size.tokens), eager(point, made))
        )
        runner.prepare((1, 2), (1,))
        assert launched.count(3) == launched.count(5) == 2
        kinds = itertools.product(("int4", "int8"), (1, 2), (1024,), (False, True))  # the last: rows are drawn
        assert sorted(runner._launches) == sorted(kinds)
        (layer,) = executor._open().memory
        assert layer.k[3, :, 0].abs().sum() > 0 and layer.k[:3].abs().sum() == 0
