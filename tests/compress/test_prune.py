"""Masks, SparseGPT against an independent implementation, joint pruning and rounding, and its identities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.compress.layer import solve_layer
from haomiao.compress.prune.masks import (
    compensate_tiles,
    empty_tiles,
    keep_n_of_m,
    keep_tiles,
    outlier_share,
    owl_shares,
    pattern_mask,
    sparsegpt,
    tile_costs,
    tile_mask,
)
from haomiao.compress.prune.sparse import sparsify
from haomiao.compress.quantize.gptq import gptq
from haomiao.compress.recipe import parse_prune, recipe_of
from haomiao.errors import InputError
from haomiao.kernels.pack import unpack
from haomiao.kernels.rtn import quantize_planes
from tests.compress.straightforward import error_of, problem, surgeon
from tests.compress.test_job import run


@given(st.integers(4, 40), st.integers(8, 100), st.floats(0.1, 0.9), st.integers(0, 99))
@settings(max_examples=10)
def test_it_is_sparsegpt_written_out(rows: int, cols: int, share: float, seed: int) -> None:
    """One unit of up to 128 columns: the mask is chosen from the weights as they are, then the surgeon runs."""
    weights, hessian = problem(rows, cols, seed)
    prune = parse_prune(f"sparsegpt:{share}")
    found, kept, errors = sparsify(weights, hessian, choose=sparsegpt(prune, share))
    damping = 0.01 * np.diagonal(hessian).mean()
    # U_jj² is the diagonal of the inverse at the moment that j is eliminated
    damped = hessian + damping * np.eye(cols)
    diagonal = np.array([np.linalg.inv(damped[j:, j:])[0, 0] for j in range(cols)])
    scores = weights.astype(np.float64) ** 2 / diagonal
    threshold = np.sort(scores.reshape(-1))[int(scores.size * share) - 1] if int(scores.size * share) else -1.0
    expected_mask = scores > threshold
    assert (kept == expected_mask).mean() > 0.995
    expected = surgeon(weights, hessian, damping, np.arange(cols), lambda j, w, d: w * kept[:, j])
    np.testing.assert_allclose(found, expected, atol=5e-3 * np.abs(expected).max())
    assert (found[~kept] == 0).all()
    assert errors.sum() == pytest.approx(error_of(weights - found.astype(np.float64), damped).sum(), rel=2e-3)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:2"])
@pytest.mark.parametrize("kind", ["magnitude", "wanda", "sparsegpt"])
def test_n_of_every_m(kind: str, pattern: str) -> None:
    weights, hessian = problem(16, 64, 2)
    prune = parse_prune(f"{kind}:{pattern}")
    n, m = map(int, pattern.split(":"))
    if kind == "sparsegpt":
        codes = gptq(weights, hessian, choose=sparsegpt(prune, prune.share)).codes
        zeros = (codes == 0).reshape(16, -1, m).sum(axis=2)
        assert (zeros >= n).all()
    else:
        kept = pattern_mask(prune, weights, hessian, prune.share)
        assert ((~kept).reshape(16, -1, m).sum(axis=2) == n).all()


def test_wanda_is_per_row_and_magnitude_is_not() -> None:
    weights, hessian = problem(8, 50, 4)
    weights[0] *= 100
    wanda = pattern_mask(parse_prune("wanda:0.5"), weights, hessian, 0.5)
    assert ((~wanda).sum(axis=1) == 25).all()
    scores = np.abs(weights) * np.sqrt(np.diagonal(hessian))
    for row in range(8):
        assert scores[row][~wanda[row]].max() <= scores[row][wanda[row]].min() * (1 + 1e-6)
    magnitude = pattern_mask(parse_prune("magnitude:0.5"), weights, hessian, 0.5)
    assert magnitude.mean() == 0.5
    assert magnitude[0].mean() > magnitude[1:].mean()


def test_ties_and_remainders() -> None:
    assert keep_n_of_m(np.ones((1, 6), np.float32), 2, 4).tolist() == [[False, False, True, True, False, False]]
    assert keep_tiles(np.zeros((2, 2)), 0.6).sum() == 2


# ---- tiles


def test_a_tiles_cost_is_what_its_removal_costs() -> None:
    weights, hessian = problem(40, 96, 7)
    costs = tile_costs(weights, hessian, 32)
    assert costs.shape == (2, 3)
    damped = hessian + 0.01 * np.diagonal(hessian).mean() * np.eye(96)
    inverse = np.linalg.inv(damped)
    for tile, group in ((0, 0), (1, 2)):
        rows, part = slice(tile * 32, min(40, tile * 32 + 32)), slice(group * 32, group * 32 + 32)
        w = weights[rows].astype(np.float64)
        moved = w - w[:, part] @ np.linalg.inv(inverse[part, part]) @ inverse[part]
        np.testing.assert_allclose(moved[:, part], 0, atol=1e-9)
        assert costs[tile, group] == pytest.approx(error_of(w - moved, damped).sum(), rel=1e-3)


@given(st.integers(1, 70), st.integers(1, 140), st.sampled_from([32, 64, 128]), st.floats(0.05, 0.9))
@settings(max_examples=20)
def test_masks_of_tiles_are_whole_tiles(rows: int, cols: int, group: int, share: float) -> None:
    tiles, groups = -(-rows // 32), -(-cols // group)
    kept = keep_tiles(np.random.default_rng(rows).random((tiles, groups)), share)
    assert (~kept).sum() == int(tiles * groups * share)
    mask = tile_mask(kept, rows, cols, group)
    assert mask.shape == (rows, cols)
    assert np.array_equal(empty_tiles(mask.astype(np.int8), group), ~kept)


def test_joint_is_better_than_prune_then_round() -> None:
    weights, hessian = problem(64, 192, 9)
    recipe = recipe_of({"prune": "tile:0.3", "lo": False})
    packed, log = solve_layer(weights, hessian, recipe, "w")
    joint = unpack(packed).astype(np.float64)
    assert log["error"] == pytest.approx(error_of(weights - joint, hessian).sum(), rel=1e-6)
    kept = keep_tiles(tile_costs(weights, hessian, 32), 0.3)
    mask = tile_mask(kept, 64, 192, 32)
    assert (joint[~mask] == 0).all()
    swept, _, _ = sparsify(weights, hessian, mask=mask)
    cut = error_of(weights * ~mask, hessian).sum()
    assert error_of(weights - swept.astype(np.float64), hessian).sum() < cut
    for other in (swept, weights * mask):  # rounded to nearest, and by GPTQ, after pruning
        rounded = unpack(quantize_planes(other, 32, 4, False)).astype(np.float64)
        solved = gptq(other, hessian, mask=mask, lo=False).weights(32).astype(np.float64)
        for result in (rounded, solved):
            assert log["error"] < error_of(weights - result, hessian).sum()


@given(st.integers(0, 50), st.floats(0.1, 0.8))
@settings(max_examples=10)
def test_compensation_of_tiles_is_the_optimum(seed: int, share: float) -> None:
    weights, hessian = problem(40, 128, seed)
    kept = keep_tiles(tile_costs(weights, hessian, 32), share)
    mask = tile_mask(kept, 40, 128, 32)
    best = compensate_tiles(weights, hessian, kept, 32, 1e-6)
    assert (best[~mask] == 0).all()
    # the gradient vanishes on what stays
    gradient = (best.astype(np.float64) - weights) @ hessian
    assert np.abs(gradient[mask]).max(initial=0.0) < 1e-3 * np.abs(weights.astype(np.float64) @ hessian).max()


# ---- allocation


def test_layers_with_outliers_lose_less_and_the_mean_stays() -> None:
    outliers = {"layers.0.a": 0.01, "layers.1.a": 0.03, "layers.2.a": 0.06, "layers.2.b": 0.03}
    shares = owl_shares(outliers, dict.fromkeys(outliers, 1) | {"layers.2.b": 2}, 0.7)
    assert shares["layers.0.a"] > shares["layers.1.a"] > shares["layers.2.a"] == shares["layers.2.b"]
    assert np.average(list(shares.values()), weights=[1, 1, 1, 2]) == pytest.approx(0.7)
    assert max(shares.values()) - min(shares.values()) == pytest.approx(0.16)
    alike = {"layers.0.a": 0.1, "layers.1.a": 0.1}
    assert owl_shares(alike, dict.fromkeys(alike, 3), 0.5) == dict.fromkeys(alike, 0.5)
    weights, hessian = problem(32, 64, 1)
    quiet = outlier_share(weights, hessian)
    weights[:, ::16] *= 50
    assert outlier_share(weights, hessian) > quiet


@pytest.mark.parametrize(
    "recipe",
    [
        {"prune": "tile:0.3"},
        {"prune": "sparsegpt:0.5", "bits": 8},
        {"prune": "sparsegpt:2:4"},
        {"prune": "wanda:0.5", "method": "rtn"},
        {"prune": "magnitude:0.5", "group": 64},
        {"prune": "tile:0.5", "allocation": "owl"},
    ],
    ids=str,
)
def test_a_pruned_model_says_how_much_is_gone(recipe: dict[str, Any], tmp_path: Path) -> None:
    meta = run(tmp_path / "out", recipe=recipe).meta
    layers = [line for line in meta["log"] if "weight" in line]
    share = 0.3 if "0.3" in recipe["prune"] else 0.5
    zeros = np.mean([line["zeros"] for line in layers])
    assert zeros > share - 0.08
    if recipe["prune"].startswith("tile"):
        assert np.mean([line["empty_tiles"] for line in layers]) == pytest.approx(share, abs=0.1)
    if "allocation" in recipe:
        survey = next(line for line in meta["log"] if "shares" in line)
        assert set(survey["shares"]) == {line["weight"] for line in layers}


@pytest.mark.parametrize("prune", ["tile:0.3", "sparsegpt:0.5", "wanda:0.5"])
def test_joint_is_better_than_pruning_first(prune: str) -> None:
    weights, hessian = problem(96, 128, 4)
    joint, log = solve_layer(weights, hessian, recipe_of({"prune": prune}), "w")
    apart, other = solve_layer(weights, hessian, recipe_of({"prune": prune, "joint": False}), "w")
    assert log["zeros"] == pytest.approx(other["zeros"], abs=0.05)
    assert log["error"] < other["error"]
    for packed, line in ((joint, log), (apart, other)):
        assert line["error"] == pytest.approx(error_of(weights - unpack(packed, "hi"), hessian).sum(), rel=2e-3)
    rounded, _ = solve_layer(weights, hessian, recipe_of({"prune": prune, "joint": False, "method": "rtn"}), "w")
    assert np.mean(unpack(rounded, "hi") == 0) >= 0.29


def test_joint_false_needs_a_mask() -> None:
    with pytest.raises(InputError, match="joint: false needs"):
        recipe_of({"joint": False, "prune": "neurons:0.3"})
