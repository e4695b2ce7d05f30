"""The engine on a GPU: agreement first, then decode latency, prefill, time to first token and jitter, beside others.

    python -m benchmarks.gpu check              agreement of every kernel with its twin, of graphs with launches
    python -m benchmarks.gpu tune               other block sizes for the kernels, timed
    python -m benchmarks.gpu run --seconds 480  everything, as far as the seconds reach

Needs PyTorch with CUDA and Triton, and for one baseline transformers; fetches nothing and needs no compiled core.
Random weights are made on the device: they serve for speed only. The measured read bandwidth and the greatest bf16 rate
are printed first, one JSON object last. What failed or found no time stands under `skipped`, with its reason.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent / "src")]

NEEDED = {"numpy": "numpy", "torch": "PyTorch", "triton": "Triton"}
EXIT_UNAVAILABLE = 7


if __name__ == "__main__":
    absent = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
    if absent and {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit(0)
    if absent:
        print(f"benchmarks.gpu: {', '.join(absent)} missing: pip install 'haomiao[torch]'", file=sys.stderr)
        sys.exit(EXIT_UNAVAILABLE)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from gpulib import baselines, check, shapes  # noqa: E402

from haomiao.engine.executors.torch import launch  # noqa: E402
from haomiao.engine.executors.torch.device import label, open_device  # noqa: E402
from haomiao.engine.executors.torch.executor import TorchExecutor  # noqa: E402
from haomiao.errors import HaomiaoError  # noqa: E402
from haomiao.types import POINTS, StepBatch  # noqa: E402

CONTEXT = 512
BATCHES = (1, 8, 64)
PREFILL = 2048
STEPS = 100
MODELS = ("0.5b", "1b", "8b")
JOBS = [(m, p) for m in ("8b", "1b", "0.5b") for p in ("bf16", "int4-w", "int8", "int4")]
"""What matters most first."""
ROOM = {"ours": 25.0, "baseline": 60.0}
"""Seconds that a job must find left to be begun."""


def decode_batch(point: str, batch: int, context: int) -> StepBatch:
    """One token of each sequence; every sequence has blocks of its own."""
    width = -(-(context + 1) // 32)
    return StepBatch(
        np.arange(batch, dtype=np.int32), np.arange(batch + 1, dtype=np.int32), np.full(batch, context, np.int32),
        np.arange(batch * width, dtype=np.int32).reshape(batch, width), np.arange(batch, dtype=np.int32), point,
        np.ones(batch, np.bool_),
    )  # fmt: skip


def prefill_batch(point: str, tokens: int) -> StepBatch:
    """A prompt; the last row alone is wanted."""
    table = np.arange(-(-tokens // 32), dtype=np.int32)[None]
    return StepBatch(
        np.arange(tokens, dtype=np.int32) % 1000, np.array([0, tokens], np.int32), np.zeros(1, np.int32), table,
        np.array([tokens - 1], np.int32), point, np.ones(1, np.bool_),
    )  # fmt: skip


def timed(step: Callable[[], Any], count: int, warm: int = 5) -> list[float]:
    """Milliseconds of each step, from its call to its tokens on the host."""
    for _ in range(warm):
        step()
    torch.cuda.synchronize()
    found = []
    for _ in range(count):
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - began))
    return found


def spread(times: list[float]) -> dict[str, float]:
    """Median, p99, their ratio, and the number of samples."""
    p50, p99 = (float(np.percentile(times, q)) for q in (50, 99))
    return {"ms_p50": round(p50, 4), "ms_p99": round(p99, 4), "p99_over_p50": round(p99 / p50, 3), "steps": len(times)}


def ceilings(device: torch.device) -> dict[str, float]:
    """GB/s of the faster of a sum and a copy; TFLOP/s of an 8192-cubed bf16 product."""
    big = torch.ones(1 << 30, dtype=torch.int32, device=device)
    half, other = big[: 1 << 29], torch.empty(1 << 29, dtype=torch.int32, device=device)
    read = 4.0 * big.numel() / min(timed(lambda: big.sum(dtype=torch.int32), 20)) / 1e6
    copied = 8.0 * half.numel() / min(timed(lambda: other.copy_(half), 20)) / 1e6
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    rate = 2 * 8192**3 / float(np.median(timed(lambda: a @ a, 10))) / 1e9
    return {"gb_s": round(max(read, copied), 1), "bf16_tflops": round(rate, 1)}


def launches(step: Callable[[], Any]) -> dict[str, int]:
    """What the host calls in one step, by name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    wanted = ("Launch", "Memcpy")
    return {e.key: e.count for e in seen.key_averages() if e.key.startswith("cu") and any(w in e.key for w in wanted)}


def measure_ours(shape: str, point: str, device: torch.device, top: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Decode at every batch, prefill, and time to first token."""
    made = shapes.make(shape, "bf16" if point == "bf16" else "planes", device)
    executor = TorchExecutor.of_model(made.model, points=(point,), max_step_tokens=PREFILL)
    for batch in BATCHES:
        given = decode_batch(point, batch, CONTEXT)
        times = timed(lambda given=given: executor.step(given), STEPS)
        row = {"model": shape, "point": point, "engine": "haomiao", "batch": batch, "context": CONTEXT, **spread(times)}
        moved = made.step_bytes(point, batch, CONTEXT)
        row["share_of_bandwidth"] = round(moved / row["ms_p50"] / 1e6 / top["gb_s"], 3)
        row["tokens_s"] = round(1e3 * batch / row["ms_p50"], 1)
        if batch == 1:
            row["launches"] = launches(lambda given=given: executor.step(given))
        yield row
    for what, tokens in (("prefill", PREFILL), ("ttft", 512)):
        times = timed(lambda n=tokens: executor.step(prefill_batch(point, n)), 10, warm=2)
        row = {"model": shape, "point": point, "engine": "haomiao", "what": what, "tokens": tokens, **spread(times)}
        row["tflops"] = round(2 * made.matrix_weights * tokens / row["ms_p50"] / 1e9, 1)
        row["share_of_peak"] = round(row["tflops"] / top["bf16_tflops"], 3)
        yield row
    executor.close()


def measure_other(name: str, shape: str, batch: int, device: torch.device) -> dict[str, Any]:
    """A decode step of a baseline."""
    if name == "transformers":
        step = baselines.transformers_step(shape, batch, CONTEXT, device)
    else:
        step = baselines.compiled_step(shape, batch, CONTEXT, device, int4=name.endswith("int4"))
    times = timed(step, STEPS, warm=6)
    return {"model": shape, "engine": name, "batch": batch, "context": CONTEXT, **spread(times)}


def run(args: argparse.Namespace, device: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything, the most valuable first, each job only if there is time for it."""
    deadline = time.monotonic() + args.seconds
    top = ceilings(device)
    say(f"{label(device)}: {top['gb_s']:.0f} GB/s, {top['bf16_tflops']:.0f} bf16 TFLOP/s")
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []

    def attempt(name: str, room: float, job: Callable[[], Iterator[dict[str, Any]]]) -> None:
        left = deadline - time.monotonic()
        if left < room:
            skipped.append({"job": name, "reason": f"{left:.0f} s left"})
            return
        try:
            for row in job():
                rows.append(row)
                say(json.dumps(row))
        except Exception as reason:  # one that fails must not cost the others their time
            skipped.append({"job": name, "reason": f"{type(reason).__name__}: {reason}"[:300]})
            say(f"FAIL {name}: {skipped[-1]['reason']}")
        gc.collect()
        torch.compiler.reset()
        torch.cuda.empty_cache()

    chosen = args.models.split(",")
    for shape, point in JOBS[: 2 if args.quick else None]:
        if shape in chosen:
            attempt(f"{shape} {point}", ROOM["ours"], lambda a=(shape, point): measure_ours(*a, device, top))
    for batch in (1, 8):
        for shape in ("8b", "1b", "0.5b"):
            for name in ("compiled-bf16", "compiled-int4", "transformers"):
                if shape in chosen and not args.quick:
                    job = lambda a=(name, shape, batch): iter([measure_other(*a, device)])  # noqa: E731
                    attempt(f"{name} {shape} batch {batch}", ROOM["baseline"], job)
    return {"ceilings": top, "rows": rows, "skipped": skipped, "ratios": ratios(rows)}


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """int4-w to bf16, and ours to the others, by time of a decode step at batch 1."""
    at = {
        (r["model"], r.get("point", r["engine"])): r["ms_p50"] for r in rows if r.get("batch") == 1 and "context" in r
    }
    found = {}
    for shape in MODELS:
        pairs = [("bf16", "int4-w"), ("compiled-bf16", "bf16"), ("transformers", "bf16"), ("compiled-int4", "int4-w")]
        for slow, quick in pairs:
            if (shape, slow) in at and (shape, quick) in at:
                found[f"{shape}: {slow} / {quick}"] = round(at[shape, slow] / at[shape, quick], 2)
    return found


def tune(device: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    """Microseconds of one layer's largest product by sizes of blocks."""
    generator = torch.Generator(device).manual_seed(0)
    rows, cols, found = 28672, 4096, []
    for storage, point in (("bf16", "bf16"), ("planes", "int4-w"), ("planes", "int8")):
        matrix = shapes.random_matrix(rows, cols, storage, generator, device)
        for tokens in (1, 8):
            x, out = torch.randn(tokens, cols, device=device), torch.zeros(tokens, rows, device=device)
            for blocks in candidates(tokens):
                launch.BLOCKS.__dict__.update(blocks)
                try:
                    step = step_of(out, x, matrix, point)
                    best = 1e3 * float(np.median(timed(step, 30)))
                except Exception as reason:  # too many registers, too much shared memory
                    say(f"{storage} {point} m={tokens} {blocks}: {type(reason).__name__}")
                    continue
                found.append({"storage": storage, "point": point, "tokens": tokens, **blocks, "us": round(best, 1)})
                say(json.dumps(found[-1]))
            launch.BLOCKS.__dict__.update(launch.Blocks().__dict__)
    return {"tune": found}


def step_of(out: Any, x: Any, matrix: Any, point: str) -> Callable[[], None]:
    """Twenty products in a graph, so that launches do not count."""
    planes = POINTS[point].planes

    def one() -> None:
        if x.shape[0] == 1:
            launch.gemv(out, x, matrix, POINTS[point], planes, launch.PLAIN, launch.After())
        else:
            launch.matmul(out, x, matrix, POINTS[point], planes, launch.After())

    one()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            one()
    return lambda: graph.replay()


def candidates(tokens: int) -> Iterator[dict[str, int]]:
    """Sizes of blocks to try."""
    if tokens == 1:
        for rows in (1, 2, 4, 8, 16):
            for bytes_ in (256, 512, 1024, 2048):
                for warps in (2, 4, 8):
                    yield {"gemv_rows": rows, "gemv_bytes": bytes_, "gemv_warps": warps}
    else:
        for rows in (16, 32, 64, 128):
            for warps in (2, 4, 8):
                for stages in (2, 4, 6):
                    yield {"gemm_rows": rows, "gemm_warps": warps, "gemm_stages": stages}


def main() -> int:
    """0 if everything agreed; 1 if not; 7 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", "tune", "run"), nargs="?", default="run")
    parser.add_argument("--models", default=",".join(MODELS), help="default 0.5b,1b,8b")
    parser.add_argument("--seconds", type=float, default=480, help="for `run` (default 480)")
    parser.add_argument("--quick", action="store_true", help="8b at bf16 and int4-w alone")
    args = parser.parse_args()
    unknown = [name for name in args.models.split(",") if name not in MODELS]
    if unknown:
        parser.error(f"--models: {', '.join(MODELS)}, not {unknown[0]}")
    try:
        device = open_device("cuda")
    except HaomiaoError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return error.exit_code

    def say(line: str) -> None:
        print(line, flush=True)

    report: dict[str, Any] = {
        "benchmark": "gpu", "what": args.what, "device": label(device), "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    failed = []
    if args.what == "check":
        report["checks"] = check.run_checks(device, say)
        failed = [each for each in report["checks"] if not each["ok"]]
    elif args.what == "tune":
        report |= tune(device, say)
    else:
        report |= run(args, device, say)
    print(json.dumps(report))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
