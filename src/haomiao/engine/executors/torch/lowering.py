"""A plan as the stages that the kernels compute: what stands next to each other in the plan is done in one launch.

Norms and gates go in front of the matrix that reads them, residuals behind the one that writes them, head norms,
rotations and the writing of K and V into one stage with attention. Fused only where nobody else reads what then is
never written. Knows operations, not tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from haomiao.errors import UnsupportedModelError
from haomiao.models import plan as ops


@dataclass(frozen=True, slots=True)
class MatrixStage:
    """A linear layer or the head, with what stands before and behind it."""

    op: ops.Linear | ops.Head
    before: ops.Norm | ops.Glu | None = None
    """Computed from its own source; the layer's source is then never written."""
    into: str | None = None
    """The buffer that the result is added to; the layer's own output is then never written."""


@dataclass(frozen=True, slots=True)
class AttentionStage:
    """Head norms, rotations, the writing of K and V, attention."""

    op: ops.Attention
    q_norm: ops.HeadNorm | None = None
    k_norm: ops.HeadNorm | None = None
    q_rope: ops.Rope | None = None
    k_rope: ops.Rope | None = None


Stage: TypeAlias = MatrixStage | AttentionStage | ops.Embed | ops.Norm | ops.Add | ops.Glu | ops.Activate


def lower(plan: ops.Plan) -> tuple[Stage, ...]:
    """The stages of a plan. Raises `UnsupportedModelError` for what no kernel computes."""
    stages: list[Stage] = []
    waiting: list[ops.HeadNorm | ops.Rope] = []
    index = 0
    while index < len(plan.ops):
        op = plan.ops[index]
        index += 1
        if isinstance(op, ops.HeadNorm | ops.Rope):
            waiting.append(op)
        elif isinstance(op, ops.Attention):
            stages.append(_attention(op, waiting))
            waiting = []
        elif isinstance(op, ops.Linear | ops.Head):
            stage, taken = _matrix(plan.ops, index - 1, stages)
            stages.append(stage)
            index += taken
        elif isinstance(op, ops.Embed | ops.Norm | ops.Add | ops.Glu | ops.Activate):
            stages.append(op)
        else:
            raise UnsupportedModelError(f"the plan holds an operation that is not supported: {type(op).__name__}")
    if waiting:
        raise UnsupportedModelError("the plan rotates or norms heads that no attention reads")
    return tuple(stages)


def _matrix(all_ops: Sequence[ops.Op], at: int, stages: list[Stage]) -> tuple[MatrixStage, int]:
    """The stage of the matrix at `at`, and how many operations behind it went in. What went in before it is taken off
    `stages`."""
    op = all_ops[at]
    assert isinstance(op, ops.Linear | ops.Head)
    before: ops.Norm | ops.Glu | None = None
    last = stages[-1] if stages else None
    fits = (isinstance(last, ops.Norm) and last.kind == "rms" and last.bias is None) or isinstance(last, ops.Glu)
    if (
        isinstance(last, ops.Norm | ops.Glu)
        and fits
        and last.out == op.source
        and not _read_later(all_ops, at, op.source)
    ):
        before = last
        stages.pop()
    if isinstance(op, ops.Linear) and at + 1 < len(all_ops):
        following = all_ops[at + 1]
        if isinstance(following, ops.Add) and following.source == op.out and not _read_later(all_ops, at + 1, op.out):
            return MatrixStage(op, before, following.target), 1
    return MatrixStage(op, before), 0


def _read_later(all_ops: Sequence[ops.Op], at: int, buffer: str) -> bool:
    """Whether an operation behind `at` reads what stands in a buffer now."""
    for op in all_ops[at + 1 :]:
        reads, writes = uses(op)
        if buffer in reads:
            return True
        if buffer in writes:
            return False
    return False


def uses(op: ops.Op) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(buffers that are read, buffers that are overwritten whole)."""
    match op:
        case ops.Embed():
            return (), (op.out,)
        case ops.HeadNorm() | ops.Rope():
            return (op.buffer,), ()
        case ops.Attention():
            return (op.qkv,), (op.out,)
        case ops.Add():
            return (op.target, op.source), ()
        case ops.Head():
            return (op.source,), ()
    return (op.source,), (op.out,)


def _attention(op: ops.Attention, waiting: list[ops.HeadNorm | ops.Rope]) -> AttentionStage:
    """Head norms and rotations of q and k, in that order, in front of an attention."""
    if op.sinks is not None:
        raise UnsupportedModelError("attention sinks are not supported")
    found: dict[str, ops.HeadNorm | ops.Rope] = {}
    for each in waiting:
        side = {0: "q", op.k_offset: "k"}.get(each.offset)
        kind = "norm" if isinstance(each, ops.HeadNorm) else "rope"
        heads = op.heads if side == "q" else op.kv_heads
        name = f"{side}_{kind}"
        late = kind == "norm" and f"{side}_rope" in found
        if side is None or each.buffer != op.qkv or (each.heads, each.head_dim) != (heads, op.head_dim):
            raise UnsupportedModelError("the plan norms or rotates other columns than q and k")
        if name in found or late:
            raise UnsupportedModelError("the plan norms heads after it rotated them, or does one of them twice")
        found[name] = each
    eps = {each.eps for each in found.values() if isinstance(each, ops.HeadNorm)}
    if len(eps) > 1:
        raise UnsupportedModelError("the norms of q and k have different eps")
    return AttentionStage(op, **found)  # type: ignore[arg-type]
