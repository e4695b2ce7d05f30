"""Every block type is dequantized to the values of the `gguf` package's own dequantizers."""

from __future__ import annotations

import numpy as np
import pytest

from haomiao.load.gguf import blocks

gguf = pytest.importorskip("gguf")


def random_blocks(type_name: str, count: int) -> np.ndarray:
    """Random codes; the f16 scales wherever they lie are made finite."""
    block = next(b for b in blocks.TYPES.values() if b.name == type_name)
    rng = np.random.default_rng(len(type_name) + block.bytes)
    data = rng.integers(0, 256, (count, block.bytes)).astype(np.uint8)
    halves = {"q4_1": (0, 2), "q5_1": (0, 2), "q2_k": (80, 82), "q3_k": (108,), "q6_k": (208,)}
    for offset in halves.get(type_name, (0, 2) if type_name in ("q4_k", "q5_k") else (0,)):
        data[:, offset : offset + 2] = rng.normal(0, 0.1, (count, 1)).astype("<f2").view(np.uint8)
    return data


@pytest.mark.parametrize("type_name", sorted(blocks.DEQUANTIZERS))
@pytest.mark.parametrize("count", [1, 7, 100])
def test_values_agree(type_name: str, count: int) -> None:
    data = random_blocks(type_name, count)
    quant = gguf.GGMLQuantizationType[type_name.upper()]
    expected = gguf.dequantize(data, quant).reshape(-1)
    found = blocks.dequantize(data.reshape(-1), type_name)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, expected)


def test_sizes_agree() -> None:
    for number, block in blocks.TYPES.items():
        quant = gguf.GGMLQuantizationType(number)
        assert quant.name.lower() == block.name
        if block.name != "q8_1":  # the package counts its two f16 as f32; no file holds it
            assert gguf.GGML_QUANT_SIZES[quant] == (block.elements, block.bytes)


@pytest.mark.parametrize(("type_name", "codes"), [("q4_0", blocks.codes_q4_0), ("q8_0", blocks.codes_q8_0)])
def test_codes_are_exact(type_name: str, codes) -> None:  # type: ignore[no-untyped-def]
    data = random_blocks(type_name, 50).reshape(-1)
    code, scale = codes(data)
    assert code.dtype == np.int8
    assert np.array_equal(scale, scale.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(
        (code.astype(np.float32) * scale[:, None]).reshape(-1), blocks.dequantize(data, type_name)
    )


def test_a_tensor_longer_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_blocks("q4_k", 9).reshape(-1)
    whole = blocks.dequantize(data, "q4_k")
    monkeypatch.setattr(blocks, "CHUNK_ELEMENTS", 512)
    np.testing.assert_array_equal(blocks.dequantize(data, "q4_k"), whole)
