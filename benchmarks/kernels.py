"""How fast the linear kernels run, against what the machine can do at most.

    python benchmarks/kernels.py [--isa avx512] [--threads 1,2] [--cols 896,2048] [--save]

Prints the ceilings first (streaming read, 8-bit dot products and f32 multiply-adds on registers), then each kernel
beside its own: no pass can be faster than reading the weights once, nor than its arithmetic at the peak; the greater of
the two is the limit. Ceilings and kernels are measured in turns, in rounds, so that a minute in which neighbours are
busy slows both. Shown are best, median and 90th percentile of the passes, and limit / best and limit / median. With
`--tiles 1.0,0.7,0.5` also under random tile masks that store that share of the blocks of 32 rows x `group` columns,
each beside the whole matrix. The last line is one JSON object; `--save` writes it to benchmarks/results too
(kernels-<isa>.json or NAME.json). The weights of a pass over a few tokens should exceed the last-level cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from haomiao import _core
from haomiao.kernels import isa as instruction_sets
from haomiao.kernels.native import weight_of
from haomiao.kernels.packed import TILE_ROWS, Encoding, PackedTensor, pack_mask, padded_columns, tile_bytes
from haomiao.measure.machine import describe_machine

RESULTS = Path(__file__).resolve().parent / "results"

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


def under_mask(packed: PackedTensor, share: float) -> PackedTensor:
    """The same matrix with a random `share` of its blocks; itself where all are kept or the encoding has no masks."""
    count = packed.tiles * packed.groups
    if share >= 1 or count == 0:
        return packed
    stored = np.zeros(count, np.bool_)
    stored[np.random.default_rng(2).permutation(count)[: max(1, round(count * share))]] = True

    def cut(plane: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        kept = plane.reshape(count, -1)[stored].reshape(-1)
        return aligned(kept.size, kept)

    mask = pack_mask(stored.reshape(packed.tiles, packed.groups))
    return replace(packed, hi=cut(packed.hi), lo=None if packed.lo is None else cut(packed.lo), kept=mask)


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


class Work:
    """One kernel over a whole matrix for some tokens, activations prepared beforehand."""

    def __init__(self, team: Team, isa: str, packed: PackedTensor, both: bool, activation: str, tokens: int) -> None:
        weight = weight_of(packed)
        x = np.random.default_rng(3).standard_normal((tokens, packed.cols)).astype(np.float32)
        prepared = _core.prepare(isa, activation, x, packed.padded_cols)
        out = np.empty((tokens, packed.rows), np.float32)

        def job(index: int) -> None:
            begin, end = (packed.tiles * k // team.threads for k in (index, index + 1))
            _core.linear(isa, weight, both, activation, prepared, out, None, begin, end)

        self.team, self.job, self.tokens, self.packed = team, job, tokens, packed
        self.operations = 2.0 * packed.rows * packed.cols * packed.share * tokens
        self.times: list[float] = []
        team.run(job)

    def run(self, seconds: float) -> None:
        """Passes for about that long, three at least."""
        limit = time.perf_counter() + seconds
        count = 0
        while count < 3 or time.perf_counter() < limit:
            self.times.append(self.team.run(self.job))
            count += 1


@dataclass(frozen=True)
class Peaks:
    """Ceilings on `threads` threads; medians over the rounds of a run."""

    read_gb_s: float
    int8_gops: float
    f32_gflops: float

    def arithmetic(self, isa: str, encoding: Encoding, both: bool) -> float | None:
        """The peak for products of that encoding, GOPS; None where it was not measured."""
        if encoding == "f32" or (encoding == "bf16" and isa != "avx512_bf16"):
            return self.f32_gflops
        if encoding == "bf16":
            return None  # bf16 dot products
        # AVX2's byte products saturate: codes of eight bits take two multiply-adds where nibbles take one
        return self.int8_gops / 2 if isa == "avx2" and (both or encoding == "int8") else self.int8_gops


def ceilings(threads: int, megabytes: int, seconds: float) -> Peaks:
    return Peaks(
        _core.read_bandwidth(threads, megabytes, seconds),
        _core.int8_peak(threads, seconds / 4),
        _core.f32_peak(threads, seconds / 4),
    )


def median_of(found: list[Peaks]) -> Peaks:
    return Peaks(*(statistics.median(column) for column in zip(*(asdict(p).values() for p in found), strict=True)))


def measure(arguments: argparse.Namespace, threads: int, cols: int) -> dict[str, Any]:
    """All kernels at one shape and thread count; prints as it goes."""
    first = ceilings(threads, arguments.megabytes, 0.3)
    print(
        f"{threads} threads: streaming read {first.read_gb_s:.1f} GB/s, int8 peak {first.int8_gops:.0f} GOPS, "
        f"f32 peak {first.f32_gflops:.0f} GFLOPS"
    )
    print(f"{arguments.isa}, {cols} columns, group {arguments.group}")
    print("kernel       tokens tiles  best ms   median      p90    GB/s    GOPS  limit ms   /best /median  bound by")
    team = Team(threads)
    results = []
    for name, encoding, both, activation in KERNELS:
        if arguments.kernels and name not in arguments.kernels:
            continue
        hi_bytes, lo_bytes = tile_bytes(encoding, padded_columns(encoding, cols, arguments.group), arguments.group)
        tile = hi_bytes + (lo_bytes if both else 0)
        for counts, megabytes in ((arguments.tokens, arguments.megabytes), (arguments.prefill, 4)):
            rows = max(1, megabytes * 1_000_000 // tile) * TILE_ROWS
            packed = random_matrix(encoding, rows, cols, arguments.group, both)
            masked = [under_mask(packed, share) for share in (arguments.tiles if packed.groups else [1.0])]
            works = [Work(team, arguments.isa, m, both, activation, tokens) for tokens in counts for m in masked]
            found = []
            for _ in range(arguments.rounds if works else 0):
                found.append(ceilings(threads, arguments.megabytes, 0.04))
                for work in works:
                    work.run(arguments.seconds / arguments.rounds)
            for work in works:
                peaks = median_of(found)
                arithmetic = peaks.arithmetic(arguments.isa, encoding, both)
                # a prefill's weights are in the cache after the first pass
                reading = work.packed.nbytes / peaks.read_gb_s * 1e-9 if megabytes > 4 else 0.0
                computing = work.operations / arithmetic * 1e-9 if arithmetic else 0.0
                results.append(report(name, work, work.packed.nbytes, reading, computing, peaks))
                whole = next(w for w in works if w.tokens == work.tokens)
                if work is not whole:
                    results[-1]["speedup_median"] = statistics.median(whole.times) / statistics.median(work.times)
                    results[-1]["speedup_best"] = min(whole.times) / min(work.times)
                    print(
                        f"{'':21} {results[-1]['speedup_median']:.2f}x (best {results[-1]['speedup_best']:.2f}x) "
                        f"of the whole; in proportion {whole.packed.share / work.packed.share:.2f}x"
                    )
    team.close()
    return {"threads": threads, "cols": cols, "group": arguments.group, "ceilings": asdict(first), "kernels": results}


def report(name: str, work: Work, size: int, reading: float, computing: float, peaks: Peaks) -> dict[str, Any]:
    """One line, and the same as figures; `reading` and `computing` are seconds at the ceilings, 0 if unknown."""
    best, median = min(work.times), statistics.median(work.times)
    p90 = float(np.quantile(work.times, 0.9))
    limit = max(reading, computing)
    bound = "reading" if reading >= computing else "arithmetic"
    print(
        f"{name:12} {work.tokens:6} {work.packed.share:5.2f} {best * 1e3:8.3f} {median * 1e3:8.3f} {p90 * 1e3:8.3f} "
        f"{size / best * 1e-9:7.1f} {work.operations / best * 1e-9:7.0f} {limit * 1e3:9.3f} "
        f"{limit / best:7.2f} {limit / median:7.2f}  {bound}",
        flush=True,
    )
    return {
        "kernel": name,
        "tokens": work.tokens,
        "tiles": work.packed.share,
        "passes": len(work.times),
        "best_ms": best * 1e3,
        "median_ms": median * 1e3,
        "p90_ms": p90 * 1e3,
        "gb_s": size / best * 1e-9,
        "gops": work.operations / best * 1e-9,
        "limit_ms": limit * 1e3,
        "bound_by": bound,
        "share_best": limit / best,
        "share_median": limit / median,
        "ceilings": asdict(peaks),
    }


def commit() -> str | None:
    """The commit of this checkout, with a mark if it has changes."""
    try:
        command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description="linear kernels against the machine's ceilings")
    parser.add_argument("--isa", default=instruction_sets.selected(), choices=instruction_sets.available())
    parser.add_argument("--threads", type=integers, default=[len(instruction_sets.allowed_cores())])
    parser.add_argument("--cols", type=integers, default=[896])
    parser.add_argument("--group", type=int, default=32, choices=(32, 64, 128))
    parser.add_argument("--megabytes", type=int, default=160, help="weights read by one pass over few tokens")
    parser.add_argument(
        "--kernels", type=lambda text: [name.strip() for name in text.split(",")], help="names; default all"
    )
    parser.add_argument("--tokens", type=integers, default=[1, 2, 3, 4, 5, 6, 8])
    parser.add_argument("--prefill", type=integers, default=[128, 512])
    parser.add_argument("--tiles", type=numbers, default=[1.0], help="shares of the blocks that are stored; first 1.0")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each measurement, all rounds together")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/kernels-<isa>.json")
    parser.add_argument("--name", help="name of the file that --save writes; default kernels-<isa>")
    arguments = parser.parse_args()
    summary = {
        "benchmark": "kernels",
        "isa": arguments.isa,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": describe_machine().as_dict(),
        "runs": [measure(arguments, threads, cols) for threads in arguments.threads for cols in arguments.cols],
    }
    if arguments.save:
        name = arguments.name or f"kernels-{arguments.isa}"
        (RESULTS / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
