"""GPTQ, AWQ and compressed-tensors checkpoints, packed here code by code from the formats' definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from haomiao.errors import ModelError, UnsupportedModelError
from haomiao.load.source import QuantizedTensor, TensorSource, open_source
from tests.load.checkpoints import to_bf16, write_model

ROWS, COLS = 64, 256
PREFIX = "model.layers.0.mlp.down_proj"
RNG = np.random.default_rng(3)


def pack(codes: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Unsigned codes -> int32 words along `axis`, low bits first, one code after the other (slow and obvious)."""
    per_word = 32 // bits
    moved = np.moveaxis(codes, axis, -1)
    padded = np.zeros((*moved.shape[:-1], -(-moved.shape[-1] // per_word) * per_word), np.int64)
    padded[..., : moved.shape[-1]] = moved
    words = np.zeros((*padded.shape[:-1], padded.shape[-1] // per_word), np.int64)
    for word in range(words.shape[-1]):
        for i in range(per_word):
            column = word * per_word + (order[i] if order else i)
            words[..., word] |= padded[..., column] << (bits * i)
    return np.ascontiguousarray(np.moveaxis(words.astype(np.uint32).astype(np.int32), -1, axis))


def scales_of(groups: int) -> np.ndarray:
    """[ROWS, groups], exact in float16."""
    return RNG.uniform(0.001, 0.1, (ROWS, groups)).astype(np.float16)


def opened(directory: Path, tensors: dict[str, np.ndarray], settings: dict[str, Any]) -> TensorSource:
    tensors = {"model.norm.weight": np.ones(4, np.float32), f"{PREFIX}.bias": np.ones(ROWS, np.float16), **tensors}
    source = open_source(write_model(directory, tensors, {"model_type": "llama", "quantization_config": settings}))
    assert sorted(source.names()) == [f"{PREFIX}.bias", f"{PREFIX}.weight", "model.norm.weight"]
    assert source.shape(f"{PREFIX}.weight") == (ROWS, COLS)
    assert source.quantized("model.norm.weight") is None and source.dtype(f"{PREFIX}.bias") == "f16"
    assert np.array_equal(source.read("model.norm.weight"), np.ones(4))
    return source


def check(source: TensorSource, expected: np.ndarray, bits: int | None, group: int | None) -> None:
    name = f"{PREFIX}.weight"
    np.testing.assert_array_equal(source.read(name), expected.astype(np.float32))
    exact = source.quantized(name)
    if bits is None:
        assert exact is None
        return
    assert isinstance(exact, QuantizedTensor)
    assert (exact.bits, exact.group) == (bits, group)
    assert exact.codes.dtype == np.int8 and exact.scales.shape == (ROWS, COLS // exact.group)
    values = exact.codes * np.repeat(exact.scales, exact.group, axis=1)
    np.testing.assert_array_equal(values, expected.astype(np.float32))


def gptq(bits: int, group: int, zeros: np.ndarray, order: np.ndarray, version: int = 1) -> tuple[dict, np.ndarray]:
    codes = RNG.integers(0, 1 << bits, (ROWS, COLS))
    scales = scales_of(zeros.shape[1])
    tensors = {
        f"{PREFIX}.qweight": pack(codes.T, bits, 0),
        f"{PREFIX}.qzeros": pack((zeros.T - (version == 1)) % (1 << bits), bits, 1),
        f"{PREFIX}.scales": np.ascontiguousarray(scales.T),
        f"{PREFIX}.g_idx": order.astype(np.int32),
    }
    return tensors, (codes - zeros[:, order]) * scales.astype(np.float32)[:, order]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("bits", "group", "asymmetric", "expected"),
    [
        (4, 128, False, (4, 128)),
        (4, 32, False, (4, 32)),
        (4, -1, False, (4, 128)),
        (4, 64, True, (5, 64)),
        (8, 128, False, (8, 128)),
        (2, 64, False, (4, 64)),
        (4, 16, False, (None, None)),
        (8, 128, True, (None, None)),
    ],
)
def test_gptq(
    tmp_path: Path, version: int, bits: int, group: int, asymmetric: bool, expected: tuple[int | None, int | None]
) -> None:
    size = COLS if group < 0 else group
    middle = 1 << (bits - 1)
    zeros = np.full((ROWS, COLS // size), middle)
    if asymmetric:
        zeros = RNG.integers(0, 1 << bits, zeros.shape)
    tensors, weights = gptq(bits, group, zeros, np.arange(COLS) // size, version)
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": not asymmetric}
    if version == 2:
        settings["checkpoint_format"] = "gptq_v2"
    source = opened(tmp_path, tensors, settings)
    assert source.dtype(f"{PREFIX}.weight") == f"gptq-int{bits}"
    check(source, weights, *expected)
    del tensors[f"{PREFIX}.g_idx"]
    check(opened(tmp_path / "without_g_idx", tensors, settings), weights, *expected)


def test_gptq_with_reordered_columns_is_dequantized(tmp_path: Path) -> None:
    order = RNG.permutation(np.arange(COLS) // 64)
    tensors, weights = gptq(4, 64, np.full((ROWS, 4), 8), order)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}
    check(opened(tmp_path, tensors, settings), weights, None, None)


@pytest.mark.parametrize(("group", "expected"), [(128, 128), (32, 32), (-1, 128)])
def test_awq(tmp_path: Path, group: int, expected: int) -> None:
    size = COLS if group < 0 else group
    codes = RNG.integers(0, 16, (ROWS, COLS))
    zeros = RNG.integers(0, 16, (ROWS, COLS // size))
    scales = scales_of(COLS // size)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        f"{PREFIX}.qweight": pack(codes.T, 4, 1, order),
        f"{PREFIX}.qzeros": pack(zeros.T, 4, 1, order),
        f"{PREFIX}.scales": np.ascontiguousarray(scales.T),
    }
    columns = np.arange(COLS) // size
    weights = (codes - zeros[:, columns]) * scales.astype(np.float32)[:, columns]
    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    source = opened(tmp_path, tensors, settings)
    assert source.dtype(f"{PREFIX}.weight") == "awq-int4"
    check(source, weights, 5, expected)


def compressed(bits: int, strategy: str, group: int | None, symmetric: bool, form: str) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": group}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_type", ["f16", "bf16"])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (8, 64), (4, None), (8, None)])
def test_pack_quantized(tmp_path: Path, bits: int, group: int | None, scale_type: str, symmetric: bool) -> None:
    size = group or COLS
    columns = np.arange(COLS) // size
    half = 1 << (bits - 1)
    codes = RNG.integers(-half, half, (ROWS, COLS))
    scales = scales_of(COLS // size)
    if scale_type == "bf16":
        scales = (to_bf16(scales.astype(np.float32)).astype(np.uint32) << 16).view(np.float32)
    zeros = np.zeros((ROWS, COLS // size), np.int64) if symmetric else RNG.integers(-half, half, (ROWS, COLS // size))
    tensors = {
        f"{PREFIX}.weight_packed": pack(codes + half, bits, 1),
        f"{PREFIX}.weight_scale": to_bf16(scales) if scale_type == "bf16" else scales,
        f"{PREFIX}.weight_shape": np.array([ROWS, COLS], np.int64),
    }
    if not symmetric:
        tensors[f"{PREFIX}.weight_zero_point"] = pack(zeros + half, bits, 0)
    weights = (codes - zeros[:, columns]) * scales.astype(np.float32)[:, columns]
    settings = compressed(bits, "group" if group else "channel", group, symmetric, "pack-quantized")
    source = opened(tmp_path, tensors, settings)
    assert source.dtype(f"{PREFIX}.weight") == f"compressed-tensors-int{bits}"
    kept = bits if symmetric else 5 if bits == 4 else None
    check(source, weights, kept, group or 128)


def test_pack_quantized_with_reordered_columns(tmp_path: Path) -> None:
    order = RNG.permutation(np.arange(COLS) // 64)
    codes, scales = RNG.integers(-8, 8, (ROWS, COLS)), scales_of(4)
    tensors = {
        f"{PREFIX}.weight_packed": pack(codes + 8, 4, 1),
        f"{PREFIX}.weight_scale": scales,
        f"{PREFIX}.weight_shape": np.array([ROWS, COLS], np.int64),
        f"{PREFIX}.weight_g_idx": order.astype(np.int32),
    }
    settings = compressed(4, "group", 64, True, "pack-quantized")
    check(opened(tmp_path, tensors, settings), codes * scales.astype(np.float32)[:, order], None, None)


@pytest.mark.parametrize("strategy", ["channel", "tensor", "group"])
def test_int_quantized(tmp_path: Path, strategy: str) -> None:
    codes = RNG.integers(-128, 128, (ROWS, COLS)).astype(np.int8)
    scales = scales_of(4 if strategy == "group" else 1)
    if strategy == "tensor":
        scales[:] = scales[0]
    tensors = {
        f"{PREFIX}.weight": codes,
        f"{PREFIX}.weight_scale": scales[:1, 0].copy() if strategy == "tensor" else scales,
        f"{PREFIX}.input_scale": np.ones(1, np.float32),
    }
    size = COLS // scales.shape[1]
    weights = codes * np.repeat(scales.astype(np.float32), size, axis=1)
    settings = compressed(8, strategy, 64 if strategy == "group" else None, True, "int-quantized")
    check(opened(tmp_path, tensors, settings), weights, 8, min(size, 128))


def test_scales_that_float16_cannot_hold_are_dequantized(tmp_path: Path) -> None:
    codes = RNG.integers(-128, 128, (ROWS, COLS)).astype(np.int8)
    scales = RNG.uniform(0.001, 0.1, (ROWS, 1)).astype(np.float32)
    tensors = {f"{PREFIX}.weight": codes, f"{PREFIX}.weight_scale": scales}
    check(opened(tmp_path, tensors, compressed(8, "channel", None, True, "int-quantized")), codes * scales, None, None)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "bitsandbytes"},
        {"quant_method": "fp8"},
        {},
        [1],
        "int4",
        {"quant_method": "gptq", "bits": 3},
        {"quant_method": "gptq", "bits": True},
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*": {"bits": 8}}},
        {"quant_method": "awq", "version": "gemv"},
        {"quant_method": "awq", "bits": 8},
        {"quant_method": "awq", "group_size": 1e9},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": {"g": None}},
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"type": "float"}}}},
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 99}}}},
        compressed(8, "channel", None, True, "float-quantized"),
        {**compressed(4, "group", 64, True, "pack-quantized"), "sparsity_config": {"format": "sparse-24-bitmask"}},
        {**compressed(4, "group", 64, True, "pack-quantized"), "transform_config": {"R1": {}}},
    ],
)
def test_what_is_not_supported_is_refused(tmp_path: Path, settings: Any) -> None:
    write_model(tmp_path, {"x": np.ones(1, np.float32)}, {"model_type": "llama", "quantization_config": settings})
    with pytest.raises((ModelError, UnsupportedModelError)) as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)


def test_parts_that_contradict_each_other(tmp_path: Path) -> None:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    good, _ = gptq(4, 64, np.full((ROWS, 4), 8), np.arange(COLS) // 64)
    name = f"{PREFIX}.weight"
    wrong: dict[str, np.ndarray] = {
        "qzeros": good[f"{PREFIX}.qzeros"][:3],
        "scales": good[f"{PREFIX}.scales"][:, :-1],
        "g_idx": np.full(COLS, 4, np.int32),
        "qweight": good[f"{PREFIX}.qweight"][0],
    }
    nan = good[f"{PREFIX}.scales"].copy()
    nan[1, 1] = np.nan
    cases = [*wrong.items(), ("scales", nan), ("g_idx", np.full(COLS, -1, np.int32)), ("qzeros", None)]
    for i, (part, value) in enumerate(cases):
        tensors = dict(good)
        if value is None:
            del tensors[f"{PREFIX}.{part}"]
        else:
            tensors[f"{PREFIX}.{part}"] = value
        write_model(tmp_path / str(i), tensors, {"quantization_config": settings})
        with pytest.raises(ModelError, match=r"down_proj|packed"):
            open_source(tmp_path / str(i)).read(name)


def test_parts_of_compressed_tensors_that_contradict_each_other(tmp_path: Path) -> None:
    settings = compressed(4, "group", 64, False, "pack-quantized")
    codes, zeros = RNG.integers(0, 16, (ROWS, COLS)), RNG.integers(0, 16, (ROWS, 4))
    good = {
        "weight_packed": pack(codes, 4, 1),
        "weight_scale": scales_of(4),
        "weight_zero_point": pack(zeros, 4, 0),
        "weight_shape": np.array([ROWS, COLS], np.int64),
    }
    order = np.arange(COLS, dtype=np.int32) // 64
    wrong = {
        "words of no declared width": {"weight_packed": good["weight_packed"][:, :-1]},
        "more columns than words hold": {"weight_shape": np.array([ROWS, 32 * COLS], np.int64)},
        "other rows than words": {"weight_shape": np.array([ROWS + 1, COLS], np.int64)},
        "no matrix": {"weight_shape": np.array([ROWS], np.int64)},
        "no columns": {"weight_shape": np.array([ROWS, 0], np.int64)},
        "groups that do not divide": {"weight_scale": scales_of(3)},
        "scales of three axes": {"weight_scale": scales_of(4).reshape(ROWS, 2, 2)},
        "no scales": {"weight_scale": np.zeros((ROWS, 0), np.float16)},
        "zero points of other groups": {"weight_zero_point": good["weight_zero_point"][:, :-1]},
        "zero points of other rows": {"weight_zero_point": good["weight_zero_point"][:2]},
        "a group that is not there": {"weight_g_idx": order + 1},
        "an index of too few columns": {"weight_g_idx": order[1:]},
    }
    for number, (what, parts) in enumerate({"nothing": {}, **wrong}.items()):
        tensors = {f"{PREFIX}.{part}": value for part, value in {**good, **parts}.items()}
        write_model(tmp_path / str(number), tensors, {"quantization_config": settings})
        if what == "nothing":
            assert open_source(tmp_path / str(number)).read(f"{PREFIX}.weight").shape == (ROWS, COLS)
            continue
        with pytest.raises(ModelError, match="down_proj") as caught:
            open_source(tmp_path / str(number)).read(f"{PREFIX}.weight")
        assert "\n" not in str(caught.value), what


def test_plain_codes_of_another_type_are_refused(tmp_path: Path) -> None:
    tensors = {f"{PREFIX}.weight": np.zeros((ROWS, COLS), np.int32), f"{PREFIX}.weight_scale": scales_of(1)}
    settings = compressed(8, "channel", None, True, "int-quantized")
    write_model(tmp_path, tensors, {"quantization_config": settings})
    with pytest.raises(ModelError, match="int8 of shape"):
        open_source(tmp_path).read(f"{PREFIX}.weight")
