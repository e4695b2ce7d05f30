"""One step of the engine, apart from everything around it: time by number of tokens in the step, point and context.

    python benchmarks/step.py MODEL [--points int4,int8] [--tokens 1,2,4,8,64,256] [--contexts 0,512]

Drives the executor's `step` directly with random tokens. Prints the ceilings first, a table with the bandwidth that the
weights' bytes imply and the share of the int8 peak, one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np

from haomiao.api import LLM
from haomiao.measure.bytes import operations_per_token, weight_bytes_per_step
from haomiao.measure.machine import default_threads
from haomiao.metrics.ceilings import measure_ceilings
from haomiao.metrics.statistics import summarize
from haomiao.types import KV_BLOCK_TOKENS, StepBatch


def batch(rng: np.random.Generator, vocab: int, tokens: int, past: int, point: str) -> StepBatch:
    """One sequence with `past` tokens behind it and `tokens` in this step."""
    blocks = -(-(past + tokens) // KV_BLOCK_TOKENS)
    return StepBatch(
        token_ids=rng.integers(0, vocab, tokens).astype(np.int32),
        span_starts=np.array([0, tokens], np.int32),
        past=np.array([past], np.int32),
        block_tables=np.arange(blocks, dtype=np.int32)[None],
        logit_rows=np.array([tokens - 1], np.int32),
        point=point,
    )


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--points", default="int4,int8")
    parser.add_argument("--tokens", default="1,2,4,8,64,256")
    parser.add_argument("--contexts", default="0,512")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeat", type=int, default=7)
    args = parser.parse_args()
    threads = args.threads or default_threads()
    ceilings = measure_ceilings(threads)
    print(f"ceilings: read {ceilings.read_gb_s:.1f} GB/s, int8 {ceilings.int8_gops:.0f} Gop/s, {threads} threads")
    sizes = [int(size) for size in args.tokens.split(",")]
    contexts = [int(context) for context in args.contexts.split(",")]
    llm = LLM(args.model, threads=threads, max_context=max(sizes) + max(contexts), prefix_cache=False)
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    print(f"{'point':<6} {'tokens':>6} {'context':>7} {'ms':>9} {'least':>9} {'GB/s':>7} {'Gop/s':>7}")
    for point in args.points.split(","):
        weight_bytes = weight_bytes_per_step(llm.plan, llm.weights, point)
        operations = operations_per_token(llm.plan)
        for tokens in sizes:
            for context in contexts:
                step = batch(rng, llm.vocab_size, min(tokens, llm.executor.max_step_tokens), context, point)
                times = []
                for _ in range(args.repeat + 1):
                    start = time.perf_counter_ns()
                    llm.executor.step(step)
                    times.append((time.perf_counter_ns() - start) / 1e6)
                summary = summarize(times[1:])
                row = {
                    "point": point,
                    "tokens": step.tokens,
                    "context": context,
                    "ms": summary.as_dict(),
                    "read_gb_s": weight_bytes / summary.median / 1e6,
                    "gops": operations * step.tokens / summary.median / 1e6,
                }
                rows.append(row)
                print(
                    f"{point:<6} {step.tokens:>6} {context:>7} {summary.median:>9.3f} {summary.low:>9.3f} "
                    f"{row['read_gb_s']:>7.1f} {row['gops']:>7.0f}"
                )
    llm.close()
    print(json.dumps({"benchmark": "step", "model": llm.name, "ceilings": ceilings.as_dict(), "rows": rows}))


if __name__ == "__main__":
    main()
