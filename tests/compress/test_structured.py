"""Structured pruning: the choice against a slow dense one, the sizes, and whole models that get smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.compress.export.compressed_tensors import export
from haomiao.compress.prune import structured
from haomiao.compress.prune.structured import (
    block_costs,
    choose_blocks,
    choose_heads,
    choose_nested,
    compensate,
    damped,
)
from haomiao.compress.recipe import Recipe, parse_prune, recipe_of
from haomiao.compress.shrink import Sizes, shrunk_config, sizes_of, target_layers, target_width
from haomiao.errors import HaomiaoError, InputError, UnsupportedModelError
from haomiao.kernels.pack import unpack
from haomiao.load.artifact import Artifact
from haomiao.load.source import open_source
from haomiao.models.convert import convert
from haomiao.models.open import open_model
from haomiao.models.registry import plan_for
from tests.compress.straightforward import error_of, problem
from tests.compress.test_job import Stop, content, run
from tests.golden.cases import CASES, Case
from tests.golden.checkpoint import DictSource, random_checkpoint

SEEDS = st.integers(0, 2**16)


def fitted(w: np.ndarray, h: np.ndarray, kept: list[int]) -> np.ndarray:
    """Weights on `kept` that come nearest to w under h: the normal equations as they stand."""
    out = np.zeros_like(w, np.float64)
    out[:, kept] = w @ h[:, kept] @ np.linalg.inv(h[np.ix_(kept, kept)])
    return out


def slowly(w: np.ndarray, h: np.ndarray, size: int, stay: int) -> list[int]:
    """Blocks left after taking out, again and again, the one whose absence costs least; each is fitted anew."""
    left = list(range(w.shape[1] // size))
    while len(left) > stay:
        costs = {}
        for block in left:
            kept = [b * size + i for b in left if b != block for i in range(size)]
            costs[block] = error_of(w - fitted(w, h, kept), h).sum()
        left.remove(min(costs, key=lambda block: costs[block]))
    return left


@settings(max_examples=12, deadline=None)
@given(SEEDS, st.sampled_from([1, 2, 4]), st.integers(1, 7))
def test_the_choice_is_that_of_trying_every_block(seed: int, size: int, stay: int) -> None:
    w, h = problem(5, 8 * size, seed)
    kept = choose_blocks(w, h, size=size, quotas=[(np.arange(8), stay)])
    expected = slowly(w.astype(np.float64), damped(h, 0.01), size, stay)
    assert kept.tolist() == expected


@settings(max_examples=12, deadline=None)
@given(SEEDS)
def test_what_stays_is_the_least_squares_fit(seed: int) -> None:
    w, h = problem(7, 24, seed)
    kept = np.sort(np.random.default_rng(seed).choice(24, 13, replace=False))
    found, error = compensate(w, h, kept, 1e-8)
    expected = fitted(w.astype(np.float64), damped(h, 1e-8), kept.tolist())
    np.testing.assert_allclose(found, expected[:, kept], rtol=2e-3, atol=2e-4)
    assert error == pytest.approx(error_of(w - expected, h).sum(), rel=1e-3)


def test_the_cost_of_a_block_is_the_error_that_its_absence_makes() -> None:
    w, h = problem(6, 20, 3)
    h = damped(h, 0.01)
    costs = block_costs(w.T.astype(np.float64), np.linalg.inv(h), 4)
    for block in range(5):
        kept = [c for c in range(20) if c // 4 != block]
        assert costs[block] == pytest.approx(error_of(w - fitted(w.astype(np.float64), h, kept), h).sum(), rel=1e-6)


def test_every_kv_head_keeps_as_many_query_heads() -> None:
    w, h = problem(16, 12 * 4, 0)
    heads = choose_heads(w, h, head_dim=4, before=(3, 4), after=(3, 2))
    assert np.bincount(heads // 4, minlength=3).tolist() == [2, 2, 2]
    heads = choose_heads(w, h, head_dim=4, before=(3, 4), after=(2, 3))
    assert sorted(np.bincount(heads // 4, minlength=3).tolist()) == [0, 3, 3]
    whole = choose_heads(w, h, head_dim=4, before=(3, 4), after=(1, 4))
    assert whole.tolist() == list(range(whole[0], whole[0] + 4))
    assert whole[0] // 4 == slowly(w.astype(np.float64), damped(h, 0.01), 16, 1)[0]


def test_columns_beyond_the_quotas_are_padding_and_go() -> None:
    w, h = problem(4, 32, 1)
    w[:, 20:] = 0
    h[20:] = h[:, 20:] = 0
    kept = choose_blocks(w, h, size=1, quotas=[(np.arange(20), 16)])
    assert len(kept) == 16
    assert kept.max() < 20


@pytest.mark.parametrize("rounds", [512, 12])
def test_several_widths_at_once_are_those_chosen_one_by_one(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "ROUNDS", rounds)  # 12: four columns go at once, and 37 leave a part of four
    w, h = problem(6, 48, 3)
    stay = [41, 37, 24, 8]
    alone = [choose_blocks(w, h, size=1, quotas=[(np.arange(46), count)]).tolist() for count in stay]
    assert [kept.tolist() for kept in choose_nested(w, h, columns=46, stay=stay)] == alone
    assert [len(kept) for kept in alone] == stay


# ---- sizes


@pytest.mark.parametrize(
    ("prune", "expected"),
    [
        (["neurons:0.25"], Sizes(6, 384, 6, 2)),
        (["neurons:0.01"], Sizes(6, 480, 6, 2)),  # at least one group goes
        (["heads:0.34"], Sizes(6, 512, 4, 2)),
        (["heads:0.9"], Sizes(6, 512, 2, 2)),  # and one stays
        (["groups:0.5"], Sizes(6, 512, 3, 1)),
        (["groups:0.5", "heads:0.34"], Sizes(6, 512, 2, 1)),
        (["layers:0.34", "neurons:0.5"], Sizes(6, 256, 6, 2)),
        (["structured:0.3"], Sizes(6, 320, 6, 2)),  # no third of the heads fits into 30 %: neurons give it all
        (["structured:0.4"], Sizes(6, 288, 4, 2)),
    ],
)
def test_shares_become_sizes_that_can_be(prune: list[str], expected: Sizes) -> None:
    recipe = recipe_of({"prune": prune})
    attention, ffn = 192 * 32 * (6 + 2 * 2 + 6), 3 * 192 * 512
    assert target_width(Sizes(6, 512, 6, 2), recipe, (attention, ffn)) == expected


def test_layers_are_counted() -> None:
    assert [target_layers(6, recipe_of({"prune": f"layers:{s}"})) for s in (0.01, 0.34, 0.5, 0.99)] == [5, 4, 3, 1]
    assert target_layers(6, recipe_of({"prune": "neurons:0.5"})) == 6
    with pytest.raises(InputError, match="only one"):
        target_layers(1, recipe_of({"prune": "layers:0.5"}))


def test_a_group_of_128_is_kept_whole() -> None:
    assert target_width(Sizes(2, 512, 4, 2), recipe_of({"prune": "neurons:0.3", "group": 128}), (1, 1)).neurons == 384


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="not even"):
        target_width(Sizes(2, 96, 4, 2), recipe_of({"prune": "neurons:0.9"}), (1, 1))
    with pytest.raises(InputError, match="only one"):
        target_width(Sizes(2, 96, 4, 1), recipe_of({"prune": "groups:0.5"}), (1, 1))
    with pytest.raises(InputError, match="only one"):
        target_width(Sizes(2, 96, 2, 2), recipe_of({"prune": "heads:0.5"}), (1, 1))
    for prune in (["neurons:0.2", "neurons:0.3"], ["structured:0.2", "heads:0.3"], ["tile:0.2", "wanda:0.5"]):
        with pytest.raises(InputError, match="prune may hold"):
            recipe_of({"prune": prune})
    with pytest.raises(InputError, match="owl needs"):
        recipe_of({"prune": "neurons:0.2", "allocation": "owl"})
    with pytest.raises(InputError, match="needs one of"):
        parse_prune("neurons:2:4")


def test_configs_say_the_sizes() -> None:
    by_name = {case.name: case.config for case in CASES}
    llama = by_name["llama"] if "llama" in by_name else CASES[0].config
    smaller = shrunk_config(llama, Sizes(1, 64, 2, 1), [1])
    assert sizes_of(smaller) == Sizes(1, 64, 2, 1)
    assert smaller["head_dim"] == llama["hidden_size"] // llama["num_attention_heads"]
    assert "head_dim" not in llama
    gpt2 = next(case.config for case in CASES if case.family == "gpt2")
    now = sizes_of(gpt2)
    assert (
        sizes_of(shrunk_config(gpt2, Sizes(now.layers, 32, now.heads, now.kv_heads), range(now.layers))).neurons == 32
    )
    with pytest.raises(UnsupportedModelError, match="heads cannot be pruned"):
        shrunk_config(gpt2, Sizes(now.layers, now.neurons, 1, 1), range(now.layers))


# ---- whole models


def bigger(**changes: Any) -> Case:
    """A tiny model with something to take away."""
    config = {
        **CASES[0].config,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **changes,
    }
    return Case("tiny", config, seed=3)


@pytest.mark.parametrize(
    ("prune", "sizes"),
    [
        (["neurons:0.4"], (2, 96, 4, 2)),
        (["heads:0.5"], (2, 160, 2, 2)),
        (["groups:0.5"], (2, 160, 2, 1)),
        (["layers:0.5"], (1, 160, 4, 2)),
        (["structured:0.3", "layers:0.5", "tile:0.2"], (1, 96, 4, 2)),
        (["neurons:0.4", "sparsegpt:0.5"], (2, 96, 4, 2)),
    ],
    ids=str,
)
def test_the_model_really_gets_smaller_and_runs(prune: list[str], sizes: tuple[int, ...], tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", bigger())
    artifact = run(tmp_path / "out", bigger(), {"prune": prune})
    artifact.verify()
    assert sizes_of(artifact.meta["config"]) == Sizes(*sizes)
    assert artifact.nbytes < whole.nbytes
    plan = plan_for(artifact.meta["config"])
    assert {name: (t.rows, t.cols) for name, t in artifact.tensors.items()} == {
        name: (spec.rows, spec.cols) for name, spec in plan.weights.items() if spec.kind != "vector"
    }
    pruned = [line["pruned"] for line in artifact.meta["log"] if "pruned" in line]
    assert all(0 < line["kept"] < line["of"] and 0 < line["relative"] < 1 for line in pruned)
    assert open_model(tmp_path / "out").plan.layers == sizes[0]
    for figures in artifact.meta["errors"].values():
        assert 0 < figures["kl"]["estimate"] < 3


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "phi3", "qwen2", "qwen3", "smollm3"])
def test_other_families(family: str, tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name.startswith(family))
    prune = "neurons:0.34" if family == "gpt2" else "structured:0.34"
    artifact = run(tmp_path / "out", case, {"prune": prune, "awq": True, "rotate": family in ("qwen2", "qwen3")})
    now, left = sizes_of(case.config), sizes_of(artifact.meta["config"])
    assert left.neurons < now.neurons
    assert open_model(tmp_path / "out").plan.layers == now.layers


def test_layers_that_differ_by_their_place_are_not_moved(tmp_path: Path) -> None:
    config = {**CASES[0].config, "model_type": "gemma2", "num_hidden_layers": 4, "sliding_window": 8}
    with pytest.raises(HaomiaoError, match="differ by their place"):
        shrunk_config(config, Sizes(3, 96, 4, 2), [0, 2, 3])


def dead(case: Case, changes: dict[str, Any]) -> DictSource:
    """The case's checkpoint with rows or columns of some weights zeroed."""
    tensors = random_checkpoint(case.config, case.seed)
    for name, where in changes.items():
        tensors[name] = tensors[name].copy()
        tensors[name][where] = 0
    return DictSource(case.config, tensors)


def test_what_does_nothing_goes_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead neurons, heads and a layer are found, and without them the model answers as before."""
    case = bigger(num_hidden_layers=3)
    rng = np.random.default_rng(0)
    changes: dict[str, Any] = {}
    for layer in (0, 2):
        prefix = f"model.layers.{layer}."
        changes[f"{prefix}mlp.up_proj.weight"] = rng.permutation(160)[:64]
        changes[f"{prefix}self_attn.o_proj.weight"] = np.s_[:, np.r_[0:16, 48:64]]  # heads 0 and 3, one of each KV head
    for name in ("mlp.down_proj", "self_attn.o_proj"):
        changes[f"model.layers.1.{name}.weight"] = np.s_[:]
    monkeypatch.setattr("tests.compress.test_job.source_of", lambda _: dead(case, changes))
    whole = run(tmp_path / "whole", case)
    artifact = run(tmp_path / "out", case, {"prune": ["neurons:0.4", "heads:0.5", "layers:0.34"]})
    assert sizes_of(artifact.meta["config"]) == Sizes(2, 96, 2, 2)
    assert next(line["layer"] for line in artifact.meta["log"] if "layer" in line) == 1
    for point in ("int8", "int4"):
        before, after = (a.meta["errors"][point]["kl"]["estimate"] for a in (whole, artifact))
        assert after < 1.5 * before + 1e-4


def test_compensation_is_worth_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same choice with the other weights left as they are."""
    solved = run(tmp_path / "solved", bigger(), {"prune": "neurons:0.4"})

    def left_alone(w: Any, h: Any, kept: Any, damping: float = 0.01) -> tuple[Any, float]:
        return np.ascontiguousarray(w[:, kept]), 0.0

    monkeypatch.setattr("haomiao.compress.width.compensate", left_alone)
    plain = run(tmp_path / "plain", bigger(), {"prune": "neurons:0.4"})
    kl = [a.meta["errors"]["int8"]["kl"]["estimate"] for a in (solved, plain)]
    assert kl[0] < kl[1]


def test_an_interruption_changes_no_byte(tmp_path: Path) -> None:
    recipe = {"prune": ["structured:0.3", "layers:0.5"], "awq": True}
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    run(tmp_path / "whole", bigger(), recipe, progress=count)
    out = tmp_path / "cut"
    for at in sorted(np.random.default_rng(1).integers(1, calls, 5).tolist()):
        seen = 0

        def stop(*_: object, at: int = at) -> None:
            nonlocal seen
            seen += 1
            if seen == at:
                raise Stop

        try:
            run(out, bigger(), recipe, progress=stop)
            break
        except Stop:
            assert not out.exists()
    if not out.exists():
        run(out, bigger(), recipe)
    assert content(out) == content(tmp_path / "whole")


def test_a_recipe_is_spelt_as_it_is_read() -> None:
    recipe: Recipe = recipe_of({"prune": ["structured:0.3", "tile:0.2", "layers:0.25"]})
    assert recipe_of(recipe.as_dict()) == recipe
    assert recipe.mask is not None
    assert [each.kind for each in recipe.structured] == ["structured", "layers"]


def test_what_is_exported_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    artifact = run(tmp_path / "out", bigger(), {"prune": "structured:0.3"})
    source = open_source(export(artifact, tmp_path / "ct", "int4"))
    assert tuple(source.shape("model.layers.0.mlp.down_proj.weight")) == (64, 96)
    again = Artifact.open(convert(source, tmp_path / "again", scheme="exact"))
    for name, spec in plan_for(artifact.meta["config"]).weights.items():
        if spec.role == "body":
            np.testing.assert_array_equal(unpack(again.tensors[name]), unpack(artifact.tensors[name], "hi"))
