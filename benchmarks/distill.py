"""How much of what compression lost distillation brings back.

    python benchmarks/distill.py CHECKPOINT --learn text.txt --learn text-zh.txt --test held.txt --test held-zh.txt \\
        --work FOLDER [--prune sparsegpt:0.5] [--point int4] [--samples 256] [--epochs 3] [--batch 4] [--rate 0.0005] \\
        [--hidden 10] --out results.json

CHECKPOINT is compressed (GPTQ, --prune, int4 with a second plane, the package's calibration text), the artifact learns
from CHECKPOINT on --learn (`haomiao distill`, PyTorch), and the engine measures both against CHECKPOINT at `full` on
--test, which neither saw: KL with 95 % intervals, top-1 agreement, perplexity. `recovered` is 1 - after / before. The
share of zero codes of both stands beside it: masks are kept. The machine is printed first, one JSON line last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from haomiao.api import LLM
from haomiao.compress.job import compress
from haomiao.compress.recipe import recipe_of
from haomiao.kernels.pack import unpack_codes
from haomiao.load.artifact import Artifact
from haomiao.load.source import open_source
from haomiao.measure.accuracy import measure_against
from haomiao.measure.machine import describe_machine
from haomiao.measure.report import point_report
from haomiao.text.tokenizer import Tokenizer

WINDOW = 512


def measured(checkpoint: str, artifacts: dict[str, Path], texts: list[Path], count: int) -> dict[str, Any]:
    """Figures of every point of every artifact against the checkpoint, by text."""
    found: dict[str, Any] = {}
    with LLM(checkpoint, point="full", max_context=WINDOW + 1, speculate="off") as full:
        for path in texts:
            text = path.read_text(encoding="utf-8")
            ids = full.tokenize(text[len(text) // 3 :][: count * 8])[:count]
            for name, artifact in artifacts.items():
                with LLM(str(artifact), max_context=WINDOW + 1, speculate="off") as llm:
                    ways = {p: lambda ids, p=p, llm=llm: llm.logits(ids, point=p) for p in llm.points}
                    for point, result in measure_against(full.logits, ways, ids, window=WINDOW).items():
                        found.setdefault(path.name, {}).setdefault(point, {})[name] = point_report(result)
    return found


def zeros(artifact: Path) -> float:
    """Share of the body's codes that are zero."""
    counts = [
        (np.count_nonzero(unpack_codes(tensor, "hi")[0] == 0), tensor.rows * tensor.cols)
        for name, tensor in Artifact.open(artifact).tensors.items()
        if name.startswith("layers.")
    ]
    return float(sum(zero for zero, _ in counts) / sum(size for _, size in counts))


def main() -> None:
    """Compress, distill, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--learn", action="append", required=True, help="text to learn from; repeatable")
    parser.add_argument("--test", type=Path, action="append", required=True, help="text to judge by; repeatable")
    parser.add_argument("--tokens", type=int, default=4096, help="of each --test")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--prune", default="sparsegpt:0.5")
    parser.add_argument("--point", help="train this point alone")
    parser.add_argument("--divergence", help="forward or reverse")
    for name, kind in (("samples", int), ("epochs", int), ("batch", int), ("rate", float), ("hidden", float)):
        parser.add_argument(f"--{name}", type=kind, help="as of haomiao distill")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    from haomiao.train.distill import Distillation, distill
    from haomiao.train.starting import open_starting

    print(json.dumps(dataclasses.asdict(describe_machine()), default=str))
    before, after = args.work / "compressed", args.work / "distilled"
    if not before.exists():
        recipe = recipe_of({"prune": args.prune, "samples": 96, "length": 256, "held": 2})
        compress(open_source(args.checkpoint), before, recipe, encode=Tokenizer(args.checkpoint).encode)
    seconds = None
    if not after.exists():
        names = ("divergence", "samples", "epochs", "batch", "rate", "hidden", "point")
        settings = Distillation(**{n: v for n in names if (v := getattr(args, n)) is not None})
        began = time.monotonic()
        models = open_starting(args.checkpoint), open_starting(str(before))
        report = distill(*models, after, settings, text=args.learn, device=args.device, threads=args.threads)
        if report is None:
            raise SystemExit("stopped; the same command goes on")
        seconds = time.monotonic() - began
    texts = measured(args.checkpoint, {"before": before, "after": after}, args.test, args.tokens)
    lost = {
        point: {
            name: float(np.mean([t[point][name]["kl_mean"] for t in texts.values()])) for name in ("before", "after")
        }
        for point in next(iter(texts.values()))
    }
    results = {
        "prune": args.prune,
        "settings": Artifact.open(after).meta["provenance"]["distilled"]["settings"],
        "seconds": seconds,
        "zeros": {"before": zeros(before), "after": zeros(after)},
        "kl": lost,
        "recovered": {point: 1 - each["after"] / each["before"] for point, each in lost.items()},
        "texts": texts,
    }
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
