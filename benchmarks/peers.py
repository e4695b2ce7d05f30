"""Haomiao beside llama.cpp: the same GGUF file, prompt length, answer length and threads, run in turns.

    python benchmarks/make_model.py qwen2.5-0.5b --out qwen --no-safetensors --gguf Q4_0 --gguf Q8_0
    python benchmarks/peers.py qwen/model-Q4_0.gguf --peer-python PYTHON --name qwen2.5-0.5b-q4_0

PYTHON is an interpreter that has llama-cpp-python (its own environment is best); by default this one. Each engine is a
process of its own that loads the model once; runs alternate, so that a machine that slows down slows both. The peer is
measured below its Python layer (llama_decode on ready batches, no sampling); ours through `LLM.stream`, sampling and
Python included. Q4_0 runs at our `int4`, Q8_0 at `int8`. Prints the ceilings first, then medians and extremes, and
one JSON line last, which is also written to benchmarks/results/<name>.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def worker_haomiao(settings: dict[str, Any]) -> None:
    """Serve runs of our engine over standard input and output."""
    from haomiao.api import LLM
    from haomiao.measure.latency import Workload, measure_latency

    context = settings["prompt_tokens"] + settings["new_tokens"] + 1
    llm = LLM(
        settings["model"],
        point=settings["point"],
        threads=settings["threads"],
        max_context=context,
        prefix_cache=False,
        speculate="off",
    )

    def run(seed: int) -> dict[str, float]:
        workload = Workload(settings["prompt_tokens"], settings["new_tokens"], repeat=1, warmup=0, seed=seed)
        result = measure_latency(llm, workload)
        assert result.decode_tok_s is not None
        return {"prefill_tok_s": result.prefill_tok_s.median, "decode_tok_s": result.decode_tok_s.median}

    serve(run)


def worker_llama_cpp(settings: dict[str, Any]) -> None:
    """Serve runs of llama.cpp over standard input and output, as its own llama-bench measures them."""
    import random

    import llama_cpp

    prompt_tokens, new_tokens = settings["prompt_tokens"], settings["new_tokens"]
    model = llama_cpp.Llama(
        settings["model"],
        n_ctx=prompt_tokens + new_tokens + 1,
        n_batch=512,
        n_ubatch=512,
        n_threads=settings["threads"],
        n_threads_batch=settings["threads"],
        verbose=False,
    )
    context, vocab = model.ctx, model.n_vocab()
    random.seed(0)

    def decode(tokens: list[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))) != 0:
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_synchronize(context)

    def run(_: int) -> dict[str, float]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        prompt = [random.randrange(vocab) for _ in range(prompt_tokens)]
        start = time.perf_counter()
        for first in range(0, prompt_tokens, 512):
            decode(prompt[first : first + 512])
        middle = time.perf_counter()
        for _ in range(new_tokens - 1):
            decode([random.randrange(vocab)])
        end = time.perf_counter()
        return {"prefill_tok_s": prompt_tokens / (middle - start), "decode_tok_s": (new_tokens - 1) / (end - middle)}

    serve(run)


def serve(run: Any) -> None:
    """Answer each line (a seed) with one line of JSON."""
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(int(line))), flush=True)


class Worker:
    """One engine in a process of its own."""

    def __init__(self, python: str, engine: str, settings: dict[str, Any]) -> None:
        command = [python, __file__, "--worker", engine, json.dumps(settings)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._expect("ready")

    def _expect(self, start: str) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith(start):
            raise SystemExit(f"a worker ended early: {line!r} (its own words are above)")
        return line

    def run(self, seed: int) -> dict[str, float]:
        """One run; figures of this run alone."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seed}\n")
        self._process.stdin.flush()
        answer: dict[str, float] = json.loads(self._expect("{"))
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def commit() -> str | None:
    """The commit of this checkout, with a mark if it has changes."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or None


def main() -> None:
    """Measure both in turns, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file that both read")
    parser.add_argument("--name", help="of the result file; default: the model's name")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter with llama-cpp-python")
    parser.add_argument("--point", help="ours; default: int8 for a file with Q8_0 in its name, else int4")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()

    from haomiao.measure.machine import default_threads, describe_machine
    from haomiao.metrics.ceilings import measure_ceilings
    from haomiao.metrics.statistics import summarize

    threads = args.threads or default_threads()
    ceilings = measure_ceilings(threads)
    print(f"ceilings: read {ceilings.read_gb_s:.1f} GB/s, int8 {ceilings.int8_gops:.0f} Gop/s, {threads} threads")
    settings = {
        "model": args.model,
        "point": args.point or ("int8" if "q8_0" in Path(args.model).name.lower() else "int4"),
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "threads": threads,
    }
    workers = {
        "haomiao": Worker(sys.executable, "haomiao", settings),
        "llama.cpp": Worker(args.peer_python, "llama.cpp", settings),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for seed in range(args.repeat + 1):
        for name, worker in workers.items():
            figures = worker.run(seed)
            if seed:  # the first run of each warms up
                runs[name].append(figures)
    for worker in workers.values():
        worker.close()
    engines = {
        name: {key: summarize([run[key] for run in figures]).as_dict() for key in figures[0]}
        for name, figures in runs.items()
    }
    for name, figures in engines.items():
        shown = [f"{key} {s['median']:.1f} [{s['low']:.1f}, {s['high']:.1f}]" for key, s in figures.items()]
        print(f"{name:<10} {'   '.join(shown)}")
    result = {
        "benchmark": "peers",
        "model": Path(args.model).name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": describe_machine().as_dict(),
        "ceilings": ceilings.as_dict(),
        "settings": {**settings, "model": Path(args.model).name, "repeat": args.repeat},
        "engines": engines,
        "ratio": {
            key: engines["haomiao"][key]["median"] / engines["llama.cpp"][key]["median"]
            for key in ("prefill_tok_s", "decode_tok_s")
        },
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{args.name or Path(args.model).stem}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "--worker":
        {"haomiao": worker_haomiao, "llama.cpp": worker_llama_cpp}[sys.argv[2]](json.loads(sys.argv[3]))
    else:
        main()
