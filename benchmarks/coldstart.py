"""From the start of a process to its first token, stage by stage, with a warm page cache.

    python benchmarks/make_model.py qwen2.5-0.5b --out qwen --tokenizer DIR --no-safetensors --gguf Q4_0
    haomiao compress qwen/model-Q4_0.gguf --out artifact
    python benchmarks/coldstart.py artifact [--point int4] [--repeat 9] [--peer NAME=PATH --gguf qwen/model-Q4_0.gguf]

`whole` is `haomiao generate ARTIFACT PROMPT --max-tokens 1`, started as a person would: to the first byte of its
answer, and to its end. `stages` is the same work in one process that notes the time: the interpreter, importing numpy,
importing ours, opening the model (map, plan, tokenizer, executor), the first token. A peer is a llama-cli or
llama-completion; it is measured to its end with one token. Processes start in turns; medians and extremes. A real
tokenizer matters: loading one of 150,000 tokens is a good part of a cold start. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from peerlib.engines import PROMPT, run, timed_start

STAGES = """
import json, sys, time
moments = [int(sys.argv[1]), time.monotonic_ns()]
import numpy
moments.append(time.monotonic_ns())
import haomiao.cli.main, haomiao.cli.generate
from haomiao.api import LLM
import haomiao.engine.engine, haomiao.models.open, haomiao.text.merging, haomiao.engine.executors.native
moments.append(time.monotonic_ns())
llm = LLM(sys.argv[2], threads=int(sys.argv[3]), point=sys.argv[4])
moments.append(time.monotonic_ns())
next(iter(llm.stream(sys.argv[5], max_tokens=1)))
moments.append(time.monotonic_ns())
print(json.dumps(moments))
"""
NAMES = ("interpreter", "numpy", "imports", "open", "first token")


def stages(model: str, threads: int, point: str) -> dict[str, float]:
    """Milliseconds of each stage of one process."""
    command = [sys.executable, "-c", STAGES, str(time.monotonic_ns()), model, str(threads), point, PROMPT]
    moments = json.loads(run(command).splitlines()[-1])
    found = {name: (moments[i + 1] - moments[i]) / 1e6 for i, name in enumerate(NAMES)}
    return found | {"stages in all": (moments[-1] - moments[0]) / 1e6}


def main() -> None:
    """Measure in turns, print, one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--point", default="int4")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="a llama-cli; repeatable")
    parser.add_argument("--gguf", help="the same weights for the peers")
    args = parser.parse_args()

    from haomiao.measure.machine import default_threads
    from haomiao.metrics.ceilings import measure_ceilings

    threads = args.threads or default_threads()
    ceilings = measure_ceilings(threads)
    size = (Path(args.artifact) / "model.haomiao").stat().st_size
    floor = 1e3 * size / (ceilings.read_gb_s * 1e9)
    print(f"{threads} threads: read {ceilings.read_gb_s:.1f} GB/s; reading the artifact once takes {floor:.0f} ms")
    generate = [sys.executable, "-m", "haomiao", "generate", args.artifact, PROMPT, "--max-tokens", "1", "--quiet"]
    generate += ["--threads", str(threads), "--point", args.point]
    peers = {}
    for name, path in (each.split("=", 1) for each in args.peer):
        known = subprocess.run([path, "--help"], capture_output=True, text=True, check=False)
        wanted = ("--no-warmup", "--no-display-prompt", "-no-cnv", "--simple-io")
        flags = [flag for flag in wanted if flag in known.stdout + known.stderr]
        peers[name] = [path, "-m", args.gguf, "-p", PROMPT, "-n", "1", "-t", str(threads), "-c", "512", *flags]
    found: dict[str, list[float]] = {}

    def note(figures: dict[str, float]) -> None:
        for key, value in figures.items():
            found.setdefault(key, []).append(value)

    for index in range(args.repeat + 1):
        whole = timed_start(generate)
        parts = stages(args.artifact, threads, args.point)
        ends = {name: timed_start(command)["exit_ms"] for name, command in peers.items()}
        if index:  # the first of each warms the page cache, and Python's cache of compiled modules
            note({"whole: first byte": whole["first_ms"], "whole: end": whole["exit_ms"], **parts, **ends})
    summary = {k: {"median": statistics.median(v), "low": min(v), "high": max(v)} for k, v in found.items()}
    for name, figures in summary.items():
        print(f"{name:<18} {figures['median']:7.1f} ms [{figures['low']:.1f}, {figures['high']:.1f}]")
    settings = {"threads": threads, "point": args.point, "bytes": size, "repeat": args.repeat}
    print(json.dumps({"benchmark": "coldstart", **settings, **ceilings.as_dict(), "ms": summary}))


if __name__ == "__main__":
    main()
