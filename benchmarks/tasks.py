"""Decisions in milliseconds: a fine-tuned model that chooses a label from a single prefill, beside TF-IDF + linear.

    python benchmarks/tasks.py ../shared/data/tasks --work FOLDER --task home --task financial --out results.json
    python benchmarks/tasks.py ../shared/data/tasks --work FOLDER --task home --only measure

Each task's file is split once by seed: 80 % to learn, 10 % to stop by, 10 % to judge, the last seen by nobody before.
The model is fine-tuned (`haomiao finetune`, PyTorch) on the first two, compressed by the pipeline (GPTQ on the task's
own text) and asked `LLM.decide` for each of the last; its accuracy stands with a 95 % interval (bootstrap) beside that
of scikit-learn's TF-IDF (words and characters) with logistic regression on the same split, whose strength is chosen on
the second part. `difference` is over the same examples (ours minus TF-IDF's). Where the last part is too small to tell
anything, `--folds 10` does all this ten times, each tenth being judged once by what has not seen it. Milliseconds are
of whole calls, one after the other. `--share 0.5` learns from half of the first part; `--only latency` asks the models
that are there for all points and thread counts in turns (`--rounds`), and judges nothing. The machine is printed first,
one JSON line last.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from haomiao.metrics.statistics import Interval, bootstrap_mean

Rows = list[tuple[str, str]]  # (text, label)
SEED = 1
WARMING = 20
LINEAR = "linear.json"
"""What TF-IDF said, in the folder of the split that it learnt from."""


def table(path: str, text: int, label: Callable[[list[str]], str]) -> Callable[[Path], Rows]:
    """A file of columns between tabs."""

    def read(root: Path) -> Rows:
        lines = (root / path).read_text(encoding="utf-8").splitlines()
        rows = [line.split("\t") for line in lines if line.strip()]
        return [(row[text], label(row)) for row in rows]

    return read


def json_lines(paths: Sequence[str], label: str) -> Callable[[Path], Rows]:
    """Files of JSON lines with a sentence."""

    def read(root: Path) -> Rows:
        lines = [line for path in paths for line in (root / path).read_text(encoding="utf-8").splitlines() if line]
        return [(row["sentence"], str(row[label])) for row in map(json.loads, lines)]

    return read


def comma_separated(path: str, text: str, label: str, encoding: str) -> Callable[[Path], Rows]:
    """A CSV file with a header."""

    def read(root: Path) -> Rows:
        with (root / path).open(encoding=encoding, newline="") as file:
            return [(row[text], row[label]) for row in csv.DictReader(file)]

    return read


def intents(path: str) -> Callable[[Path], Rows]:
    """CLINC150's file: parts of [text, label], those that belong to no label left out."""

    def read(root: Path) -> Rows:
        parts = json.loads((root / path).read_text(encoding="utf-8"))
        return [(text, label) for name in ("train", "val", "test") for text, label in parts[name]]

    return read


TASKS: dict[str, Callable[[Path], Rows]] = {
    "home": table("home_commands/home_trainset.tsv", 1, lambda row: row[0]),
    "slurp": table("slurp/slurp_devel.tsv", 2, lambda row: row[0]),  # the scenario: actions are too rare to learn here
    "snips": table("snips/snips_train.tsv", 1, lambda row: row[0]),
    "clinc": intents("clinc150/data_full.json"),
    "financial": comma_separated("financial_phrasebank/all-data.csv", "content", "label", "latin-1"),
    "tnews": json_lines(("tnews_zh/train_few_all.json", "tnews_zh/dev_few_all.json"), "label_desc"),
    "eprstmt": json_lines(("eprstmt_zh/train_few_all.json", "eprstmt_zh/dev_few_all.json"), "label"),
}


def splits(rows: Rows, fold: int = 0) -> tuple[Rows, Rows, Rows]:
    """Learn, stop, judge: 80, 10, 10 %, which each of ten folds turns by a tenth. What is said twice is in one part
    only; labels seen once are left out."""
    unique = list(dict.fromkeys((" ".join(text.split()), label) for text, label in rows))
    seen: set[str] = set()
    kept = [row for row in unique if row[0] not in seen and not seen.add(row[0])]  # type: ignore[func-returns-value]
    counts = {label: sum(other == label for _, other in kept) for _, label in kept}
    kept = [row for row in kept if counts[row[1]] > 1]
    random.Random(SEED).shuffle(kept)
    tenth = len(kept) // 10
    kept = kept[fold * tenth :] + kept[: fold * tenth]
    return kept[2 * tenth :], kept[:tenth], kept[tenth : 2 * tenth]


def write(path: Path, rows: Rows) -> Path:
    """Rows as the commands read them."""
    lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def learn(folder: Path, args: argparse.Namespace) -> None:
    """Fine-tune and compress; what is there is kept."""
    from haomiao.cli.main import main as haomiao

    model = [] if args.model is None else [args.model]
    threads = ["--threads", str(args.threads)]
    if not (folder / "model").exists():
        given = ["--data", str(folder / "train.jsonl"), "--valid", str(folder / "valid.jsonl"), *threads]
        limits = ["--length", "128", "--device", args.device, *args.finetune.split()]
        if haomiao(["finetune", *model, *given, *limits, "-o", str(folder / "model")]):
            raise SystemExit("fine-tuning did not end")
    if not (folder / "artifact").exists():
        rows = [json.loads(line) for line in (folder / "train.jsonl").open(encoding="utf-8")]
        asked = "\n".join(f"{row['text']}\n{row['label']}\n" for row in rows)
        (folder / "text.txt").write_text(asked, encoding="utf-8")
        given = ["--method", "gptq", "--text", str(folder / "text.txt"), "--length", "128", "--samples", "64", *threads]
        if haomiao(["compress", str(folder / "model"), "-o", str(folder / "artifact"), *given]):
            raise SystemExit("compression did not end")


def judge(folder: Path, rows: Rows, point: str, threads: int) -> tuple[list[float], list[float]]:
    """Which of the model's choices are right, and milliseconds of each call."""
    from haomiao.api import LLM

    right, took = [], []
    path = folder / ("artifact" if point != "full" else "model")
    with LLM(str(path), point=point, threads=threads, max_context=512, speculate="off") as llm:
        for text, _ in rows[:WARMING]:
            llm.decide(text)
        for text, label in rows:
            began = time.perf_counter()
            choice = llm.decide(text)
            took.append(1e3 * (time.perf_counter() - began))
            right.append(float(choice.option == label))
    return right, took


def linear(train: Rows, valid: Rows, test: Rows, cache: Path) -> tuple[list[float], list[float]]:
    """TF-IDF of words and of characters, logistic regression; its strength by accuracy on `valid`. Kept in `cache`."""
    if cache.exists():
        right, took = json.loads(cache.read_text())
        return right, took
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    def made(strength: float) -> Any:
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True)
        model = make_pipeline(make_union(words, characters), LogisticRegression(C=strength, max_iter=1000))
        return model.fit([text for text, _ in train], [label for _, label in train])

    def accuracy(model: Any, rows: Rows) -> list[float]:
        return [float(a == b) for a, (_, b) in zip(model.predict([t for t, _ in rows]), rows, strict=True)]

    models = [made(strength) for strength in (3.0, 30.0)]
    best = max(models, key=lambda model: float(np.mean(accuracy(model, valid))))
    took = []
    for text, _ in test:
        began = time.perf_counter()
        best.predict([text])
        took.append(1e3 * (time.perf_counter() - began))
    right = accuracy(best, test)
    cache.write_text(json.dumps([right, took]))
    return right, took


def account(right: list[float], took: list[float], other: list[float] | None = None) -> dict[str, Any]:
    """Accuracy, milliseconds, and (against `other`) the difference of accuracies over the same examples."""
    found: dict[str, Any] = {"accuracy": interval(bootstrap_mean(right)), "ms": milliseconds(took)}
    if other is not None:
        found["difference"] = interval(bootstrap_mean([a - b for a, b in zip(right, other, strict=True)]))
    return found


def interval(found: Interval) -> dict[str, float]:
    """An estimate with its ends."""
    return {"estimate": round(found.estimate, 4), "low": round(found.low, 4), "high": round(found.high, 4)}


def milliseconds(took: list[float]) -> dict[str, float]:
    """Median, 99th percentile, greatest."""
    return {"p50": float(np.percentile(took, 50)), "p99": float(np.percentile(took, 99)), "max": max(took)}


def prepare(name: str, fold: int, args: argparse.Namespace) -> tuple[Path, tuple[Rows, Rows, Rows]]:
    """The folder of a fold, with its three parts in it, and the parts."""
    folder = args.work / (name if fold == 0 else f"{name}-{fold}")
    if args.restart:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    train, valid, test = splits(TASKS[name](args.root), fold)
    train = train[: round(args.share * len(train))]
    for part, rows in (("train", train), ("valid", valid), ("test", test)):
        write(folder / f"{part}.jsonl", rows)
    return folder, (train, valid, test)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Our answers and TF-IDF's to what every fold kept for the end."""
    points = args.points.split(",")
    ours: dict[str, tuple[list[float], list[float]]] = {point: ([], []) for point in points}
    plain: tuple[list[float], list[float]] = ([], [])
    shown: Counter[str] = Counter()
    for fold in range(args.folds):
        folder, (train, valid, test) = prepare(name, fold, args)
        shown.update(label for _, label in test)
        for kept, new in (
            (plain, linear(train, valid, test, folder / LINEAR)),
            *((ours[p], judge(folder, test, p, args.threads)) for p in points),
        ):
            kept[0].extend(new[0])
            kept[1].extend(new[1])
    return {
        "labels": len({label for _, label in train}),
        "examples": [len(train), len(valid), shown.total()],
        "folds": args.folds,
        "most_frequent": round(max(shown.values()) / shown.total(), 4),
        "threads": args.threads,
        "haomiao": {point: account(*ours[point], plain[0]) for point in points},
        "linear": account(*plain),
    }


def latency(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a decision by point and threads, in turns, over what the first fold kept for the end."""
    folder, (_, _, test) = prepare(name, 0, args)
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        for threads in (1, 2):
            for point in args.points.split(","):
                _, took = judge(folder, test[: args.asked], point, threads)
                found.setdefault(f"{point}, {threads} thread{'s' * (threads > 1)}", []).append(milliseconds(took))
    return {
        way: {"calls": len(test[: args.asked]), **{k: sorted(round(turn[k], 3) for turn in turns) for k in turns[0]}}
        for way, turns in found.items()
    }


def main() -> None:
    """Split, learn, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the tasks")
    parser.add_argument("--task", action="append", choices=list(TASKS), required=True, help="repeatable")
    parser.add_argument("--work", type=Path, required=True, help="folder for splits and models")
    parser.add_argument("--model", help="what is fine-tuned (default: the embedded model)")
    parser.add_argument("--finetune", default="", metavar="FLAGS", help="more flags of haomiao finetune, in one word")
    parser.add_argument("--share", type=float, default=1.0, help="of what is learnt from, for the curve of data")
    parser.add_argument("--folds", type=int, default=1, choices=range(1, 11), metavar="N", help="of ten (default 1)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", choices=("learn", "measure", "latency"))
    parser.add_argument("--points", default="int8,int4")
    parser.add_argument("--rounds", type=int, default=3, help="of the latency")
    parser.add_argument("--asked", type=int, default=1000, help="at most so many texts a round of the latency")
    parser.add_argument("--restart", action="store_true", help="learn again")
    parser.add_argument("--out", type=Path, help="results; those of other tasks that are there are kept")
    args = parser.parse_args()

    from haomiao.measure.machine import describe_machine

    print(json.dumps(dataclasses.asdict(describe_machine()), default=str))
    results: dict[str, Any] = {}
    for name in args.task:
        if args.only in (None, "learn"):
            for fold in range(args.folds):
                learn(prepare(name, fold, args)[0], args)
            args.restart = False
        if args.only in (None, "measure"):
            results[name] = measure(name, args)
        if args.only == "latency":
            results[name] = {"latency_ms": latency(name, args)}
        if name in results:
            print(name, json.dumps(results[name]), flush=True)
    if args.out:
        kept = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.write_text(
            json.dumps(kept | {name: kept.get(name, {}) | results[name] for name in results}, indent=1) + "\n"
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
