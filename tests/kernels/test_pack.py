"""Packing: the byte layout of docs/ARCHITECTURE.md section 4, round trips, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haomiao.errors import InputError, ModelError
from haomiao.kernels import pack
from haomiao.kernels.packed import padded_columns, tile_bytes

SIZES = st.tuples(st.integers(1, 100), st.integers(1, 300))
GROUPS = st.sampled_from([32, 64, 128])
SEEDS = st.integers(0, 2**32 - 1)


def random_scales(random: np.random.Generator, rows: int, cols: int, group: int) -> np.ndarray:
    return random.standard_normal((rows, -(-cols // group))).astype(np.float16).astype(np.float32)


@given(SIZES, SEEDS)
def test_f32_and_bf16_round_trips(size: tuple[int, int], seed: int) -> None:
    weights = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    assert np.array_equal(pack.unpack(pack.pack_f32(weights)), weights)
    halves = pack.from_bf16(pack.to_bf16(weights))
    packed = pack.pack_bf16(weights)
    assert np.array_equal(pack.unpack(packed), halves)
    assert np.array_equal(pack.unpack(pack.pack_bf16(halves)), halves)
    assert packed.hi.nbytes == packed.tiles * tile_bytes("bf16", packed.padded_cols, 0)[0]


@given(SIZES, GROUPS, SEEDS)
def test_int8_round_trip(size: tuple[int, int], group: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(-128, 128, size).astype(np.int8)
    scales = random_scales(random, *size, group)
    packed = pack.pack_int8(codes, scales, group)
    found, found_scales = pack.unpack_codes(packed)
    assert np.array_equal(found, codes)
    assert np.array_equal(found_scales, scales)
    assert np.array_equal(pack.unpack(packed), np.repeat(scales, group, axis=1)[:, : size[1]] * codes)
    assert packed.hi.nbytes == packed.tiles * tile_bytes("int8", packed.padded_cols, group)[0]


@given(SIZES, GROUPS, st.integers(0, 4), SEEDS)
def test_planes_round_trip(size: tuple[int, int], group: int, lo_shift: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    hi, lo = random.integers(-8, 8, (2, *size)).astype(np.int8)
    scales = random_scales(random, *size, group)
    packed = pack.pack_planes(hi, lo, scales, group, lo_shift)
    both, both_scales = pack.unpack_codes(packed)
    assert np.array_equal(both, hi.astype(np.int16) * 2**lo_shift + lo)
    assert np.array_equal(both_scales * 2**lo_shift, scales)
    upper, upper_scales = pack.unpack_codes(packed, "hi")
    assert np.array_equal(upper, hi)
    assert np.array_equal(upper_scales, scales)
    single = pack.pack_planes(hi, None, scales, group, 0)
    assert np.array_equal(single.hi, packed.hi)
    assert np.array_equal(pack.unpack(single, "hi+lo"), pack.unpack(packed, "hi"))
    sizes = tile_bytes("planes", padded_columns("planes", size[1], group), group)
    assert packed.lo is not None
    assert (packed.hi.nbytes, packed.lo.nbytes) == (packed.tiles * sizes[0], packed.tiles * sizes[1])


@given(st.integers(0, 4), SEEDS)
def test_split_codes_is_exact_and_nearest(lo_shift: int, seed: int) -> None:
    step = 1 << lo_shift
    codes = np.random.default_rng(seed).integers(-8 * step - 8, 7 * step + 8, 500).astype(np.int16)
    hi, lo = pack.split_codes(codes, lo_shift)
    assert np.array_equal(hi.astype(np.int16) * step + lo, codes)
    assert min(hi.min(), lo.min()) >= -8
    assert max(hi.max(), lo.max()) <= 7
    inner = (codes >= -8 * step) & (codes < 7 * step)
    assert (np.abs(codes - hi.astype(np.int16) * step)[inner] <= step / 2).all()


def test_bytes_lie_where_the_layout_says() -> None:
    """One code of each plane and one scale, found by the formula of the document rather than by the packer's own."""
    random = np.random.default_rng(7)
    rows, cols, group = 70, 192, 64
    hi, lo = random.integers(-8, 8, (2, rows, cols)).astype(np.int8)
    codes = random.integers(-128, 128, (rows, cols)).astype(np.int8)
    scales = random_scales(random, rows, cols, group)
    planes, bytes_ = pack.pack_planes(hi, lo, scales, group, 4), pack.pack_int8(codes, scales, group)
    assert planes.lo is not None
    for row, col in [(0, 0), (69, 191), (17, 5), (31, 36), (32, 100), (48, 67)]:
        tile, r, i = row // 32, row % 32 // 16, row % 16
        j, high, k = col % 32 // 8, col % 8 // 4, col % 4
        run = (2 * j + r) * 64 + 4 * i + k
        group_start = tile * (3 * (64 + 1024)) + col // group * (64 + 1024)
        byte = planes.hi[group_start + 64 + col % group // 32 * 512 + run]
        assert (int(byte >> 4) if high else int(byte & 15)) - 8 == hi[row, col]
        byte = planes.lo[tile * 6 * 512 + col // 32 * 512 + run]
        assert (int(byte >> 4) if high else int(byte & 15)) - 8 == lo[row, col]
        scale = planes.hi[group_start + row % 32 * 2 :][:2].view("<f2")[0]
        assert scale == scales[row, col // group]
        start = tile * (3 * (64 + 2048)) + col // group * (64 + 2048) + 64
        assert int(bytes_.hi[start + col % group // 4 * 128 + row % 32 * 4 + col % 4]) - 128 == codes[row, col]
    weights = random.standard_normal((33, 5)).astype(np.float32)
    assert pack.pack_f32(weights).hi.view("<f4")[5 * 32 + 3 * 32 + 0] == weights[32, 3]
    halves = pack.pack_bf16(weights).hi.view("<u2")
    assert halves[6 * 32 + (3 // 2 * 32 + 0) * 2 + 1] == pack.to_bf16(weights)[32, 3]


def test_padding_is_zero() -> None:
    packed = pack.pack_planes(np.full((1, 1), 7), np.full((1, 1), 7), np.ones((1, 1)), 32, 4)
    assert packed.lo is not None
    assert packed.hi[2:64].any() == np.False_
    assert np.count_nonzero(packed.hi[64:] != 0x88) == 1
    assert np.count_nonzero(packed.lo != 0x88) == 1


def test_a_large_matrix_goes_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    weights = random.standard_normal((300, 70)).astype(np.float32)
    hi, lo = random.integers(-8, 8, (2, 300, 70)).astype(np.int8)
    scales = random_scales(random, 300, 70, 32)
    whole = [pack.pack_f32(weights), pack.pack_bf16(weights), pack.pack_planes(hi, lo, scales, 32, 4)]
    monkeypatch.setattr(pack, "CHUNK_ELEMENTS", 64 * 70)
    parts = [pack.pack_f32(weights), pack.pack_bf16(weights), pack.pack_planes(hi, lo, scales, 32, 4)]
    for one, other in zip(whole, parts, strict=True):
        assert np.array_equal(one.hi, other.hi)
        assert np.array_equal(pack.unpack(one), pack.unpack(other))


def test_bf16_rounds_to_nearest_ties_to_even() -> None:
    bits = np.array([0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x80000000], np.uint32)
    assert pack.to_bf16(bits.view(np.float32)).tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0x3F80, 0x8000]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weights = np.ones((40, 40), np.float32)
    weights[39, 39] = value
    for packer in (pack.pack_f32, pack.pack_bf16):
        with pytest.raises(ModelError, match="NaN or infinite"):
            packer(weights)
    with pytest.raises(ModelError, match="scale"):
        pack.pack_int8(np.zeros((1, 32), np.int8), np.full((1, 1), value), 32)


def test_what_contradicts_itself_is_refused() -> None:
    codes, scales = np.zeros((4, 64), np.int8), np.ones((4, 2), np.float32)
    with pytest.raises(ModelError, match="bfloat16"):
        pack.pack_bf16(np.full((1, 1), 3.4e38, np.float32))
    with pytest.raises(ModelError, match="beyond float16"):
        pack.pack_int8(codes, scales * 70000, 32)
    with pytest.raises(InputError, match="exactly"):
        pack.pack_int8(codes, scales * np.float32(1.0001), 32)
    with pytest.raises(InputError, match="shape"):
        pack.pack_int8(codes, scales[:, :1], 32)
    with pytest.raises(InputError, match="group"):
        pack.pack_int8(codes, scales, 48)
    with pytest.raises(InputError, match="dimensions"):
        pack.pack_f32(np.zeros((0, 3), np.float32))
    with pytest.raises(InputError, match="integers"):
        pack.pack_planes(codes.astype(np.float32), None, scales, 32, 0)
    with pytest.raises(InputError, match="outside"):
        pack.pack_planes(codes + 8, None, scales, 32, 0)
    with pytest.raises(InputError, match="differ"):
        pack.pack_planes(codes, codes[:2], scales, 32, 4)
    with pytest.raises(InputError, match="lo_shift"):
        pack.pack_planes(codes, codes, scales, 32, 5)
    with pytest.raises(InputError, match="lo_shift"):
        pack.pack_planes(codes, None, scales, 32, 4)
    with pytest.raises(InputError, match="range of planes"):
        pack.split_codes(np.array([120]), 4)
    with pytest.raises(InputError, match="no codes"):
        pack.unpack_codes(pack.pack_f32(np.ones((1, 1), np.float32)))
