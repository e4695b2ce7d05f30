"""Scaling and rotation change no function: what is divided here is multiplied there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from haomiao.compress.calibrate import stages
from haomiao.compress.fold import divide_rows, fold, search_factors, taker
from haomiao.compress.forward import Buffers, Weights, run
from haomiao.compress.quantize.rotate import Rotation, orthogonal
from haomiao.compress.recipe import Recipe
from haomiao.errors import UnsupportedModelError
from haomiao.kernels.pack import pack_f32, unpack, unpack_codes
from haomiao.kernels.packed import PackedTensor
from haomiao.kernels.rtn import quantize_int8, quantize_planes
from haomiao.models.convert import resolve
from haomiao.models.encode import Encoder
from haomiao.models.registry import plan_for
from tests.compress.straightforward import problem
from tests.compress.test_forward import TOKENS, head_of, logits_of, opened, some_ids
from tests.golden.cases import CASES, Case
from tests.golden.checkpoint import DictSource, random_checkpoint

ROTATED = [c for c in CASES if c.name.startswith(("llama", "qwen2", "qwen3", "mistral", "smollm3", "phi3"))]


def encoder_of(case: Case) -> Encoder:
    source = DictSource(case.config, random_checkpoint(case.config, case.seed))
    return Encoder(source, dict(resolve(plan_for(case.config), source)), "nested", 32, 4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_factors_folded_into_neighbours_change_nothing(case: Case, tmp_path: Path) -> None:
    plan, artifact, _ = opened(case, tmp_path)
    matrices = {name: unpack(tensor) for name, tensor in artifact.tensors.items()}
    vectors = dict(artifact.vectors)
    place, head = head_of(plan)
    results = []
    scaled = 0
    for attempt in range(2):
        if attempt:
            for stage in stages(plan):
                taken = taker(plan, stage.place, stage.source)
                if taken is None:
                    continue
                cols = plan.weights[stage.weight].cols
                factors = np.exp2(np.random.default_rng(cols).integers(-2, 3, cols)).astype(np.float32)
                if taken.shared > 1:
                    grouped = factors.reshape(-1, taken.shared, taken.width)
                    factors = np.broadcast_to(grouped[:, :1], grouped.shape).reshape(-1).copy()
                matrices[stage.weight] = matrices[stage.weight] * factors
                if taken.rows is not None:
                    assert taken.matrix is not None
                    divisors = np.ones((len(matrices[taken.matrix]), 1), np.float32)
                    divisors[taken.rows, 0] = factors
                    matrices[taken.matrix] = matrices[taken.matrix] / divisors
                    if taken.bias is not None:
                        vectors[taken.bias] = vectors[taken.bias] / divisors[:, 0]
                else:
                    vectors |= {name: vectors[name] / factors for name in taken.vectors}
                scaled += 1
        weights = Weights(matrices.__getitem__, lambda name, ids: matrices[name][ids], vectors.__getitem__)
        buffers: Buffers = {}
        run(plan, weights, buffers, some_ids(plan, 1), 0, place)
        results.append(logits_of(plan, weights, buffers[head.source]))
    assert scaled >= 2 * plan.layers
    np.testing.assert_allclose(results[1], results[0], atol=1e-3 * np.abs(results[0]).max())


@pytest.mark.parametrize("kind", ["nested", "single", "int8"])
def test_rows_of_a_quantized_matrix_are_divided_through_their_scales(kind: str) -> None:
    weights, _ = problem(70, 64, 1)
    packed = quantize_int8(weights) if kind == "int8" else quantize_planes(weights, 32, 4, kind == "nested")
    divisors = np.random.default_rng(0).uniform(0.5, 2, 70).astype(np.float32)
    divided = divide_rows(packed, divisors)
    np.testing.assert_allclose(unpack(divided), unpack(packed) / divisors[:, None], rtol=1e-3)
    assert np.array_equal(unpack_codes(divided)[0], unpack_codes(packed)[0])


def test_the_search_helps_where_channels_differ_and_is_left_out_where_not() -> None:
    case = CASES[0]
    plan = plan_for(case.config, TOKENS)
    stage = stages(plan)[0]
    taken = taker(plan, stage.place, stage.source)
    assert taken is not None
    weights, hessian = problem(64, 64, 3)
    strong = np.ones(64)
    strong[::16] = 30.0
    hessian = hessian * np.outer(strong, strong)
    found = search_factors(weights, hessian, np.sqrt(np.diagonal(hessian)), Recipe(), taken)
    assert found is not None
    assert found[1] > 0
    assert found[0][0] > found[0][1]
    assert search_factors(weights, np.eye(64), np.ones(64), Recipe(), taken) is None


def test_what_is_folded_is_what_makes_the_input() -> None:
    vectors = {"norm": np.arange(1, 5, dtype=np.float32)}
    from haomiao.compress.fold import Taker

    tensors, changed = fold(
        Taker(("norm",), None, None, None), np.full(4, 2, np.float32), _no_tensor, vectors.__getitem__
    )
    assert tensors == {}
    assert changed["norm"].tolist() == [0.5, 1.0, 1.5, 2.0]


def _no_tensor(name: str) -> PackedTensor:
    raise AssertionError(name)


# ---- rotation


@pytest.mark.parametrize("size", [1, 2, 12, 64, 96, 192, 896])
def test_the_rotation_is_orthogonal_and_spreads(size: int) -> None:
    turn = orthogonal(size)
    np.testing.assert_allclose(turn @ turn.T, np.eye(size), atol=1e-12)
    if size >= 64:
        assert np.abs(turn).max() < 4 / np.sqrt(size)


@pytest.mark.parametrize("case", ROTATED, ids=lambda case: case.name)
def test_a_rotated_model_computes_the_same(case: Case, tmp_path: Path) -> None:
    plan, _, weights = opened(case, tmp_path)
    ids = some_ids(plan, 1)
    place, head = head_of(plan)
    buffers: Buffers = {}
    run(plan, weights, buffers, ids, 0, place)
    expected = logits_of(plan, weights, buffers[head.source])

    encoder = encoder_of(case)
    names = dict(encoder.names)
    encoder.names = names
    rotation = Rotation(case.config, names)
    rotation.learn(encoder)
    turned = plan_for(rotation.config, TOKENS)
    matrices, vectors = {}, {}
    for spec in turned.weights.values():
        if spec.kind == "vector":
            vectors[spec.name] = rotation.vector(spec, encoder.vector(spec))
        elif spec.role == "embedding":
            matrices[spec.name] = encoder.weights(spec) @ rotation._turn
        else:
            matrices[spec.name] = rotation.matrix(spec, encoder.weights(spec))
    moved = Weights(matrices.__getitem__, lambda name, ids: matrices[name][ids], vectors.__getitem__)
    buffers = {}
    place, head = head_of(turned)
    run(turned, moved, buffers, ids, 0, place)
    found = logits_of(turned, moved, buffers[head.source])
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())
    assert pack_f32(matrices[stages(turned)[0].weight]).rows


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt2"])
def test_models_that_cannot_be_rotated_are_refused_by_name(family: str) -> None:
    case = next(c for c in CASES if c.name.startswith(family))
    with pytest.raises(UnsupportedModelError, match="rotated"):
        Rotation(case.config, {})
