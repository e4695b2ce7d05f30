"""The parts of benchmarks/tasks.py that decide: who learns from what, and what is kept of results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
if not (FOLDER / "tasks.py").exists():
    pytest.skip("the benchmarks are not beside the tests", allow_module_level=True)
sys.path.insert(0, str(FOLDER))
import tasks  # noqa: E402

ROWS = [(f"sentence {i}", f"label {i % 3}") for i in range(207)]


def test_no_text_is_learnt_and_judged() -> None:
    for fold in range(10):
        parts = tasks.splits([*ROWS, ("sentence  5", "label 1"), ("alone", "rare")], fold)
        texts = [{text for text, _ in part} for part in parts]
        assert sum(map(len, texts)) == len(set.union(*texts)) == len(ROWS)
        assert (len(parts[1]), len(parts[2])) == (20, 20)


def test_ten_folds_judge_nothing_twice() -> None:
    judged = [row for fold in range(10) for row in tasks.splits(ROWS, fold)[2]]
    assert len(set(judged)) == len(judged) == 200
    assert set(judged) < set(ROWS)


def test_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("greet\thello\n\nleave\tgood bye\n", encoding="utf-8")
    assert tasks.table("a.tsv", 1, lambda row: row[0])(tmp_path) == [("hello", "greet"), ("good bye", "leave")]
    (tmp_path / "b.json").write_text('{"sentence": "你好", "label": 1}\n', encoding="utf-8")
    assert tasks.json_lines(["b.json"], "label")(tmp_path) == [("你好", "1")]
    (tmp_path / "c.csv").write_bytes('label,content\nneutral,"caf\xe9, closed"\n'.encode("latin-1"))
    assert tasks.comma_separated("c.csv", "content", "label", "latin-1")(tmp_path) == [("café, closed", "neutral")]
    parts = {"train": [["hi", "greet"]], "val": [], "test": [["bye", "leave"]], "oos_val": [["what", "oos"]]}
    (tmp_path / "d.json").write_text(json.dumps(parts), encoding="utf-8")
    assert tasks.intents("d.json")(tmp_path) == [("hi", "greet"), ("bye", "leave")]


def test_accuracies_stand_beside_their_difference() -> None:
    ours, other = [1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]
    found = tasks.account(ours, [1.0, 2.0, 3.0, 10.0], other)
    assert found["accuracy"]["estimate"] == 0.75
    assert found["difference"]["estimate"] == 0.5
    assert found["ms"]["p50"] == 2.5
    assert found["ms"]["max"] == 10.0
