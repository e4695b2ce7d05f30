"""The file of results: samples gather in it over several short runs; summaries, ratios and the table come from them.

Knows nothing about engines. Samples of our own engine are kept only as long as the commit is the same; those of a peer
as long as the line's work is.
"""

from __future__ import annotations

import datetime
import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from haomiao.metrics.statistics import summarize
from peerlib.lines import Line

OURS = "haomiao"
TITLES = {"tok_s": "tok/s", "p99_ms": "ms", "exit_ms": "ms"}


class Results:
    """benchmarks/results/<name>.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"benchmark": "peers", "lines": {}}
        if path.exists():
            self.data = json.loads(path.read_text(encoding="utf-8"))

    def line(self, line: Line, threads: int, commit: str | None) -> dict[str, Any]:
        """The record of a line, emptied of what no longer belongs together."""
        settings = {**asdict(line), "threads": threads}
        for key in ("target", "ratio", "share", "engines"):
            settings.pop(key)
        record: dict[str, Any] = self.data["lines"].get(line.name, {})
        if record.get("settings") != settings:
            record = {"settings": settings, "samples": {}, "missing": {}, "disturbed": {}, "ceilings": []}
        if record.get("commit") != commit:
            record["samples"].pop(OURS, None)
            record["commit"] = commit
        self.data["lines"][line.name] = record
        return record

    def write(self, line: Line) -> None:
        """Summarize a line and save everything, written beside its name and renamed."""
        record = self.data["lines"][line.name]
        record["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record["summary"] = summary(line, record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def summary(line: Line, record: dict[str, Any]) -> dict[str, Any]:
    """Medians and extremes of every engine, the best peer, our ratio to it, and everyone's share of the limit.

    A share is that of a round: the sample against the ceilings that were measured just before it.
    """
    engines: dict[str, Any] = {}
    for name, samples in record["samples"].items():
        if not samples:
            continue
        keys = [key for key in samples[0] if key != "round" and all(s.get(key) is not None for s in samples)]
        engines[name] = {key: summarize([s[key] for s in samples]).as_dict() for key in keys}
        if line.metric not in engines[name]:
            continue
        limits = [line.limit_tok_s(**record["ceilings"][s["round"]]) for s in samples]
        if None not in limits:
            shares = [s[line.metric] / limit for s, limit in zip(samples, limits, strict=True) if limit]
            engines[name]["share_of_limit"] = summarize(shares).as_dict()
    medians = {name: figures[line.metric]["median"] for name, figures in engines.items() if line.metric in figures}
    peers = {name: value for name, value in medians.items() if name != OURS}
    found: dict[str, Any] = {"engines": engines}
    if OURS in medians and peers:
        best = (min if line.lower_is_better else max)(peers, key=lambda name: peers[name])
        ratio = medians[OURS] / peers[best]
        found |= {"best_peer": best, "ratio": 1 / ratio if line.lower_is_better else ratio}
    return found


def shown(line: Line, figures: dict[str, Any] | None) -> str:
    """`93.1 [90.2, 98.3]`, or a dash."""
    if not figures or line.metric not in figures:
        return "–"
    s = figures[line.metric]
    digits = 0 if s["median"] >= 200 else 1
    return f"{s['median']:.{digits}f} [{s['low']:.{digits}f}, {s['high']:.{digits}f}]"


def table(lines: dict[str, Line], data: dict[str, Any]) -> str:
    """A Markdown table of everything in the file."""
    names = [OURS]
    for record in data["lines"].values():
        names += [name for name in record["samples"] if name not in names]
    rows = [
        "| line | unit | " + " | ".join(names) + " | ratio to best peer | our share of the limit | target |",
        "|---" * (len(names) + 5) + "|",
    ]
    for name, record in data["lines"].items():
        line, found = lines.get(name), record.get("summary")
        if line is None or found is None:
            continue
        ours = found["engines"].get(OURS, {})
        share = ours.get("share_of_limit")
        cells = [name, TITLES[line.metric], *(shown(line, found["engines"].get(engine)) for engine in names)]
        cells.append(f"{found['ratio']:.2f} ({found['best_peer']})" if "ratio" in found else "–")
        cells += [f"{share['median']:.0%}" if share else "–", line.target]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def commit_of(folder: Path) -> str | None:
    """The last commit that changed the engine, with a mark if it has changes since."""
    engine = [":/src", ":/native", ":/CMakeLists.txt"]

    def git(*arguments: str) -> str:
        command = ["git", *arguments, "--", *engine]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("log", "-1", "--format=%h", "--abbrev=12")
    return f"{commit}-dirty" if commit and git("status", "--porcelain") else commit or None
