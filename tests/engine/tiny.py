"""Small random decoders written directly as plans, for tests of executors: no checkpoint, no family."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from haomiao.engine.executors.native import NativeExecutor
from haomiao.kernels import pack, rtn
from haomiao.kernels.packed import PackedTensor
from haomiao.models import plan as ops
from haomiao.types import F32, I32, KV_BLOCK_TOKENS, Executor, StepBatch

Storage = Literal["f32", "bf16", "planes", "int8"]
STORED_AS: dict[str, Storage] = {"full": "f32", "bf16": "bf16", "int8": "planes", "int4": "planes"}


@dataclass(frozen=True)
class Shape:
    """What varies between tiny models."""

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    neurons: int = 96
    vocab: int = 100
    window: int = 0
    softcap: float = 0.0
    qk_norm: bool = False
    bias: bool = False
    post_norm: bool = False
    rope: bool = True
    glu: bool = True
    norm: Literal["rms", "layer"] = "rms"
    positions: bool = False
    context: int = 4096


@dataclass
class Model:
    """A plan and its weights."""

    plan: ops.Plan
    tensors: dict[str, PackedTensor]
    vectors: dict[str, F32]


@dataclass
class _Builder:
    shape: Shape
    storage: Storage
    rng: np.random.Generator
    ops: list[ops.Op] = field(default_factory=list)
    buffers: dict[str, int] = field(default_factory=dict)
    weights: dict[str, ops.WeightSpec] = field(default_factory=dict)
    tensors: dict[str, PackedTensor] = field(default_factory=dict)
    vectors: dict[str, F32] = field(default_factory=dict)

    def matrix(self, name: str, rows: int, cols: int, storage: Storage | None = None) -> str:
        values = (self.rng.normal(size=(rows, cols)) / np.sqrt(cols)).astype(np.float32)
        self.tensors[name] = store(values, storage or self.storage)
        self.weights[name] = ops.WeightSpec(name, "matrix", rows, cols, (name,))
        return name

    def vector(self, name: str, size: int, centre: float = 0.0) -> str:
        self.vectors[name] = self.rng.normal(centre, 0.2, size).astype(np.float32)
        self.weights[name] = ops.WeightSpec(name, "vector", size, 1, (name,))
        return name

    def buffer(self, name: str, width: int) -> str:
        self.buffers[name] = width
        return name

    def norm(self, name: str, source: str, out: str) -> None:
        bias = self.vector(f"{name}.bias", self.shape.hidden) if self.shape.norm == "layer" else None
        weight = self.vector(name, self.shape.hidden, 1.0)
        self.ops.append(ops.Norm(self.buffer(out, self.shape.hidden), source, weight, 1e-5, self.shape.norm, bias))

    def linear(self, name: str, source: str, out: str, rows: int) -> None:
        bias = self.vector(f"{name}.bias", rows) if self.shape.bias else None
        matrix = self.matrix(name, rows, self.buffers[source])
        self.ops.append(ops.Linear(self.buffer(out, rows), source, matrix, bias))

    def layer(self, index: int) -> None:
        s = self.shape
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        self.norm(f"{index}.norm", "x", "h")
        self.linear(f"{index}.qkv", "h", "qkv", q + 2 * kv)
        for offset, heads, name in ((0, s.heads, "q"), (q, s.kv_heads, "k")):
            if s.qk_norm:
                weight = self.vector(f"{index}.{name}_norm", s.head_dim, 1.0)
                self.ops.append(ops.HeadNorm("qkv", offset, heads, s.head_dim, weight, 1e-5))
            if s.rope:
                self.ops.append(ops.Rope("qkv", offset, heads, s.head_dim, 0))
        out, window = self.buffer("attention", q), s.window if index % 2 == 0 else 0
        scale = s.head_dim**-0.5
        self.ops.append(
            ops.Attention(
                out, "qkv", index, s.heads, s.kv_heads, s.head_dim, q, q + kv, scale, window, softcap=s.softcap
            )
        )
        self.join(f"{index}.out", "attention")
        self.norm(f"{index}.ffn_norm", "x", "h")
        if s.glu:
            self.linear(f"{index}.gate_up", "h", "wide", 2 * s.neurons)
            self.ops.append(ops.Glu(self.buffer("ffn", s.neurons), "wide", "silu"))
        else:
            self.linear(f"{index}.up", "h", "wide", s.neurons)
            self.ops.append(ops.Activate(self.buffer("ffn", s.neurons), "wide", "gelu_tanh"))
        self.join(f"{index}.down", "ffn")

    def join(self, name: str, source: str) -> None:
        self.linear(name, source, "y", self.shape.hidden)
        if self.shape.post_norm:
            self.norm(f"{name}.post_norm", "y", "z")
        self.ops.append(ops.Add("x", "z" if self.shape.post_norm else "y"))


def store(values: F32, storage: Storage) -> PackedTensor:
    """A matrix in one of the encodings."""
    if storage == "f32":
        return pack.pack_f32(values)
    if storage == "bf16":
        return pack.pack_bf16(values)
    return rtn.quantize_int8(values) if storage == "int8" else rtn.quantize_planes(values)


def make_model(shape: Shape, storage: Storage, seed: int = 0) -> Model:
    """A random decoder."""
    b = _Builder(shape, storage, np.random.default_rng(seed))
    table = b.matrix("embed", shape.vocab, shape.hidden)
    positions = b.matrix("positions", shape.context, shape.hidden) if shape.positions else None
    b.ops.append(ops.Embed(b.buffer("x", shape.hidden), table, 3.0, positions))
    for index in range(shape.layers):
        b.layer(index)
    b.norm("final", "x", "h")
    b.ops.append(ops.Head("h", table, None, 1.5, 4.0 if shape.softcap else 0.0))
    half = shape.head_dim // 2
    inv_freq = tuple(float(np.float32(100.0 ** (-i / half))) for i in range(half))
    plan = ops.Plan(
        version=ops.PLAN_VERSION,
        family="tiny",
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        layers=shape.layers,
        kv_heads=(shape.kv_heads,) * shape.layers,
        head_dims=(shape.head_dim,) * shape.layers,
        windows=tuple(shape.window if i % 2 == 0 else 0 for i in range(shape.layers)),
        max_context=shape.context,
        buffers=b.buffers,
        ops=tuple(b.ops),
        weights=b.weights,
        ropes=(ops.RopeSpec(2 * half, inv_freq),),
    )
    return Model(plan, b.tensors, b.vectors)


@dataclass
class Span:
    """Some tokens of one sequence in a step."""

    tokens: I32
    past: int
    blocks: I32


def make_batch(spans: list[Span], point: str, rows: Any = None) -> StepBatch:
    """A step over spans; logits of every token unless `rows` says which."""
    lengths = [len(s.tokens) for s in spans]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tables = np.full((len(spans), max(len(s.blocks) for s in spans)), -1, np.int32)
    for row, span in zip(tables, spans, strict=True):
        row[: len(span.blocks)] = span.blocks
    wanted = np.arange(starts[-1]) if rows is None else np.asarray(rows)
    return StepBatch(
        np.concatenate([s.tokens for s in spans]).astype(np.int32),
        starts,
        np.array([s.past for s in spans], np.int32),
        tables,
        wanted.astype(np.int32),
        point,
    )


def blocks_for(tokens: int, first: int = 0) -> I32:
    """A block table for so many tokens, block ids in descending order."""
    return np.arange(first, first + -(-tokens // KV_BLOCK_TOKENS), dtype=np.int32)[::-1].copy()


def run_alone(executor: Executor, tokens: I32, point: str, cuts: tuple[int, ...] = (), first_block: int = 0) -> F32:
    """Logits of every token of one sequence, prefilled in the chunks between `cuts`."""
    blocks, parts = blocks_for(len(tokens), first_block), []
    edges = [0, *sorted({c for c in cuts if 0 < c < len(tokens)}), len(tokens)]
    for begin, end in pairwise(edges):
        result = executor.step(make_batch([Span(tokens[begin:end], begin, blocks)], point))
        parts.append(result.logits.copy())
    return np.concatenate(parts)


def run_in_company(
    executor: Executor, tokens: I32, point: str, cuts: list[int], others: list[I32], most: int = 256
) -> F32:
    """As `run_alone`, each chunk between chunks of others, whose blocks begin at 20."""
    theirs = [(each, blocks_for(len(each), 20 + 4 * i)) for i, each in enumerate(others)]
    edges = [0, *sorted({c for c in cuts if 0 < c < len(tokens)}), len(tokens)]
    steps, parts = len(edges) - 1, []
    for step, (begin, end) in enumerate(pairwise(edges)):
        spans, place = [], 0
        for i, (each, blocks) in enumerate(theirs):
            first, last = len(each) * step // steps, len(each) * (step + 1) // steps
            if first < last and sum(len(s.tokens) for s in spans) + last - first + end - begin <= most:
                spans.append(Span(each[first:last], first, blocks))
                place += 1 if i % 2 == 0 else 0
        place = min(place, len(spans))
        spans.insert(place, Span(tokens[begin:end], begin, blocks_for(len(tokens))))
        start = sum(len(s.tokens) for s in spans[:place])
        result = executor.step(make_batch(spans, point))
        parts.append(result.logits[start : start + end - begin].copy())
    return np.concatenate(parts)


KV = ("f32", "bf16", "int8")
SHAPES = {
    "llama": Shape(),
    "qwen3": Shape(qk_norm=True, heads=6, kv_heads=2, head_dim=16),
    "gemma": Shape(post_norm=True, softcap=6.0, window=40, head_dim=64, heads=2, kv_heads=1),
    "gpt2": Shape(norm="layer", bias=True, glu=False, rope=False, positions=True, kv_heads=4, neurons=80),
    "odd": Shape(hidden=72, heads=3, kv_heads=3, head_dim=24, vocab=77, bias=True),
}


def native(model: Model, *points: str, **options: Any) -> NativeExecutor:
    settings: dict[str, Any] = {"kv_blocks": 64, "max_step_tokens": 256, "threads": 2, "pin": False, **options}
    return NativeExecutor(model.plan, model.tensors, model.vectors, points=points, **settings)


def tokens_of(n: int, seed: int = 0, vocab: int = 77) -> Any:
    return np.random.default_rng(seed).integers(0, vocab, n).astype(np.int32)


def assert_same_bits(a: Any, b: Any) -> None:
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))
