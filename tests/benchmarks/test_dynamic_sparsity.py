"""The experiment with dynamic sparsity: groups, thresholds, what is skipped, and the arithmetic of time."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from haomiao.api import LLM
from haomiao.load.artifact import Artifact
from haomiao.models.open import embedded_path
from haomiao.models.registry import plan_for

ROOT = Path(__file__).resolve().parents[2]
MODEL = embedded_path()
TEXT = "The quick brown fox jumps over the lazy dog, and then it rests beside the river until the evening comes."


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dynamic_sparsity", ROOT / "benchmarks" / "dynamic_sparsity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dynamic_sparsity"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(bench: ModuleType) -> Any:
    with Artifact.open(MODEL) as artifact:
        plan = plan_for(artifact.meta["config"], 128)
        return bench.Model(plan, dict(artifact.tensors), dict(artifact.vectors), "int8")


@pytest.fixture(scope="module")
def ids() -> list[int]:
    with LLM(MODEL, speculate="off", threads=1) as llm:
        return llm.tokenize(TEXT)


def test_neurons_that_are_active_together_come_together(bench: ModuleType) -> None:
    random = np.random.default_rng(5)
    blocks = random.random((400, 9)) < 0.5  # nine groups of four, hidden by a permutation
    where = random.permutation(36)
    active = np.repeat(blocks, 4, axis=1)[:, where] ^ (random.random((400, 36)) < 0.02)
    member = bench.put_together(active, 4)
    assert sorted(np.bincount(member)) == [4] * 9
    for group in range(9):
        assert len({int(w) // 4 for w in where[member == group]}) == 1


def test_a_last_group_holds_what_is_left(bench: ModuleType) -> None:
    member = bench.put_together(np.random.default_rng(6).random((50, 11)) < 0.5, 4)
    assert np.bincount(member).tolist() == [4, 4, 3]


def test_swaps_only_help(bench: ModuleType) -> None:
    active = np.random.default_rng(7).random((60, 24)) < 0.4
    signs = np.where(active, 1, -1).astype(np.float32)
    agree = signs.T @ signs / 60

    def together(rounds: int) -> float:
        member = bench.put_together(active, 4, rounds)
        return float(agree[member[:, None] == member[None, :]].sum())

    assert together(50) > together(0)


def test_sums_over_groups(bench: ModuleType) -> None:
    values = np.arange(12, dtype=np.float32).reshape(2, 6)
    member = np.array([1, 0, 2, 1, 0, 2], np.int32)
    assert bench.summed(values, member).tolist() == [[1 + 4, 0 + 3, 2 + 5], [7 + 10, 6 + 9, 8 + 11]]


def test_the_forward_pass_is_the_engines(bench: ModuleType, model: Any, ids: list[int]) -> None:
    with LLM(MODEL, speculate="off", threads=1) as llm:
        engine = llm.logits(ids, point="int8").copy()
    ours = model.logits(ids)
    assert ours.shape == engine.shape
    with Artifact.open(MODEL) as artifact:
        config = artifact.meta["config"]
    size = config["num_hidden_layers"] * 3 * config["intermediate_size"] * config["hidden_size"]
    assert model.ffn_bytes == size * 17 // 16  # both planes, and two bytes a group of 32
    assert np.abs(ours - engine).max() < 0.05 * np.abs(engine).max()  # the engine's activations have eight bits
    assert (ours.argmax(axis=1) == engine.argmax(axis=1)).mean() > 0.9


@pytest.mark.parametrize("way", ["gate", "product"])
def test_thresholds_decide_what_is_skipped(bench: ModuleType, model: Any, ids: list[int], way: str) -> None:
    record = bench.Record()
    plain = model.logits(ids, record)
    changes = []
    for share in (-1.0, 0.25, 0.5, 2.0):
        groups = {}
        for place, parts in record.squares[way].items():
            member = np.arange(parts[0].shape[1], dtype=np.int32) // 4
            sums = bench.summed(parts[0], member)
            limit = -1.0 if share < 0 else np.inf if share > 1 else float(np.quantile(sums, share))
            groups[place] = member, limit
        skip = bench.Groups(way, groups)
        changes.append(float(np.abs(model.logits(ids, skip) - plain).mean()))
        if 0 < share < 1:  # the first layer's are the very scores that the threshold was taken from
            first = skip.kept[min(skip.kept)][0]
            assert abs(1 - first.mean() - share) < 0.01
            assert skip.skipped(4) < skip.skipped(1)
        else:
            assert skip.skipped(1) == (share > 1)
    assert changes == sorted(changes)
    assert changes[0] == 0 < changes[1]


def test_time_and_the_static_front(bench: ModuleType, tmp_path: Path) -> None:
    assert bench.step_time("gate", 0.0, 4, "free") == 1
    assert bench.step_time("oracle", 1.0, 4, "free") == pytest.approx(1 - bench.FFN_MB / bench.STEP_MB)
    assert bench.step_time("gate", 0.0, 8, "threads2") > 1  # a layout that can skip costs even if nothing is
    assert bench.step_time("product", 0.5, 4, "threads2") < bench.step_time("product", 0.5, 1, "threads2")
    path = tmp_path / "table.jsonl"
    lines: list[dict[str, Any]] = [{"about": {}}, {"way": "rtn-g32", "points": {"int4": {"bytes": 1, "kl_mean": 9.0}}}]
    for way, size, kl in (("neurons-10", 900, 0.04), ("gptq-g32", 1000, 0.01)):
        lines.append({"way": way, "points": {"int4": {"bytes": size, "kl_mean": kl}}})
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    static = bench.static_points(path, "int4", 800)
    assert static == [(0.0, 0.01), (0.125, 0.04)]
    ffn = bench.FFN_MB / bench.STEP_MB
    assert bench.front(static, 1.0) == pytest.approx(0.01)
    assert bench.front(static, 1 - 0.0625 * ffn) == pytest.approx(0.02)
    assert bench.front(static, 0.5) is None
    assert bench.front(static, 1.1) is None
    assert bench.static_points(None, "int4", 800) == []
    assert bench.static_points(path, "int8", 800) == []
