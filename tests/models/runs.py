"""Running tiny models in tests: a checkpoint in memory becomes an artifact, an artifact an executor, tokens logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from haomiao.load.artifact import Artifact
from haomiao.models.convert import convert
from haomiao.models.registry import plan_for
from haomiao.types import F32, I32, KV_BLOCK_TOKENS, Executor, StepBatch
from tests.golden.cases import Case
from tests.golden.checkpoint import DictSource, random_checkpoint

EXECUTORS = ("reference", "native")


def make_artifact(case: Case, directory: Path, scheme: Any = "full", **options: Any) -> Artifact:
    """The case's checkpoint, converted."""
    source = DictSource(case.config, random_checkpoint(case.config, case.seed))
    return Artifact.open(convert(source, directory / f"{case.name}-{scheme}", scheme=scheme, **options))


def make_executor(kind: str, artifact: Artifact, *, max_context: int | None = None, **options: Any) -> Executor:
    """An executor of the artifact's points; skips where the native one does not exist."""
    settings: dict[str, Any] = {
        "points": tuple(artifact.meta["points"]),
        "kv_type": None,
        "kv_blocks": 24,
        "max_step_tokens": 128,
        **options,
    }
    plan = plan_for(artifact.meta["config"], max_context)
    if kind == "reference":
        from haomiao.engine.executors.reference import ReferenceExecutor

        return ReferenceExecutor(plan, artifact.tensors, artifact.vectors, **settings)
    if kind == "torch":
        executors = pytest.importorskip("haomiao.engine.executors.torch.executor", reason="torch is not installed")
        second: Executor = executors.TorchExecutor(plan, artifact.tensors, artifact.vectors, **settings)
        return second
    native = pytest.importorskip("haomiao.engine.executors.native", reason="the native executor is not built")
    executor: Executor = native.NativeExecutor(plan, artifact.tensors, artifact.vectors, threads=1, **settings)
    return executor


class Sequence1:
    """One sequence on an executor: feeds tokens, keeps its block table (in an order that is not ascending)."""

    def __init__(self, executor: Executor, point: str, blocks: Sequence[int] | None = None) -> None:
        self.executor, self.point, self.past = executor, point, 0
        order = list(blocks) if blocks is not None else list(range(executor.kv_blocks))[::-1]
        self.table: I32 = np.array([order], np.int32)

    def feed(self, tokens: Sequence[int], cuts: Sequence[int] = ()) -> F32:
        """Logits of all tokens, computed in pieces that end at `cuts`."""
        pieces = []
        for first, last in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
            batch = StepBatch(
                token_ids=np.array(tokens[first:last], np.int32),
                span_starts=np.array([0, last - first], np.int32),
                past=np.array([self.past], np.int32),
                block_tables=self.table[:, : -(-(self.past + last - first) // KV_BLOCK_TOKENS)],
                logit_rows=np.arange(last - first, dtype=np.int32),
                point=self.point,
            )
            pieces.append(self.executor.step(batch).logits.copy())
            self.past += last - first
        return np.concatenate(pieces)


def greedy(executor: Executor, point: str, prompt: Sequence[int], count: int) -> list[int]:
    """`count` greedy tokens after `prompt`."""
    sequence = Sequence1(executor, point)
    logits, out = sequence.feed(prompt), []
    for _ in range(count):
        out.append(int(logits[-1].argmax()))
        logits = sequence.feed([out[-1]])
    return out


def relative_error(ours: F32, theirs: F32) -> float:
    """max |a - b| / max |b|."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
