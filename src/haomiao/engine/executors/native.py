"""The native executor: hands the plan to the compiled runner once, then every step is one call.

Knows how a plan's operations are named and passed on; everything is checked and computed in native/runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from haomiao import _core
from haomiao.engine.executors.crew import Crew
from haomiao.errors import HaomiaoError, InputError, ModelError, UnavailableError, UnsupportedModelError
from haomiao.kernels.isa import available, selected
from haomiao.kernels.packed import ENCODINGS, PackedTensor
from haomiao.models import plan as ops
from haomiao.types import F32, I32, POINTS, KvType, Point, StepBatch, StepResult

KEPT_ROWS = 16
"""Rows of logits whose memory is kept between steps; a step that wants more gets memory of its own."""


class NativeExecutor:
    """Implements `types.Executor` on the CPU.

    `tensors` and `vectors` hold the plan's weights by name; they may be views of a mapped file and stay referenced.
    `points` must be switchable (one family). `threads` defaults to the physical cores that affinity mask and cgroup
    quota permit; a step is computed by fewer where that is quicker, unless `crew` is False (engine/executors/crew.py).
    The calling thread works as thread 0: it is pinned during a step and free again afterwards, unless `pin` is False. A
    step holds at most `max_step_tokens` tokens. Raises `ModelError` for a plan or weights that contradict themselves,
    `UnsupportedModelError` for operations that do not exist here, `InputError` for options, `UnavailableError` if the
    memory or the instruction set is not there.
    """

    def __init__(
        self,
        plan: ops.Plan,
        tensors: Mapping[str, PackedTensor],
        vectors: Mapping[str, F32],
        *,
        points: Sequence[str],
        kv_type: KvType | None = None,
        kv_blocks: int = 64,
        max_step_tokens: int = 512,
        threads: int | None = None,
        isa: str | None = None,
        pin: bool = True,
        crew: bool = True,
    ) -> None:
        specs = [_point(name) for name in points]
        if len({spec.family for spec in specs}) != 1:
            raise InputError(f"points must be switchable, one family: {', '.join(points) or 'none given'}")
        if "int4-w" in points:
            raise InputError("int4-w runs on the torch executor (--device cuda), not on this one", param="point")
        if isa is not None and isa not in available():
            raise UnavailableError(f"isa {isa!r}: this machine can run {', '.join(available())}", param="isa")
        if threads is not None and threads < 1:
            raise InputError(f"threads must be at least 1, not {threads}", param="threads")
        self.points = tuple(points)
        self.vocab_size = plan.vocab_size
        self.max_step_tokens = max_step_tokens
        self.kv_blocks = kv_blocks
        self.kv_type: KvType = kv_type or specs[0].default_kv
        built = _hand_over(plan, tensors, vectors)
        try:
            runner = _core.Runner(
                built,
                isa or selected(),
                self.kv_type,
                kv_blocks,
                max_step_tokens,
                threads or 0,
                pin,
                [_point_tuple(spec) for spec in specs],
            )
        except ValueError as error:
            raise ModelError(str(error)) from None
        except MemoryError:
            raise UnavailableError("the memory for KV blocks and buffers is not there; lower kv_blocks") from None
        self._runner: _core.Runner | None = runner
        self.threads: int = runner.threads
        self.isa: str = runner.isa
        self._crew = Crew(self.threads) if crew and self.threads > 1 else None
        self.max_context: int = runner.max_context
        self.kv_bytes_per_block: int = runner.kv_bytes_per_block
        self.hidden_size: int = runner.hidden_size
        self._logits = np.empty((0, self.vocab_size), np.float32)

    def step(self, batch: StepBatch) -> StepResult:
        """Compute one step. `logits` is a view that the next step overwrites; of greedy rows it may hold anything.
        Raises `InputError`; never aborts."""
        runner = self._open()
        if batch.point not in self.points:
            raise InputError(f"point {batch.point!r} is not one of {', '.join(self.points)}", param="point")
        rows = _int32("logit_rows", batch.logit_rows, 1)
        logits = self._rows(rows.shape[0])
        argmax = np.empty(rows.shape[0], np.int32)
        arrays = (
            _int32("token_ids", batch.token_ids, 1),
            _int32("span_starts", batch.span_starts, 1),
            _int32("past", batch.past, 1),
            _int32("block_tables", batch.block_tables, 2),
        )
        greedy = batch.greedy
        if greedy is not None and (greedy.dtype != np.bool_ or greedy.shape != rows.shape):
            raise InputError("greedy must be a bool array with an element for each logit row", param="greedy")
        copies = None if batch.copies is None else _int32("copies", batch.copies, 2)
        wanted, hidden = None, None
        if batch.hidden_rows is not None:
            wanted = _int32("hidden_rows", batch.hidden_rows, 1)
            hidden = np.empty((wanted.shape[0], self.hidden_size), np.float32)
        if self._crew is not None:
            runner.active = self._crew.choose(batch.point, len(batch.token_ids), runner.crowded)
        try:
            index = self.points.index(batch.point)
            elapsed = runner.step(index, *arrays, rows, greedy, copies, logits, argmax, wanted, hidden)
        except ValueError as error:
            raise InputError(f"step: {error}") from None
        if self._crew is not None:
            self._crew.observe(batch.point, len(batch.token_ids), runner.active, elapsed)
        return StepResult(logits, argmax, elapsed, hidden)

    def copy_blocks(self, pairs: I32) -> None:
        """Copy KV blocks of every layer. `pairs` is int32 [n, 2]: (from, to), done in order."""
        try:
            self._open().copy_blocks(_int32("pairs", pairs, 2))
        except ValueError as error:
            raise InputError(f"copy_blocks: {error}") from None

    def close(self) -> None:
        """Release threads and memory; idempotent."""
        self._runner = None
        self._logits = np.empty((0, self.vocab_size), np.float32)

    def profile(self, on: bool) -> None:
        """Time the phases of the steps to come."""
        self._open().profile(on)

    def last_step_profile(self) -> list[tuple[str, int]]:
        """(phase, nanoseconds) of the last step, in order; phases are named after their matrix or operation."""
        return self._open().last_step_profile()

    def last_step_rescored(self) -> float | None:
        """The share of (row, tile) pairs of the head that both planes were read for after screening, or None if the
        last step did not screen."""
        share = self._open().rescored
        return None if share < 0 else share

    def _open(self) -> _core.Runner:
        if self._runner is None:
            raise InputError("the executor is closed")
        return self._runner

    def _rows(self, rows: int) -> F32:
        if rows > KEPT_ROWS:
            return np.empty((rows, self.vocab_size), np.float32)
        if rows > self._logits.shape[0]:
            self._logits = np.empty((KEPT_ROWS if rows > 1 else 1, self.vocab_size), np.float32)
        return self._logits[:rows]


def _point(name: str) -> Point:
    if name not in POINTS:
        raise InputError(f"point must be one of {', '.join(POINTS)}, not {name!r}", param="point")
    return POINTS[name]


def _point_tuple(point: Point) -> tuple[str, bool, bool, bool, bool]:
    """(name, integer weights allowed, body reads both planes, head reads both, bf16 activations for bf16 weights)."""
    integer = point.activations == "int8"
    return point.name, integer, point.planes != "hi", point.head != "hi", point.activations != "f32"


def _int32(name: str, array: npt.NDArray[Any], dimensions: int) -> I32:
    """The array as the core reads it. A wider type is refused: a cast would wrap silently."""
    if not isinstance(array, np.ndarray) or array.dtype != np.int32 or array.ndim != dimensions:
        raise InputError(f"{name} must be an int32 array of {dimensions} dimension(s)", param=name)
    return np.ascontiguousarray(array)


# ---- handing the plan over ------------------------------------------------------------------------------------------


def _hand_over(plan: ops.Plan, tensors: Mapping[str, PackedTensor], vectors: Mapping[str, F32]) -> _core.Plan:
    """The plan as the core knows it. Operations are refused by name where the core has none."""
    if plan.version != ops.PLAN_VERSION:
        raise UnsupportedModelError(f"a plan of version {plan.version} was given; {ops.PLAN_VERSION} is understood")
    if not len(plan.kv_heads) == len(plan.head_dims) == len(plan.windows) == plan.layers:
        raise ModelError("the plan does not describe each of its layers")
    try:
        built = _core.Plan(plan.vocab_size, plan.max_context)
        for layer in zip(plan.kv_heads, plan.head_dims, plan.windows, strict=True):
            built.layer(*layer)
        for name, width in plan.buffers.items():
            built.buffer(name, width)
        for rope in plan.ropes:
            built.rope_table(rope.dim, list(rope.inv_freq), rope.attention_factor)
        for name, spec in plan.weights.items():
            _hand_over_weight(built, name, spec, tensors, vectors)
        for op in plan.ops:
            _hand_over_op(built, op)
    except HaomiaoError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        raise ModelError(f"plan of {plan.family}: {str(error).splitlines()[0]}") from None
    return built


def _hand_over_weight(
    built: _core.Plan,
    name: str,
    spec: ops.WeightSpec,
    tensors: Mapping[str, PackedTensor],
    vectors: Mapping[str, F32],
) -> None:
    if name not in (vectors if spec.kind == "vector" else tensors):
        raise ModelError(f"the model has no weight {name!r}")
    if spec.kind == "vector":
        vector = np.ascontiguousarray(vectors[name], np.float32)
        if vector.shape != (spec.rows,):
            raise ModelError(f"vector {name!r} has the shape {vector.shape}, not ({spec.rows},)")
        built.vector(name, vector)
        return
    t = tensors[name]
    if (t.rows, t.cols) != (spec.rows, spec.cols):
        raise ModelError(f"matrix {name!r} is [{t.rows}, {t.cols}], not [{spec.rows}, {spec.cols}]")
    built.matrix(name, ENCODINGS.index(t.encoding), t.rows, t.cols, t.group, t.lo_shift, t.hi, t.lo, t.kept)


def _hand_over_op(built: _core.Plan, op: Any) -> None:
    match op:
        case ops.Embed():
            built.embed(op.out, op.table, op.scale, op.positions or "")
        case ops.Norm():
            built.norm(op.out, op.source, op.weight, op.eps, op.kind, op.bias or "")
        case ops.Linear():
            built.linear(op.out, op.source, op.weight, op.bias or "")
        case ops.HeadNorm():
            built.head_norm(op.buffer, op.offset, op.heads, op.head_dim, op.weight, op.eps)
        case ops.Rope():
            built.rope(op.buffer, op.offset, op.heads, op.head_dim, op.rope)
        case ops.Attention():
            if op.sinks is not None:
                raise UnsupportedModelError("attention sinks are reserved and not supported yet")
            shape = (op.layer, op.heads, op.kv_heads, op.head_dim, op.k_offset, op.v_offset)
            built.attention(op.out, op.qkv, *shape, op.scale, op.window, op.softcap)
        case ops.Add():
            built.add(op.target, op.source)
        case ops.Glu():
            built.glu(op.out, op.source, op.activation)
        case ops.Activate():
            built.activate(op.out, op.source, op.activation)
        case ops.Head():
            built.head(op.source, op.weight, op.bias or "", op.scale, op.softcap)
        case _:
            name = type(op).__name__
            raise UnsupportedModelError(f"the plan holds an operation that is not supported: {name}")
