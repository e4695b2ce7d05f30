"""The engine on a GPU: agreement first, then decode latency, prefill, time to first token and jitter, beside others.

    python -m benchmarks.gpu check              agreement of every kernel with its twin, of graphs with launches
    python -m benchmarks.gpu tune --seconds 60  other block sizes for the kernels, timed on real matrices
    python -m benchmarks.gpu run --seconds 240  everything, as far as the seconds reach, the most valuable first

Needs PyTorch with CUDA and Triton, and for one baseline transformers; fetches nothing and needs no compiled core.
Random weights are made on the device: they serve for speed only. The measured read bandwidth and the greatest bf16
rate are printed first, one JSON object last; `--out FILE` gets every row as soon as it is there. What failed or found
no time stands under `skipped`, with its reason.
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
from functools import partial
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

import torch  # noqa: E402
from gpulib import check, measure, tuning  # noqa: E402

from haomiao.engine.executors.torch import launch  # noqa: E402
from haomiao.engine.executors.torch.device import label, open_device  # noqa: E402
from haomiao.errors import HaomiaoError  # noqa: E402

# `kernels.py` beside this file must not be taken for the package that transformers looks for
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != ROOT]

MODELS = ("0.5b", "1b", "8b")
OTHERS = [
    ("compiled-bf16", "8b", 1), ("compiled-int4", "8b", 1), ("transformers", "1b", 1), ("compiled-bf16", "0.5b", 1),
    ("compiled-bf16", "1b", 1), ("compiled-int4", "1b", 1), ("transformers", "0.5b", 1), ("compiled-int4", "0.5b", 1),
    ("compiled-bf16", "8b", 8), ("compiled-int4", "8b", 8), ("transformers", "8b", 1), ("transformers", "1b", 8),
    ("compiled-bf16", "1b", 8), ("compiled-bf16", "0.5b", 8), ("transformers", "0.5b", 8), ("transformers", "8b", 8),
]  # fmt: skip
JOBS: list[tuple[str, ...]] = [
    ("8b", "bf16"), ("8b", "planes"), ("1b", "bf16"), ("0.5b", "bf16"), *((o[0], o[1], str(o[2])) for o in OTHERS[:3]),
    ("1b", "planes"), ("0.5b", "planes"), *((o[0], o[1], str(o[2])) for o in OTHERS[3:]),
]  # fmt: skip
"""What matters most first: (model, storage) of ours, (name, model, batch) of others."""
ROOM = {"ours": 12.0, "other": 30.0}
"""Seconds that a job must find left to be begun."""


def run(args: argparse.Namespace, device: torch.device, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Everything, the most valuable first, each job only if there is time for it."""
    deadline = time.monotonic() + args.seconds
    top = measure.ceilings(device)
    torch.cuda.empty_cache()
    keep({"device": label(device), **top})
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []

    def attempt(name: str, room: float, job: Callable[[], Iterator[dict[str, Any]]]) -> None:
        began = time.monotonic()
        if deadline - began < room:
            skipped.append({"job": name, "reason": f"{deadline - began:.0f} s left"})
            return
        try:
            for row in job():
                rows.append(row)
                keep(row)
        except Exception as reason:  # one that fails must not cost the others their time
            skipped.append({"job": name, "reason": f"{type(reason).__name__}: {reason}"[:300]})
            keep({"failed": name, "reason": skipped[-1]["reason"]})
        gc.collect()
        torch.compiler.reset()
        torch.cuda.empty_cache()
        keep({"job": name, "seconds": round(time.monotonic() - began, 1)})

    chosen = args.models.split(",")
    for each in JOBS[: 2 if args.quick else None]:
        if len(each) == 2 and each[0] in chosen and not args.baselines_only:
            job = partial(measure.ours, *each, device, top, points=1 if args.quick else None)
            attempt(" ".join(each), ROOM["ours"], job)
        if len(each) == 3 and each[1] in chosen:
            other = partial(measure.other, each[0], each[1], int(each[2]), device, top)
            attempt(" ".join(each), ROOM["other"], other)
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


def main() -> int:
    """0 if everything agreed; 1 if not; 7 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", "tune", "run"), nargs="?", default="run")
    parser.add_argument("--models", default=",".join(MODELS), help="default 0.5b,1b,8b")
    parser.add_argument("--seconds", type=float, help="run (default 240), tune (60), check (no limit)")
    parser.add_argument("--quick", action="store_true", help="run: 8b at bf16 and int4-w alone")
    parser.add_argument("--baselines-only", action="store_true", help="run: the others alone")
    parser.add_argument("--out", type=Path, help="append every row, as a JSON line")
    parser.add_argument("--blocks", type=Path, help="run: sizes of blocks that `tune --out` wrote")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--warm", metavar="NAME,MODEL,BATCH", help="run: compile this baseline into the cache, no more")
    parser.add_argument("--at-once", type=int, default=check.AT_ONCE, help="check: groups beside each other")
    parser.add_argument("--group", help="check: this group alone, in this process, JSON lines")
    parser.add_argument("--independent", action="store_true", help="no kernel begins before the one before it ended")
    parser.add_argument("--dense", action="store_true", help="several tokens meet bf16 made of codes, not codes")
    parser.add_argument("--only", default="", help="check: groups whose name holds one of these, by commas")
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

    def keep(row: dict[str, Any]) -> None:
        line = json.dumps(row)
        say(line)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(line + "\n")

    launch.BLOCKS.dependent, launch.BLOCKS.gemm_batched = not args.independent, not args.dense
    script = [__file__, *(["--independent"] * args.independent), *(["--dense"] * args.dense)]
    if args.blocks is not None and args.blocks.exists():
        say(f"{tuning.adopt(args.blocks)} sizes of blocks from {args.blocks}")
    if args.warm is not None:
        name, shape, batch = args.warm.split(",")
        measure.warm(name, shape, int(batch), device)
        return 0
    if args.part is not None:
        tuning.compile_part(args.part, device)
        return 0
    if args.group is not None:
        return 0 if check.run_group(args.group, device, say) else 1
    report: dict[str, Any] = {
        "benchmark": "gpu", "what": args.what, "device": label(device), "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    failed = []
    if args.what == "check":
        names = [name for name in check.groups(device) if any(part in name for part in args.only.split(","))]
        report["checks"] = check.run_checks(script, names, say, args.at_once, args.seconds)
        failed = [each["name"] for each in report["checks"] if not each["ok"]]
        report["failed"] = failed
    elif args.what == "tune":
        report |= tuning.tune(device, script, args.seconds or 60.0, keep)
    else:
        args.seconds = args.seconds or 240.0
        report |= run(args, device, keep)
    keep(report)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
