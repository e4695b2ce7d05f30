"""Where the time of a step goes, by phase, on models of real shape with random weights.

    python benchmarks/step.py [--model 0.5b|1b] [--point int4] [--kv bf16] [--threads 2] [--context 512] [--streams 1]

Prints the ceilings first, then a decode step (one token for each stream at `--context`) and a prefill step of
`--prefill` tokens: the time of each kind of phase, bytes read and their rate. The last line is one JSON object. Random
weights serve for speed only.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from haomiao import _core
from haomiao.engine.executors.native import NativeExecutor
from haomiao.kernels.packed import TILE_ROWS, PackedTensor, tile_bytes
from haomiao.models.plan import (
    PLAN_VERSION,
    Add,
    Attention,
    Embed,
    Glu,
    Head,
    Linear,
    Norm,
    Op,
    Plan,
    Rope,
    RopeSpec,
    WeightSpec,
)
from haomiao.types import KV_BLOCK_TOKENS, POINTS, StepBatch

GROUP = 32


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    bias: bool


SHAPES = {
    "0.5b": Shape(24, 896, 4864, 14, 2, 64, 151936, True),  # Qwen2.5-0.5B
    "1b": Shape(16, 2048, 8192, 32, 8, 64, 128256, False),  # Llama-3.2-1B
}


def random_matrix(rows: int, cols: int, rng: np.random.Generator) -> PackedTensor:
    """Nested planes of random codes; the scale makes y about as great as x."""
    padded = -(-cols // GROUP) * GROUP
    tiles = -(-rows // TILE_ROWS)
    hi_bytes, lo_bytes = tile_bytes("planes", padded, GROUP)
    hi = rng.integers(0, 256, (tiles, padded // GROUP, hi_bytes * GROUP // padded), np.uint8)
    hi[:, :, : 2 * TILE_ROWS] = np.full(TILE_ROWS, 0.2 / np.sqrt(cols), np.float16).view(np.uint8)
    lo = rng.integers(0, 256, tiles * lo_bytes, np.uint8)
    return PackedTensor("planes", rows, cols, GROUP, 4, hi.reshape(-1), lo)


class Model:
    """A Llama-like plan with random weights."""

    def __init__(self, shape: Shape, context: int) -> None:
        rng = np.random.default_rng(0)
        self.tensors: dict[str, PackedTensor] = {}
        self.vectors: dict[str, Any] = {}
        weights: dict[str, WeightSpec] = {}
        list_: list[Op] = []

        def matrix(name: str, rows: int, cols: int) -> str:
            self.tensors[name] = random_matrix(rows, cols, rng)
            weights[name] = WeightSpec(name, "matrix", rows, cols, ())
            return name

        def vector(name: str, size: int, value: float) -> str:
            self.vectors[name] = np.full(size, value, np.float32)
            weights[name] = WeightSpec(name, "vector", size, 1, ())
            return name

        s = shape
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        table = matrix("embed", s.vocab, s.hidden)
        list_.append(Embed("x", table))
        for i in range(s.layers):
            list_.append(Norm("h", "x", vector(f"{i}.norm", s.hidden, 1.0), 1e-6))
            bias = vector(f"{i}.bias", q + 2 * kv, 0.01) if s.bias else None
            list_.append(Linear("qkv", "h", matrix(f"{i}.qkv", q + 2 * kv, s.hidden), bias))
            list_ += [Rope("qkv", 0, s.heads, s.head_dim, 0), Rope("qkv", q, s.kv_heads, s.head_dim, 0)]
            list_.append(Attention("a", "qkv", i, s.heads, s.kv_heads, s.head_dim, q, q + kv, s.head_dim**-0.5))
            list_ += [Linear("y", "a", matrix(f"{i}.out", s.hidden, q)), Add("x", "y")]
            list_.append(Norm("h", "x", vector(f"{i}.norm2", s.hidden, 1.0), 1e-6))
            list_ += [Linear("w", "h", matrix(f"{i}.gate_up", 2 * s.ffn, s.hidden)), Glu("f", "w", "silu")]
            list_ += [Linear("y", "f", matrix(f"{i}.down", s.hidden, s.ffn)), Add("x", "y")]
        list_ += [Norm("h", "x", vector("final", s.hidden, 1.0), 1e-6), Head("h", table)]
        buffers = {"x": s.hidden, "h": s.hidden, "qkv": q + 2 * kv, "a": q, "y": s.hidden, "w": 2 * s.ffn, "f": s.ffn}
        inv_freq = tuple(float(np.float32(1e6 ** (-2 * i / s.head_dim))) for i in range(s.head_dim // 2))
        self.plan = Plan(
            version=PLAN_VERSION,
            family="random",
            vocab_size=s.vocab,
            hidden_size=s.hidden,
            layers=s.layers,
            kv_heads=(s.kv_heads,) * s.layers,
            head_dims=(s.head_dim,) * s.layers,
            windows=(0,) * s.layers,
            max_context=context,
            buffers=buffers,
            ops=tuple(list_),
            weights=weights,
            ropes=(RopeSpec(s.head_dim, inv_freq),),
        )

    def bytes_read(self, point: str) -> int:
        """Weight bytes of one step at a point, one row of logits."""
        body, head = POINTS[point].planes, POINTS[point].head
        total = 0
        for name, t in self.tensors.items():
            planes = head if name == "embed" else body
            total += int(t.hi.nbytes) + (int(t.lo.nbytes) if t.lo is not None and planes == "hi+lo" else 0)
        return total


def batch(streams: int, tokens: int, past: int, blocks: int, point: str, rng: np.random.Generator) -> StepBatch:
    """`tokens` tokens of each stream at `past`; logits of the last of each."""
    starts = np.arange(streams + 1, dtype=np.int32) * tokens
    tables = np.arange(streams * blocks, dtype=np.int32).reshape(streams, blocks)
    ids = rng.integers(0, 1000, streams * tokens).astype(np.int32)
    return StepBatch(ids, starts, np.full(streams, past, np.int32), tables, starts[1:] - 1, point)


def measure(executor: NativeExecutor, work: StepBatch, repeat: int) -> tuple[float, float, dict[str, float]]:
    """(median, best) milliseconds of a step, and milliseconds by kind of phase: each phase's best, added up, for other
    work on the machine makes phases slower and never faster."""
    executor.step(work)
    times = [executor.step(work).elapsed_ns / 1e6 for _ in range(repeat)]
    executor.profile(True)
    best: dict[int, tuple[str, float]] = {}
    for _ in range(repeat):
        executor.step(work)
        for index, (name, ns) in enumerate(executor.last_step_profile()):
            best[index] = (name, min(ns / 1e6, best.get(index, (name, 1e9))[1]))
    executor.profile(False)
    kinds: dict[str, float] = defaultdict(float)
    for name, ms in best.values():
        left, _, right = name.partition(".")
        kinds[left if left == "attention" or not right else right] += ms
    return statistics.median(times), min(times), dict(kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="0.5b")
    parser.add_argument("--point", choices=("int4", "int8"), default="int4")
    parser.add_argument("--kv", choices=("f32", "bf16", "int8"), default="bf16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--isa")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=20)
    args = parser.parse_args()
    shape, rng = SHAPES[args.model], np.random.default_rng(1)
    blocks = -(-(max(args.context, args.prefill) + 1) // KV_BLOCK_TOKENS)
    model = Model(shape, blocks * KV_BLOCK_TOKENS)
    executor = NativeExecutor(
        model.plan,
        model.tensors,
        model.vectors,
        points=("int8", "int4"),
        kv_type=args.kv,
        kv_blocks=max(1, args.streams) * blocks,
        max_step_tokens=max(args.prefill, args.streams, 512),
        threads=args.threads,
        isa=args.isa,
    )
    bandwidth = _core.read_bandwidth(executor.threads, 512, 0.5)
    peak = _core.int8_peak(executor.threads, 0.2)
    print(f"{executor.isa}, {executor.threads} threads: read {bandwidth:.1f} GB/s, int8 peak {peak:.0f} GOPS")
    for begin in range(0, args.context, 512):  # K and V of the context, so that no block is untouched
        for stream in range(args.streams):
            n = min(512, args.context - begin)
            part = batch(1, n, begin, blocks, args.point, rng)
            part.block_tables = part.block_tables + stream * blocks
            part.logit_rows = part.logit_rows[:0]
            executor.step(part)

    found: dict[str, Any] = {"model": args.model, "point": args.point, "threads": executor.threads}
    median, best, kinds = measure(executor, batch(args.streams, 1, args.context, blocks, args.point, rng), args.repeat)
    read = model.bytes_read(args.point)
    kv = executor.kv_bytes_per_block * args.context // KV_BLOCK_TOKENS * args.streams
    rate = (read + kv) / median / 1e6
    print(
        f"decode, {args.streams} stream(s) at {args.context}: {median:.2f} ms (best {best:.2f}), "
        f"{args.streams * 1e3 / median:.1f} tok/s, {read / 1e6:.0f} MB weights + {kv / 1e6:.0f} MB KV, "
        f"{rate:.1f} GB/s = {rate / bandwidth:.0%} of the bandwidth"
    )
    print("   ", ", ".join(f"{kind} {ms:.2f}" for kind, ms in kinds.items()), f"(sum {sum(kinds.values()):.2f})")
    found["decode"] = {"ms": median, "best_ms": best, "gb_s": rate, "phases": kinds}
    if args.prefill:
        median, best, kinds = measure(
            executor, batch(1, args.prefill, 0, blocks, args.point, rng), max(3, args.repeat // 5)
        )
        operations = 2 * args.prefill * sum(t.rows * t.cols for n, t in model.tensors.items() if n != "embed")
        linear = sum(ms for kind, ms in kinds.items() if kind in ("qkv", "out", "gate_up", "down"))
        gops = operations / linear / 1e6
        print(
            f"prefill of {args.prefill}: {median:.1f} ms (best {best:.1f}), {args.prefill * 1e3 / median:.0f} tok/s, "
            f"linear layers {gops:.0f} GOPS = {gops / peak:.0%} of the peak"
        )
        print("   ", ", ".join(f"{kind} {ms:.2f}" for kind, ms in kinds.items()), f"(sum {sum(kinds.values()):.2f})")
        found["prefill"] = {"ms": median, "best_ms": best, "gops": gops, "phases": kinds}
    found |= {"read_gb_s": bandwidth, "int8_peak_gops": peak}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
