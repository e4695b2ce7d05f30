"""Compress a trained model in many ways and measure each: a table of their errors.

    python benchmarks/compression.py CHECKPOINT --text english.txt --text chinese.txt --out results.json
    python benchmarks/compression.py CHECKPOINT --text ... --only gptq-g32 --only rtn-g32

Every way is calibrated on the package's default text and measured on --text, which is not in it: KL from the original
weights, top-1 agreement, perplexity, each with half of a 95 % interval, bytes of weights that a decode step reads, and
milliseconds a token. Results are kept in --out after every way, so that a run goes on where it was; --markdown prints
them as a table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from haomiao.api import LLM
from haomiao.compress.job import compress
from haomiao.compress.recipe import recipe_of
from haomiao.load.artifact import Artifact
from haomiao.load.source import open_source
from haomiao.measure.accuracy import measure_against
from haomiao.measure.bytes import weight_bytes_per_step
from haomiao.measure.latency import Workload, measure_latency
from haomiao.measure.report import point_report
from haomiao.text.tokenizer import Tokenizer

WINDOW = 512
WAYS: dict[str, dict[str, Any]] = {
    "rtn-g32": {"method": "rtn"},
    "gptq-g32": {},
    "gptq-g32-static": {"order": "static"},
    "gptq-g32-natural": {"order": "natural"},
    "awq-rtn-g32": {"method": "rtn", "awq": True},
    "awq-gptq-g32": {"awq": True},
    "rotate-rtn-g32": {"method": "rtn", "rotate": True},
    "rotate-gptq-g32": {"rotate": True},
    "rtn-g128": {"method": "rtn", "group": 128},
    "gptq-g128": {"group": 128},
    "gptq-int8": {"bits": 8},
    "rtn-int8": {"bits": 8, "method": "rtn"},
    "lo-shift-2": {"lo_shift": 2},
    "lo-shift-3": {"lo_shift": 3},
    "lo-shift-4": {"lo_shift": 4},
    "gptq-3bit": {"bits": 3},
    "tile-20": {"prune": "tile:0.2"},
    "tile-30": {"prune": "tile:0.3"},
    "tile-50": {"prune": "tile:0.5"},
    "wanda-50-rtn": {"prune": "wanda:0.5", "method": "rtn"},
    "wanda-50": {"prune": "wanda:0.5", "order": "static"},
    "magnitude-50": {"prune": "magnitude:0.5", "order": "static"},
    "sparsegpt-50": {"prune": "sparsegpt:0.5"},
    "sparsegpt-50-int8": {"prune": "sparsegpt:0.5", "bits": 8},
    "sparsegpt-2:4": {"prune": "sparsegpt:2:4"},
    "sparsegpt-70": {"prune": "sparsegpt:0.7"},
    "sparsegpt-70-owl": {"prune": "sparsegpt:0.7", "allocation": "owl"},
}


def held_out(llm: LLM, texts: list[Path], count: int) -> list[int]:
    """`count` tokens from the middle of each text."""
    ids: list[int] = []
    for path in texts:
        text = path.read_text(encoding="utf-8")
        ids += llm.tokenize(text[len(text) // 3 :][: count * 8])[:count]
    return ids


def measure(full: LLM, artifact: Path, ids: list[int], timed: bool) -> dict[str, Any]:
    """Figures of every point of an artifact."""
    found: dict[str, Any] = {}
    with LLM(artifact, max_context=WINDOW + 1, speculate="off") as llm:
        candidates = {p: lambda ids, p=p: llm.logits(ids, point=p) for p in llm.points}
        for point, result in measure_against(full.logits, candidates, ids, window=WINDOW).items():
            found[point] = point_report(result) | {"bytes": weight_bytes_per_step(llm.plan, llm.weights, point)}
        if timed:
            work = Workload(prompt_tokens=64, new_tokens=64, repeat=5)
            for point in llm.points:
                rate = measure_latency(Pointed(llm, point), work).decode_tok_s
                found[point]["ms_per_token"] = 1e3 / rate.median if rate else None
    return found


class Pointed:
    """A model at one point."""

    def __init__(self, llm: LLM, point: str) -> None:
        self.llm, self.point, self.vocab_size = llm, point, llm.vocab_size

    def stream(self, prompt: Any, **options: Any) -> Any:
        return self.llm.stream(prompt, point=self.point, **options)


def markdown(results: dict[str, Any]) -> str:
    """The table, best KL first within a point."""
    lines = [
        "| way | point | KL, nats/token | KL p99 | top-1 | perplexity | relative layer error | MB read |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = [(p, f["kl_mean"], name, f, r) for name, r in results["ways"].items() for p, f in r["points"].items()]
    for point, _, name, f, r in sorted(rows, key=lambda row: (row[0], row[1])):
        lines.append(
            f"| {name} | {point} | {f['kl_mean']:.5f} ± {f['kl_pm']:.5f} | {f['kl_p99']:.4f} | {f['top1']:.4f} | "
            f"{f['perplexity']:.2f} ± {f['perplexity_pm']:.2f} | {r['relative']:.5f} | {f['bytes'] / 1e6:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Compress, measure, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--text", type=Path, action="append", default=[], help="held-out text; repeatable")
    parser.add_argument("--tokens", type=int, default=4096, help="of each text")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--only", action="append", choices=list(WAYS), help="these ways; repeatable")
    parser.add_argument("--out", type=Path, default=Path("compression.json"))
    parser.add_argument("--timed", action="store_true", help="time decoding too")
    parser.add_argument("--markdown", action="store_true", help="print the table of --out and stop")
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"ways": {}}
    if args.markdown:
        print(markdown(results))
        return
    encode = Tokenizer(args.checkpoint).encode
    with LLM(args.checkpoint, point="full", max_context=WINDOW + 1, speculate="off") as full:
        ids = held_out(full, args.text, args.tokens)
        results |= {"tokens": len(ids), "texts": [path.name for path in args.text]}
        for name in args.only or WAYS:
            if name in results["ways"]:
                continue
            with tempfile.TemporaryDirectory() as folder:
                recipe = recipe_of({"samples": args.samples, "length": args.length, "held": 2, **WAYS[name]})
                began = time.monotonic()
                artifact = compress(open_source(args.checkpoint), Path(folder) / "out", recipe, encode=encode)
                seconds = time.monotonic() - began
                log = [line for line in Artifact.open(artifact).meta["log"] if "weight" in line]
                results["ways"][name] = {
                    "recipe": WAYS[name],
                    "relative": sum(line["relative"] for line in log) / len(log),
                    "seconds": seconds,
                    "points": measure(full, artifact, ids, args.timed),
                }
            args.out.write_text(json.dumps(results, indent=1))
            print(name, json.dumps(results["ways"][name]["points"]), flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
