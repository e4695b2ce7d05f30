"""Compress a trained model in many ways and measure each: a table of their errors, and the Pareto front.

    python benchmarks/compression.py table CHECKPOINT --text english.txt --text chinese.txt --out RESULTS.jsonl
    python benchmarks/compression.py times CHECKPOINT --keep FOLDER --out RESULTS.jsonl
    python benchmarks/compression.py report --out RESULTS.jsonl --svg front.svg

`table`: every way is calibrated on the package's default text and measured on --text, which is not in it: KL from the
original weights, top-1 agreement, perplexity, each with half of a 95 % interval, bytes of weights that a decode step
reads. A line is added to --out after every way; ways that have one are skipped, so that a run goes on where it was.
--jobs ways run at once, one thread each: their accuracy does not depend on it. `times` decodes with the artifacts that
`table --keep` left, in turns, and needs a quiet machine. `report` prints the table and draws the front.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from compressionlib.report import draw, table
from compressionlib.ways import WAYS

WINDOW = 512


def read_lines(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
    """(what was measured on, way -> record, way -> point -> ms a token) of a file of results."""
    about: dict[str, Any] = {}
    records: dict[str, dict[str, Any]] = {}
    times: dict[str, dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        record = json.loads(line)
        if "about" in record:
            about = record["about"]
        elif "ms_per_token" in record:
            times[record["way"]] = record["ms_per_token"]
        else:
            records[record["way"]] = record
    return about, records, times


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


# ---- errors


class Measured:
    """The original model's logits on the held-out text, computed once in a process."""

    def __init__(self, args: argparse.Namespace) -> None:
        from haomiao.api import LLM

        with LLM(args.checkpoint, point="full", max_context=WINDOW + 1, speculate="off", threads=1) as full:
            self.ids: list[int] = []
            for path in args.text:
                text = path.read_text(encoding="utf-8")
                self.ids += full.tokenize(text[len(text) // 3 :][: args.tokens * 8])[: args.tokens]
            windows = (self.ids[i : i + WINDOW] for i in range(0, len(self.ids), WINDOW))
            self._logits = {tuple(ids): full.logits(ids).copy() for ids in windows}

    def logits(self, ids: Any) -> Any:
        """As `LLM.logits`."""
        return self._logits[tuple(ids)]

    def figures(self, artifact: Path) -> dict[str, Any]:
        """Of every point of an artifact."""
        from haomiao.api import LLM
        from haomiao.measure.accuracy import measure_against
        from haomiao.measure.bytes import weight_bytes_per_step
        from haomiao.measure.report import point_report

        with LLM(artifact, max_context=WINDOW + 1, speculate="off", threads=1) as llm:
            candidates = {p: functools.partial(llm.logits, point=p) for p in llm.points}
            found = measure_against(self.logits, candidates, self.ids, window=WINDOW)
            return {
                point: point_report(result) | {"bytes": weight_bytes_per_step(llm.plan, llm.weights, point)}
                for point, result in found.items()
            }


def one_way(args: argparse.Namespace, measured: Measured, name: str) -> dict[str, Any]:
    """Compress and measure."""
    from haomiao.compress.job import compress
    from haomiao.compress.recipe import recipe_of
    from haomiao.load.artifact import Artifact
    from haomiao.load.source import open_source
    from haomiao.text.tokenizer import Tokenizer

    recipe = recipe_of({"samples": args.samples, "length": args.length, "held": 2, **WAYS[name].recipe})
    with tempfile.TemporaryDirectory() as folder:
        out = (args.keep or Path(folder)) / name.replace(":", "-")
        began = time.monotonic()
        encode = Tokenizer(args.checkpoint).encode
        compress(open_source(args.checkpoint), out, recipe, encode=encode, threads=1, overwrite=True)
        seconds = time.monotonic() - began
        with Artifact.open(out) as artifact:
            layers = [line for line in artifact.meta["log"] if "weight" in line]
            size = (out / "model.haomiao").stat().st_size
        return {
            "way": name,
            "recipe": WAYS[name].recipe,
            "relative": sum(line["relative"] for line in layers) / len(layers),
            "edge_shifts": [line["lo_shift"] for line in layers if "lo_shift" in line],
            "seconds": round(seconds, 1),
            "file_bytes": size,
            "points": measured.figures(out),
        }


_MEASURED: list[Any] = []


def begin_worker(args: argparse.Namespace) -> None:
    """What a process of the pool holds."""
    _MEASURED[:] = [args, Measured(args)]


def work(name: str) -> dict[str, Any]:
    """One way in a process of the pool."""
    return one_way(_MEASURED[0], _MEASURED[1], name)


def run_table(args: argparse.Namespace) -> None:
    """All ways that --out has not yet."""
    _, records, _ = read_lines(args.out)
    names = [name for name in args.only or WAYS if name not in records]
    if not records:
        about = {"texts": [path.name for path in args.text], "tokens_of_each": args.tokens, "window": WINDOW}
        about |= {"checkpoint": args.name or Path(args.checkpoint).name, "samples": args.samples, "length": args.length}
        append(args.out, {"about": about})
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of the processes to come
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.jobs, begin_worker, (args,)) as pool:
        for done, record in enumerate(pool.imap_unordered(work, names), 1):
            append(args.out, record)
            kl = {point: round(f["kl_mean"], 5) for point, f in record["points"].items()}
            print(f"[{done}/{len(names)}] {record['way']}: KL {kl}, {record['seconds']} s", flush=True)


# ---- speed


def run_times(args: argparse.Namespace) -> None:
    """Milliseconds a token of every artifact and point, in turns: `--repeat` rounds over all of them."""
    from haomiao.api import LLM
    from haomiao.measure.latency import Workload, measure_latency

    class Pointed:
        def __init__(self, llm: LLM, point: str) -> None:
            self.llm, self.point, self.vocab_size = llm, point, llm.vocab_size

        def stream(self, prompt: Any, **options: Any) -> Any:
            return self.llm.stream(prompt, point=self.point, **options)

    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(args.repeat):
        for name in args.only or WAYS:
            path = args.keep / name.replace(":", "-")
            if not path.is_dir():
                continue
            with LLM(path, max_context=WINDOW + 1, speculate="off", threads=args.threads) as llm:
                for point in llm.points:
                    work = Workload(prompt_tokens=64, new_tokens=64, repeat=1)
                    rate = measure_latency(Pointed(llm, point), work).decode_tok_s
                    if rate:
                        found.setdefault(name, {}).setdefault(point, []).append(1e3 / rate.median)
    for name, points in found.items():
        medians = {point: statistics.median(values) for point, values in points.items()}
        append(args.out, {"way": name, "ms_per_token": medians, "all": points})
        print(name, {point: round(ms, 3) for point, ms in medians.items()})


# ---- report


def run_report(args: argparse.Namespace) -> None:
    """The table, and the plot."""
    about, records, times = read_lines(args.out)
    print(table(records, times, args.language))
    if args.svg:
        title = f"{about.get('checkpoint', '')}: error over bytes"
        args.svg.write_text(draw(records, title), encoding="utf-8")


def main() -> None:
    """Read the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("table", "times", "report"):
        command = commands.add_parser(name)
        if name != "report":
            command.add_argument("checkpoint")
        if name in ("table", "times"):
            command.add_argument("--only", action="append", choices=list(WAYS), help="these ways; repeatable")
            command.add_argument("--keep", type=Path, required=name == "times", help="folder for the artifacts")
        command.add_argument("--out", type=Path, default=Path("compression.jsonl"))
        if name == "times":
            command.add_argument("--threads", type=int, default=None)
        if name == "table":
            command.add_argument("--text", type=Path, action="append", required=True, help="held-out text; repeatable")
            command.add_argument("--tokens", type=int, default=2048, help="of each text")
            command.add_argument("--samples", type=int, default=64)
            command.add_argument("--length", type=int, default=256)
            command.add_argument("--jobs", type=int, default=2)
            command.add_argument("--name", help="of the model, for the report (default: the folder's)")
        if name == "times":
            command.add_argument("--repeat", type=int, default=5)
        if name == "report":
            command.add_argument("--svg", type=Path)
            command.add_argument("--language", choices=("en", "zh"), default="en")
    args = parser.parse_args()
    {"table": run_table, "times": run_times, "report": run_report}[args.command](args)


if __name__ == "__main__":
    main()
