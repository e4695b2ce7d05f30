"""The reference executor: numpy, slow, obviously right. One function per operation of the plan.

Linear layers at the int points use the exact numpy twin, everything else plain float arithmetic, so its bits are not
those of the native executor outside linear int layers; agreement is tested as a distribution of errors. Knows nothing
about threads, phases or kernels.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from haomiao.errors import InputError, UnsupportedModelError
from haomiao.kernels import reference
from haomiao.kernels.pack import from_bf16, to_bf16, unpack
from haomiao.kernels.packed import PackedTensor
from haomiao.models import plan as ops
from haomiao.models.weights import check_weights
from haomiao.types import (
    F32,
    I32,
    KV_BLOCK_TOKENS,
    KV_SPLIT_TOKENS,
    POINTS,
    KvType,
    Planes,
    Point,
    StepBatch,
    StepResult,
)

F64 = npt.NDArray[np.float64]


class ReferenceExecutor:
    """Implements `types.Executor` in numpy.

    `tensors` and `vectors` are an artifact's, by the plan's weight names; `points` must be switchable (one family).
    K and V are stored as the values that the KV type can hold: float32 [kv_blocks, kv_heads, 32, head_dim] per layer.
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
    ) -> None:
        if plan.version != ops.PLAN_VERSION:
            raise UnsupportedModelError(f"a plan of version {plan.version} was given; {ops.PLAN_VERSION} is understood")
        self.plan = plan
        self.points = tuple(points)
        self.vocab_size = plan.vocab_size
        self.hidden_size = plan.hidden_size
        self.max_step_tokens = max_step_tokens
        self.kv_blocks = kv_blocks
        self.kv_type: KvType = kv_type or POINTS[self.points[0]].default_kv
        self.threads, self.isa = 1, "numpy"
        self._tensors, self._vectors = tensors, vectors
        self._unpacked: dict[tuple[str, str], F64] = {}
        check_weights(plan, tensors, vectors)
        shapes = [
            (kv_blocks, heads, KV_BLOCK_TOKENS, dim) for heads, dim in zip(plan.kv_heads, plan.head_dims, strict=True)
        ]
        self._k = [np.zeros(shape, np.float32) for shape in shapes]
        self._v = [np.zeros(shape, np.float32) for shape in shapes]
        self.kv_bytes_per_block = sum(2 * 4 * int(np.prod(shape[1:])) for shape in shapes)

    def step(self, batch: StepBatch) -> StepResult:
        """Compute one step, operation by operation."""
        began = time.monotonic_ns()
        check_batch(batch, self)
        run = _Step(self, batch)
        for op in self.plan.ops:
            run.apply(op)
        logits = run.logits
        argmax = np.where(np.isnan(logits), -np.inf, logits).argmax(axis=-1).astype(np.int32)
        return StepResult(logits, argmax, time.monotonic_ns() - began, run.hidden)

    def copy_blocks(self, pairs: I32) -> None:
        """Copy KV blocks of every layer: [n, 2] (from, to)."""
        pairs = np.asarray(pairs)
        if pairs.ndim != 2 or pairs.shape[1] != 2 or (pairs < 0).any() or (pairs >= self.kv_blocks).any():
            raise InputError(f"pairs must be [n, 2] block ids below {self.kv_blocks}")
        for source, target in pairs:
            for storage in (*self._k, *self._v):
                storage[target] = storage[source]

    def close(self) -> None:
        """Nothing to release."""

    # ---- weights ----------------------------------------------------------------------------------------------------

    def linear(self, name: str, x: F32, planes: Planes, bias: str | None, wide: bool = False) -> F32:
        """x Wᵀ (+ bias) by the rule of the weight's encoding and the point's planes. `wide`: codes meet activations of
        16 bits (`int4-w`)."""
        packed = self._tensors[name]
        offset = None if bias is None else self._vectors[bias]
        read: Literal["hi", "hi+lo"] = "hi" if planes == "hi" else "hi+lo"
        coded = packed.encoding in ("int8", "planes")
        if coded and not wide:
            return reference.linear(packed, x, read, bias=offset)
        rounded = from_bf16(to_bf16(x)) if coded or (planes == "bf16" and packed.encoding == "bf16") else x
        matrix = self._matrix(name, read)
        # row by row: what a token gets must not depend on how many others are in the step
        y = np.stack([matrix @ row for row in rounded.astype(np.float64)]).astype(np.float32)
        return y if offset is None else y + offset

    def rows(self, name: str, indices: I32) -> F32:
        """Rows of a table, all stored planes read."""
        found: F32 = self._matrix(name)[indices].astype(np.float32)
        return found

    def vector(self, name: str) -> F32:
        """A norm's weight or a bias."""
        vector: F32 = self._vectors[name]
        return vector

    def _matrix(self, name: str, planes: Literal["hi", "hi+lo"] = "hi+lo") -> F64:
        key = (name, planes)
        if key not in self._unpacked:
            self._unpacked[key] = unpack(self._tensors[name], planes).astype(np.float64)
        return self._unpacked[key]

    # ---- K and V ----------------------------------------------------------------------------------------------------

    def write_kv(self, layer: int, table: I32, position: int, k: F32, v: F32) -> None:
        """Store one token's k, v [kv_heads, head_dim], as the KV type can hold them."""
        block, slot = int(table[position // KV_BLOCK_TOKENS]), position % KV_BLOCK_TOKENS
        self._k[layer][block, :, slot] = as_stored(k, self.kv_type)
        self._v[layer][block, :, slot] = as_stored(v, self.kv_type)

    def read_kv(self, layer: int, table: I32, length: int) -> tuple[F32, F32]:
        """The first `length` tokens' K and V, [kv_heads, length, head_dim] each."""
        blocks = table[: -(-length // KV_BLOCK_TOKENS)]

        def gather(storage: F32) -> F32:
            chosen = storage[blocks].transpose(1, 0, 2, 3)
            return chosen.reshape(chosen.shape[0], -1, chosen.shape[3])[:, :length]

        return gather(self._k[layer]), gather(self._v[layer])


def as_stored(x: F32, kind: KvType) -> F32:
    """Values [..., head_dim] rounded to what the KV type keeps; int8 has one scale per token and head."""
    if kind == "f32":
        return x
    if kind == "bf16":
        return from_bf16(to_bf16(x))
    greatest = np.abs(x).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = np.float32(127) / greatest
        scale = np.where(np.isinf(inverse), np.float32(0), greatest / np.float32(127))
        codes = np.where(np.isinf(inverse), np.float32(0), np.rint(x * inverse))
        stored: F32 = (codes * scale).astype(np.float32)
    return stored


def check_batch(batch: StepBatch, executor: Any) -> None:
    """Refuse a batch that contradicts itself (`InputError`, one line)."""
    tokens = batch.tokens
    if batch.point not in executor.points:
        raise InputError(f"point {batch.point!r} is not one of {', '.join(executor.points)}", param="point")
    if not 1 <= tokens <= executor.max_step_tokens:
        raise InputError(f"a step of {tokens} tokens; 1 to {executor.max_step_tokens} are possible")
    if batch.token_ids.min() < 0 or batch.token_ids.max() >= executor.vocab_size:
        raise InputError(f"a token id is outside the vocabulary of {executor.vocab_size}", param="token_ids")
    starts = batch.span_starts
    if starts.size < 2 or starts[0] != 0 or starts[-1] != tokens or ((spans := starts[1:] - starts[:-1]) < 1).any():
        raise InputError("span_starts must ascend from 0 to the number of tokens")
    sequences = starts.size - 1
    if batch.past.shape != (sequences,) or batch.block_tables.shape[:1] != (sequences,) or batch.past.min() < 0:
        raise InputError("past and block_tables must have a row for every span")
    lengths, tables = batch.past.astype(np.int64) + spans, batch.block_tables
    longest = int(lengths.max())
    if longest > executor.plan.max_context:
        raise InputError(
            f"span {int(lengths.argmax())} reaches position {longest}, the context is {executor.plan.max_context}"
        )
    if not _cover(lengths, longest, tables, executor.kv_blocks):
        needed = -(-lengths // KV_BLOCK_TOKENS)
        used = np.arange(tables.shape[1]) < needed[:, None]
        wrong = (used & ((tables < 0) | (tables >= executor.kv_blocks))).any(axis=1) | (needed > tables.shape[1])
        if wrong.any():
            raise InputError(f"the block table of span {int(wrong.argmax())} does not cover its positions")
    for name, rows in (("logit_rows", batch.logit_rows), ("hidden_rows", batch.hidden_rows)):
        if rows is not None and rows.size and (rows.min() < 0 or rows.max() >= tokens or (np.diff(rows) < 1).any()):
            raise InputError(f"{name} must ascend within the step's tokens", param=name)
    if batch.copies is not None:
        check_copies(batch.copies, tokens, executor.kv_blocks)


def _cover(lengths: npt.NDArray[np.int64], longest: int, tables: I32, kv_blocks: int) -> bool:
    """True if the tables are plainly right: every sequence needs all columns, and all blocks exist. A look that costs
    little; False says nothing yet."""
    columns = -(-longest // KV_BLOCK_TOKENS)
    if columns > tables.shape[1] or int(lengths.min()) <= (columns - 1) * KV_BLOCK_TOKENS:
        return False
    used = tables[:, :columns]
    return bool(used.min() >= 0 and used.max() < kv_blocks)


def check_copies(copies: I32, tokens: int, kv_blocks: int) -> None:
    """Refuse copies of K and V that are not there."""
    if copies.ndim != 2 or copies.shape[1] != 2 or (np.diff(copies[:, 0]) < 0).any():
        raise InputError("copies must be [n, 2], ascending by token")
    if copies.size and not (
        0 <= copies[:, 0].min() <= copies[:, 0].max() < tokens
        and 0 <= copies[:, 1].min() <= copies[:, 1].max() < kv_blocks
    ):
        raise InputError("copies name tokens or KV blocks that are not there")


class _Step:
    """The buffers of one step."""

    def __init__(self, executor: ReferenceExecutor, batch: StepBatch) -> None:
        self.executor, self.batch = executor, batch
        self.point: Point = POINTS[batch.point]
        self.buffers: dict[str, F32] = {
            name: np.zeros((batch.tokens, width), np.float32) for name, width in executor.plan.buffers.items()
        }
        lengths = np.diff(batch.span_starts)
        self.positions = np.concatenate(
            [past + np.arange(n) for past, n in zip(batch.past, lengths, strict=True)]
        ).astype(np.int32)
        self.logits: F32 = np.zeros((0, executor.vocab_size), np.float32)
        self.hidden: F32 | None = None

    def apply(self, op: ops.Op) -> None:
        """Run one operation. An unknown one is refused by name."""
        name = type(op).__name__.lower()
        method = getattr(self, f"do_{name}", None)
        if method is None:
            raise UnsupportedModelError(f"the plan holds an operation that is not supported: {name}")
        method(op)

    def do_embed(self, op: ops.Embed) -> None:
        x = self.executor.rows(op.table, self.batch.token_ids) * np.float32(op.scale)
        if op.positions is not None:
            x = x + self.executor.rows(op.positions, self.positions)
        self.buffers[op.out] = x

    def do_norm(self, op: ops.Norm) -> None:
        x, weight = self.buffers[op.source], self.executor.vector(op.weight)
        if op.kind == "rms":
            y = rms_norm(x, op.eps) * weight
        else:
            centred = x - x.mean(axis=-1, keepdims=True, dtype=np.float64)
            variance = np.square(centred).mean(axis=-1, keepdims=True)
            y = centred / np.sqrt(variance + op.eps) * weight
            if op.bias is not None:
                y = y + self.executor.vector(op.bias)
        self.buffers[op.out] = y.astype(np.float32)

    def do_linear(self, op: ops.Linear) -> None:
        self.buffers[op.out] = self.executor.linear(
            op.weight, self.buffers[op.source], self.point.planes, op.bias, self.point.activations == "bf16"
        )

    def section(self, buffer: str, offset: int, heads: int, head_dim: int) -> F32:
        """A view [tokens, heads, head_dim] of a range of columns."""
        return self.buffers[buffer][:, offset : offset + heads * head_dim].reshape(-1, heads, head_dim)

    def store(self, buffer: str, offset: int, values: npt.NDArray[Any]) -> None:
        flat = values.reshape(values.shape[0], -1).astype(np.float32)
        self.buffers[buffer][:, offset : offset + flat.shape[1]] = flat

    def do_headnorm(self, op: ops.HeadNorm) -> None:
        x = self.section(op.buffer, op.offset, op.heads, op.head_dim)
        self.store(op.buffer, op.offset, rms_norm(x, op.eps) * self.executor.vector(op.weight))

    def do_rope(self, op: ops.Rope) -> None:
        spec = self.executor.plan.ropes[op.rope]
        x = self.section(op.buffer, op.offset, op.heads, op.head_dim)
        angles = self.positions[:, None].astype(np.float32) * np.array(spec.inv_freq, np.float32)
        factor = spec.attention_factor
        cos = (np.cos(angles.astype(np.float64)) * factor).astype(np.float32)[:, None, :]
        sin = (np.sin(angles.astype(np.float64)) * factor).astype(np.float32)[:, None, :]
        half = spec.dim // 2
        first, second, rest = x[..., :half], x[..., half : spec.dim], x[..., spec.dim :]
        rotated = np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
        self.store(op.buffer, op.offset, rotated)

    def do_attention(self, op: ops.Attention) -> None:
        if op.sinks is not None:
            raise UnsupportedModelError("attention sinks are not supported")
        q = self.section(op.qkv, 0, op.heads, op.head_dim)
        k = self.section(op.qkv, op.k_offset, op.kv_heads, op.head_dim)
        v = self.section(op.qkv, op.v_offset, op.kv_heads, op.head_dim)
        out = np.zeros((self.batch.tokens, op.heads * op.head_dim), np.float32)
        spans = []
        for span in range(self.batch.past.size):
            table = self.batch.block_tables[span]
            tokens = range(int(self.batch.span_starts[span]), int(self.batch.span_starts[span + 1]))
            spans.append((table, tokens))
            for t in tokens:
                self.executor.write_kv(op.layer, table, int(self.positions[t]), k[t], v[t])
        for t, block in () if self.batch.copies is None else self.batch.copies:
            anywhere = np.full(int(self.positions[t]) // KV_BLOCK_TOKENS + 1, block, np.int32)
            self.executor.write_kv(op.layer, anywhere, int(self.positions[t]), k[t], v[t])
        for table, tokens in spans:
            for t in tokens:
                keys, values = self.executor.read_kv(op.layer, table, int(self.positions[t]) + 1)
                out[t] = attend(op, q[t], keys, values, self.executor.kv_type).reshape(-1)
        self.buffers[op.out] = out

    def do_add(self, op: ops.Add) -> None:
        self.buffers[op.target] = self.buffers[op.target] + self.buffers[op.source]

    def do_glu(self, op: ops.Glu) -> None:
        pairs = self.buffers[op.source].reshape(self.batch.tokens, -1, 2, 32)
        gate, up = pairs[:, :, 0], pairs[:, :, 1]
        self.buffers[op.out] = (activate(gate, op.activation) * up).reshape(self.batch.tokens, -1).astype(np.float32)

    def do_activate(self, op: ops.Activate) -> None:
        self.buffers[op.out] = activate(self.buffers[op.source], op.activation).astype(np.float32)

    def do_head(self, op: ops.Head) -> None:
        if self.batch.hidden_rows is not None:
            self.hidden = self.buffers[op.source][self.batch.hidden_rows]
        rows = self.buffers[op.source][self.batch.logit_rows]
        if rows.shape[0] == 0:
            return
        wide = self.point.activations == "bf16"
        logits = self.executor.linear(op.weight, rows, self.point.head, op.bias, wide) * np.float32(op.scale)
        self.logits = softcapped(logits, op.softcap).astype(np.float32)


def rms_norm(x: F32, eps: float) -> F64:
    """x / sqrt(mean(x^2) + eps) over the last axis."""
    wide = x.astype(np.float64)
    result: F64 = wide / np.sqrt(np.square(wide).mean(axis=-1, keepdims=True) + eps)
    return result


def softcapped(x: npt.NDArray[Any], cap: float) -> npt.NDArray[Any]:
    """cap * tanh(x / cap); cap 0 leaves x alone."""
    return x if cap == 0 else cap * np.tanh(x / cap)


def attend(op: ops.Attention, q: F32, keys: F32, values: F32, kind: KvType) -> F64:
    """One query token's attention: q [heads, head_dim] over K, V [kv_heads, positions, head_dim], all visible."""
    per_kv = op.heads // op.kv_heads
    asked = q.reshape(op.kv_heads, per_kv, op.head_dim) * np.float32(op.scale)
    if kind == "int8":  # codes of 16 bits meet those of 8
        asked = asked - rounding(asked)
    scores = softcapped(asked.astype(np.float64) @ keys.transpose(0, 2, 1).astype(np.float64), op.softcap)
    if op.window and keys.shape[1] > op.window:
        scores[:, :, : keys.shape[1] - op.window] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    wide = values.astype(np.float64)
    result: F64 = weights @ wide
    if kind == "int8":
        greatest = np.abs(values).max(axis=-1)[:, None, :]  # 127 times a value's scale
        for start in range(0, keys.shape[1], KV_SPLIT_TOKENS):
            split = slice(start, start + KV_SPLIT_TOKENS)
            lost = rounding((weights[:, :, split] * greatest[:, :, split]).astype(np.float32)).astype(np.float64)
            shares = np.divide(lost, greatest[:, :, split], out=np.zeros_like(lost), where=greatest[:, :, split] > 0)
            result -= shares @ wide[:, split]
    return np.asarray(result / weights.sum(axis=-1, keepdims=True), np.float64)


def rounding(x: F32) -> F32:
    """What is lost where rows [..., n] become codes of 16 bits, one scale max|x| / 16383 per row."""
    greatest = np.abs(x).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        factor = np.float32(16383) / greatest
        codes = np.where(np.isfinite(factor), np.rint(x * factor), np.float32(0))
        lost: F32 = np.where(np.isfinite(factor), x - codes * (greatest / np.float32(16383)), x).astype(np.float32)
    return lost


def activate(x: F32, name: ops.Activation) -> F64:
    """The activation functions, in float64."""
    wide = x.astype(np.float64)
    if name == "silu":
        result = wide / (1 + np.exp(-np.clip(wide, -700, None)))
    elif name == "gelu":
        from math import erf

        result = 0.5 * wide * (1 + np.vectorize(erf)(wide / np.sqrt(2)))
    elif name == "gelu_tanh":
        result = 0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
    else:
        result = np.maximum(wide, 0)
    return np.asarray(result, np.float64)
