"""GPTQ int4 beside llm-compressor's on the same checkpoint, text and processor: time, peak memory and error of each.

    python benchmarks/compression_peers.py CHECKPOINT --peer-python ENV/bin/python --samples 8 --length 512 --out FILE

Both get the same token ids, the same scheme (symmetric, one scale for --group columns, static activation order, damping
0.01), the embedding and the head left as they are, and the same number of threads; each runs in a process of its own.
Peak memory is the greatest resident set, anonymous pages alone beside it (a mapped checkpoint is in the first only),
looked at every 20 ms. Times are that of solving, from the loaded program to the last layer, and of the whole process,
which for ours includes measuring a few tokens. What is run is what is reported, nothing is extrapolated. Error: both
results run in our engine at int4 on --text, against the original weights; with random weights it says nothing.

llm-compressor lives in an environment of its own (torch, then `pip install llmcompressor`). Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).parent / "peerlib" / "compressors.py"
EACH_S = 0.02
MIB = 1 << 20


def watch(command: list[str], threads: int, limit_s: float) -> dict[str, Any]:
    """Run a compressor; its last line of output, with seconds and the greatest resident memory in MiB."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads)), "CUDA_VISIBLE_DEVICES": ""}
    began, resident, anonymous = time.monotonic(), 0, 0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=environment)
        while process.poll() is None:
            found = memory(process.pid)
            resident, anonymous = max(resident, found.get("VmHWM", 0)), max(anonymous, found.get("RssAnon", 0))
            if time.monotonic() - began > limit_s:
                process.kill()
                process.wait()
                raise SystemExit(f"{command[1]} took longer than {limit_s:.0f} s; run a smaller size")
            time.sleep(EACH_S)
        whole = time.monotonic() - began
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{errors.read()[-2000:]}")
        said: dict[str, Any] = json.loads(out.read().splitlines()[-1])
    return said | {"seconds": whole, "peak_mib": resident / MIB, "peak_anonymous_mib": anonymous / MIB}


def memory(pid: int) -> dict[str, int]:
    """Lines of /proc/PID/status that count kB, in bytes; empty where there is no such file."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines if line.endswith(" kB"))
    return {pair[0].rstrip(":"): int(pair[1]) * 1024 for pair in pairs}


def errors(checkpoint: str, results: dict[str, Path], texts: list[Path], tokens: int) -> dict[str, Any]:
    """KL and top-1 of each result at int4, against the original weights, in our engine."""
    from haomiao.api import LLM
    from haomiao.measure.accuracy import measure_against
    from haomiao.measure.report import point_report

    window = 512
    with LLM(checkpoint, point="full", max_context=window + 1, speculate="off") as full:
        ids: list[int] = []
        for path in texts:
            text = path.read_text(encoding="utf-8")
            ids += full.tokenize(text[len(text) // 3 :][: tokens * 8])[:tokens]
        models = {
            name: LLM(folder, point="int4", max_context=window + 1, speculate="off") for name, folder in results.items()
        }
        candidates = {name: model.logits for name, model in models.items()}
        found = measure_against(full.logits, candidates, ids, window=window)
        for model in models.values():
            model.close()
    return {name: point_report(result) for name, result in found.items()} | {"tokens": len(ids)}


def main() -> None:
    """Both in turns, then the table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--peer-python", required=True, help="interpreter of an environment with llmcompressor")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group", type=int, default=128, choices=(32, 64, 128))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--limit", type=float, default=3600, help="seconds that one run may take")
    parser.add_argument(
        "--text", type=Path, action="append", default=[], help="held-out text for the error; repeatable"
    )
    parser.add_argument("--tokens", type=int, default=1024, help="of each text")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    args = parser.parse_args()

    from haomiao.compress.text import read_texts, take_samples
    from haomiao.text.tokenizer import Tokenizer

    encode = Tokenizer(args.checkpoint).encode
    samples = take_samples(read_texts([]), encode, samples=args.samples, held=1, length=args.length)
    runs: dict[str, list[dict[str, Any]]] = {"haomiao": [], "llm-compressor": []}
    interpreters = {"haomiao": sys.executable, "llm-compressor": args.peer_python}
    with tempfile.TemporaryDirectory() as folder:
        ids = Path(folder) / "ids.json"
        ids.write_text(json.dumps(samples.calibration.tolist()))
        for turn in range(args.repeat):
            for name, python in interpreters.items():
                out = Path(folder) / f"{name}-{turn}"
                command = [
                    python,
                    str(WORKERS),
                    name,
                    args.checkpoint,
                    str(ids),
                    str(out),
                    str(args.group),
                    str(args.threads),
                ]
                runs[name].append(watch(command, args.threads, args.limit))
        results = {name: Path(folder) / f"{name}-0" for name in runs}
        error = errors(args.checkpoint, results, args.text, args.tokens) if args.text else {}
    print(f"{len(samples.calibration)} samples of {args.length} tokens, {args.threads} threads, {platform.machine()}")
    for name, each in runs.items():
        for run in each:
            figure = error.get(name)
            kl = f", KL {figure['kl_mean']:.5f}, top-1 {figure['top1']:.4f}" if figure else ""
            print(
                f"{name:>15} {run['version']}: solving {run['solving_s']:.1f} s, whole {run['seconds']:.1f} s, peak "
                f"{run['peak_mib']:.0f} MiB ({run['peak_anonymous_mib']:.0f} anonymous){kl}"
            )
    report = {
        "benchmark": "compression_peers",
        "checkpoint": Path(args.checkpoint).name,
        "samples": int(samples.calibration.shape[0]),
        "length": args.length,
        "group": args.group,
        "threads": args.threads,
        "runs": runs,
        "error": error,
    }
    line = json.dumps(report)
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
