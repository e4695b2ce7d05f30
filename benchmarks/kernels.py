"""How fast the linear kernels run, against what the machine can do at most.

    python benchmarks/kernels.py [--isa avx512] [--threads 2] [--cols 896]

Prints the ceilings first (streaming read, 8-bit dot products on registers), then each kernel: few tokens as GB/s of
weights read and share of the read bandwidth, many tokens as GOPS and share of the peak. The last line is one JSON
object. The weights are greater than any cache; the best and the median of the passes are shown, for other work on the
machine makes passes slower and never faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from haomiao import _core
from haomiao.kernels import isa as instruction_sets
from haomiao.kernels.native import weight_of
from haomiao.kernels.packed import TILE_ROWS, Encoding, PackedTensor, padded_columns, tile_bytes

KERNELS: tuple[tuple[str, Encoding, bool, str], ...] = (
    # name, encoding, both planes, activations
    ("int4", "planes", False, "int8"),
    ("int8", "planes", True, "int8"),
    ("int8 bytes", "int8", False, "int8"),
    ("bf16", "bf16", False, "bf16"),
    ("bf16 full", "bf16", False, "f32"),
    ("f32 full", "f32", False, "f32"),
)


def aligned(size: int, unit: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """`size` bytes at a 64-byte boundary, filled with repetitions of `unit`."""
    raw = np.empty(size + 64, np.uint8)
    out = raw[-raw.ctypes.data % 64 :][:size]
    for begin in range(0, size, unit.size):
        out[begin : begin + unit.size] = unit[: size - begin]
    return out


def random_matrix(encoding: Encoding, rows: int, cols: int, group: int, both: bool) -> PackedTensor:
    """A matrix of random codes and harmless scales, without the cost of quantizing one."""
    random = np.random.default_rng(1)
    scaled = encoding in ("int8", "planes")
    group = group if scaled else 0
    padded = padded_columns(encoding, cols, group)
    hi_bytes, lo_bytes = tile_bytes(encoding, padded, group)
    tiles = -(-rows // TILE_ROWS)
    if scaled:
        unit = random.integers(0, 256, 1 << 20, np.uint8)
    else:
        halves = random.standard_normal(1 << 18).astype(np.float32).view(np.uint16)
        unit = np.ascontiguousarray(halves[1::2] if encoding == "bf16" else halves).view(np.uint8)
    hi = aligned(tiles * hi_bytes, unit)
    if scaled:
        hi.reshape(tiles, padded // group, -1)[:, :, :64] = np.full(TILE_ROWS, 0.01, np.float16).view(np.uint8)
    lo = aligned(tiles * lo_bytes, unit) if both else None
    return PackedTensor(encoding, rows, cols, group, 4 if both else 0, hi, lo)


class Team:
    """Threads pinned to one core each; `run` gives every thread its index and returns the seconds of the slowest."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.job: Callable[[int], None] | None = None
        self.gate = threading.Barrier(threads + 1)
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        for index in range(threads):
            core = cores[index % len(cores)] if cores else None
            threading.Thread(target=self._work, args=(index, core), daemon=True).start()

    def _work(self, index: int, core: int | None) -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})
        while True:
            self.gate.wait()
            if self.job is None:
                return
            self.job(index)
            self.gate.wait()

    def run(self, job: Callable[[int], None]) -> float:
        self.job = job
        start = time.perf_counter()
        self.gate.wait()
        self.gate.wait()
        return time.perf_counter() - start

    def close(self) -> None:
        self.job = None
        self.gate.wait()


def passes(
    team: Team, isa: str, packed: PackedTensor, both: bool, activation: str, tokens: int, seconds: float
) -> list[float]:
    """Seconds of each pass over the whole matrix, activations prepared beforehand."""
    weight = weight_of(packed)
    x = np.random.default_rng(3).standard_normal((tokens, packed.cols)).astype(np.float32)
    prepared = _core.prepare(isa, activation, x, packed.padded_cols)
    out = np.empty((tokens, packed.rows), np.float32)

    def job(index: int) -> None:
        begin, end = (packed.tiles * k // team.threads for k in (index, index + 1))
        _core.linear(isa, weight, both, activation, prepared, out, None, begin, end)

    team.run(job)
    times = []
    limit = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < limit:
        times.append(team.run(job))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="linear kernels against the machine's ceilings")
    parser.add_argument("--isa", default=instruction_sets.selected(), choices=instruction_sets.available())
    parser.add_argument("--threads", type=int, default=len(instruction_sets.allowed_cores()))
    parser.add_argument("--cols", type=int, default=896)
    parser.add_argument("--group", type=int, default=32, choices=(32, 64, 128))
    parser.add_argument("--megabytes", type=int, default=160, help="weights read by one pass over few tokens")
    parser.add_argument("--kernels", default="", help="comma-separated names; default all")
    parser.add_argument("--tokens", default="1,2,3,4,5,6,8")
    parser.add_argument("--prefill", default="128,512")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each measurement")
    arguments = parser.parse_args()
    wanted = [k.strip() for k in arguments.kernels.split(",") if k.strip()]

    bandwidth = _core.read_bandwidth(arguments.threads, arguments.megabytes, 0.5)
    peak = _core.int8_peak(arguments.threads, 0.3)
    print(f"{arguments.threads} threads: streaming read {bandwidth:.1f} GB/s, int8 peak {peak:.0f} GOPS")
    print(f"{arguments.isa}, {arguments.cols} columns, group {arguments.group}")
    print("kernel       tokens  best ms   median    GB/s of read    GOPS of peak")

    team = Team(arguments.threads)
    results = []
    for name, encoding, both, activation in KERNELS:
        if wanted and name not in wanted:
            continue
        hi_bytes, lo_bytes = tile_bytes(
            encoding, padded_columns(encoding, arguments.cols, arguments.group), arguments.group
        )
        tile = hi_bytes + (lo_bytes if both else 0)
        few = [int(t) for t in arguments.tokens.split(",") if t]
        many = [int(t) for t in arguments.prefill.split(",") if t]
        for counts, megabytes in ((few, arguments.megabytes), (many, 4)):
            if not counts:
                continue
            rows = max(1, megabytes * 1_000_000 // tile) * TILE_ROWS
            packed = random_matrix(encoding, rows, arguments.cols, arguments.group, both)
            for tokens in counts:
                times = passes(team, arguments.isa, packed, both, activation, tokens, arguments.seconds)
                best, median = min(times), statistics.median(times)
                read = packed.tiles * tile / best * 1e-9
                gops = 2.0 * rows * arguments.cols * tokens / best * 1e-9
                figures = {
                    "kernel": name,
                    "tokens": tokens,
                    "best_ms": best * 1e3,
                    "median_ms": median * 1e3,
                    "gb_s": read,
                    "share_of_read": read / bandwidth,
                    "gops": gops,
                    "share_of_peak": gops / peak,
                }
                results.append(figures)
                print(
                    f"{name:12} {tokens:6} {best * 1e3:8.3f} {median * 1e3:8.3f} {read:7.1f} {read / bandwidth:7.2f} "
                    f"{gops:7.0f} {gops / peak:7.2f}"
                )
    team.close()
    summary = {
        "isa": arguments.isa,
        "threads": arguments.threads,
        "cols": arguments.cols,
        "group": arguments.group,
        "read_gb_s": bandwidth,
        "int8_peak_gops": peak,
        "kernels": results,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
