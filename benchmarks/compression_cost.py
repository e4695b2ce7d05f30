"""What a compression costs at a real shape: memory with all layers, and the time of one layer by its parts.

    python benchmarks/make_model.py llama-3.2-1b --out 1b            # random weights, real shape
    python benchmarks/make_model.py llama-3.2-1b --layers 1 --vocab 8192 --out layer
    python benchmarks/compression_cost.py memory 1b --samples 2 --length 64 --work FOLDER --limit 450 --out FILE
    python benchmarks/compression_cost.py layer layer --samples 16 --samples 64 --length 2048 --out FILE

`memory` compresses (GPTQ, int4 with a second plane) on random ids in a process of its own and prints the greatest
memory of the process, looked at every 0.1 s: `anonymous` is what it takes over the mapped checkpoint. --limit stops it
after so many seconds; the same command with the same --work goes on, and the greatest of all its runs counts. `layer`
compresses a model of one layer (int4 alone, group 128, static order) with each number of samples and prints seconds by
part, seconds a token of what grows with tokens, and the rest. Nothing is extrapolated. One JSON line last; with --out
it is added to a file too. Errors of random weights say nothing and are not printed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EACH_S = 0.1


def memory_of(pid: int | None) -> dict[str, int]:
    """Bytes resident at most so far, and those that are no mapped files now."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    return {"resident": found.get("VmHWM", 0), "anonymous": found.get("RssAnon", 0)}


def compress_random(
    out: Path, checkpoint: str, samples: int, length: int, recipe: dict[str, Any], **options: Any
) -> None:
    """A compression on random ids; what is measured at its end are 32 tokens."""
    import numpy as np

    from haomiao.compress.job import compress
    from haomiao.compress.recipe import recipe_of
    from haomiao.compress.text import Samples
    from haomiao.load.source import open_source

    source = open_source(checkpoint)
    ids = np.random.default_rng(1).integers(0, source.config["vocab_size"], (samples + 1, length)).astype(np.int32)
    given = Samples(ids[:-1], ids[-1:, :32], [])
    compress(source, out, recipe_of(recipe), samples=given, overwrite=True, **options)


# ---- memory


def run_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Watch a compression; it goes on where the last run of the same --work was stopped."""
    args.work.mkdir(parents=True, exist_ok=True)
    kept = args.work / "most.json"
    most = json.loads(kept.read_text()) if kept.exists() else {"resident": 0, "anonymous": 0, "seconds": 0.0}
    process = multiprocessing.get_context("spawn").Process(target=compress_told, args=(args,))
    began = time.monotonic()
    process.start()
    while process.is_alive():
        for key, value in memory_of(process.pid).items():
            most[key] = max(most[key], value)
        if time.monotonic() - began > args.limit:
            process.kill()
        process.join(EACH_S)
    most["seconds"] += time.monotonic() - began
    kept.write_text(json.dumps(most))
    whole = process.exitcode == 0
    done = len(list((args.work / "out.partial").glob("*.stage")))
    if not whole:
        print(f"stopped after {done} stages; the same command goes on")
    return {
        "samples": args.samples,
        "length": args.length,
        "whole": whole,
        "stages": None if whole else done,
        "seconds": round(most["seconds"], 1),
        **{f"{key}_gb": round(most[key] / 1e9, 3) for key in ("resident", "anonymous")},
    }


def compress_told(args: argparse.Namespace) -> None:
    """In a process of its own, saying now and then how far it is."""
    last = [time.monotonic()]

    def tell(what: str, done: int, total: int) -> None:
        if time.monotonic() - last[0] > 20:
            last[0] = time.monotonic()
            print(f"{100 * done / max(total, 1):5.1f} %: {what}", flush=True)

    recipe = {"prune": args.prune} if args.prune else {}
    compress_random(
        args.work / "out", args.checkpoint, args.samples, args.length, recipe, threads=args.threads, progress=tell
    )


# ---- time


class Parts:
    """Seconds by part of the program, taken by wrapping its functions."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, name: str, label: Callable[..., str]) -> None:
        """Count what `owner.name` takes under the label made of its arguments."""
        inner = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*arguments, **options)
            finally:
                part = label(*arguments)
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began

        setattr(owner, name, timed)


def time_layer(out: Path, args: argparse.Namespace, samples: int, pipe: Any) -> None:
    """In a process of its own: one compression, its seconds by part."""
    from haomiao.compress import calibrate, forward, job
    from haomiao.compress.quantize import gptq

    parts = Parts()
    parts.wrap(forward, "_apply", lambda plan, weights, buffers, ids, op: f"forward {type(op).__name__}")
    parts.wrap(calibrate.Moments, "add", lambda self, x: f"moments of {x.shape[1]} columns")
    parts.wrap(job, "solve_layer", lambda *_: "solving")
    parts.wrap(gptq, "factorize", lambda *_: "solving, of it factorizing")
    parts.wrap(gptq, "eliminate", lambda *_: "solving, of it eliminating")
    parts.wrap(job.Job, "measure", lambda *_: "measuring")
    began = time.perf_counter()
    recipe = {"group": 128, "lo": False, "order": "static"}
    compress_random(out, args.checkpoint, samples, args.length, recipe, threads=args.threads, restart=True)
    pipe.send({"seconds": time.perf_counter() - began, "parts": parts.seconds})


def run_layer(args: argparse.Namespace) -> dict[str, Any]:
    """One run for each number of samples."""
    runs: dict[int, dict[str, Any]] = {}
    for samples in args.samples or [4, 16]:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            parent, child = multiprocessing.get_context("spawn").Pipe()
            process = multiprocessing.get_context("spawn").Process(
                target=time_layer, args=(Path(folder) / "out", args, samples, child)
            )
            process.start()
            child.close()
            most = {"resident": 0, "anonymous": 0}
            while process.is_alive() and not parent.poll(EACH_S):
                for key, value in memory_of(process.pid).items():
                    most[key] = max(most[key], value)
            try:
                found: dict[str, Any] = parent.recv()
            except EOFError:
                raise SystemExit("the compression ended without a result") from None
            process.join()
        runs[samples] = {**found, **{f"{key}_gb": round(value / 1e9, 3) for key, value in most.items()}}
        print(
            f"{samples} samples of {args.length}: {found['seconds']:.1f} s, {most['anonymous'] / 1e9:.2f} GB",
            flush=True,
        )
        for part, seconds in sorted(found["parts"].items(), key=lambda each: -each[1]):
            print(f"  {part:32} {seconds:8.2f} s", flush=True)
    report: dict[str, Any] = {"length": args.length, "runs": runs}
    if len(runs) > 1:
        few, many = min(runs), max(runs)
        grown = (runs[many]["seconds"] - runs[few]["seconds"]) / (many - few)
        rest = runs[few]["seconds"] - few * grown
        report |= {"seconds_a_sample": grown, "rest_s": rest}
        print(f"{1e3 * grown / args.length:.3f} ms a token, and {rest:.1f} s whatever the number of tokens")
    return report


def main() -> None:
    """Read the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("memory", "layer"):
        command = commands.add_parser(name)
        command.add_argument("checkpoint")
        command.add_argument("--length", type=int, default=512, help="tokens of a sample")
        command.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
        command.add_argument("--out", type=Path, help="add the JSON line to this file")
        if name == "memory":
            command.add_argument("--samples", type=int, default=2)
            command.add_argument("--prune", action="append", help="as haomiao compress has it")
            command.add_argument("--limit", type=float, default=3600, help="seconds of this run")
            command.add_argument("--work", type=Path, help="folder of the run (default: a temporary one)")
        else:
            command.add_argument("--samples", type=int, action="append", help="repeatable (default 4 and 16)")
            command.add_argument("--work", type=Path, help="where activations go (default: the temporary folder)")
    args = parser.parse_args()
    if args.command == "memory" and args.work is None:
        args.work = Path(tempfile.mkdtemp(prefix="haomiao-memory-"))
        try:
            report = run_memory(args)
        finally:
            shutil.rmtree(args.work, ignore_errors=True)
    else:
        report = {"memory": run_memory, "layer": run_layer}[args.command](args)
    about = {"benchmark": f"compression_cost {args.command}", "checkpoint": Path(args.checkpoint).name}
    line = json.dumps({**about, "threads": args.threads, "machine": platform.machine(), **report})
    if args.out:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
