"""Tile masks: what they leave out is zero, costs no bytes, and every instruction set skips it with the twin's bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.errors import InputError
from haomiao.kernels import isa as instruction_sets
from haomiao.kernels import native, pack, reference, rtn
from haomiao.kernels.packed import PackedTensor, pack_mask, unpack_mask

ISAS = instruction_sets.available()


def pruned(rows: int, cols: int, group: int, share: float, seed: int, kind: str, lo_shift: int = 4) -> PackedTensor:
    """A matrix whose blocks of 32 rows x `group` columns hold zero codes, but for `share` of them; without a mask."""
    random = np.random.default_rng(seed)
    weights = random.standard_normal((rows, cols)).astype(np.float32)
    tiles, groups = -(-rows // 32), -(-cols // group)
    kept = random.random((tiles, groups)) < share
    weights *= np.repeat(np.repeat(kept, 32, axis=0)[:rows], group, axis=1)[:, :cols]
    if kind == "int8":
        return rtn.quantize_int8(weights, group)
    return rtn.quantize_planes(weights, group, lo_shift if kind == "nested" else 4, kind == "nested")


def planes_of(packed: PackedTensor) -> tuple[Literal["hi", "hi+lo"], ...]:
    return ("hi", "hi+lo") if packed.lo is not None else ("hi+lo",)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 130),
    st.one_of(st.integers(1, 300), st.integers(2048, 2200)),
    st.sampled_from([32, 64, 128]),
    st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    st.one_of(st.integers(1, 9), st.sampled_from([24, 25, 40])),
    st.sampled_from(["int4", "nested", "int8"]),
    st.integers(0, 4),
    st.integers(0, 2**32 - 1),
)
def test_skipping_gives_the_bits_of_zero_codes(
    rows: int, cols: int, group: int, share: float, tokens: int, kind: str, lo_shift: int, seed: int
) -> None:
    whole = pruned(rows, cols, group, share, seed, kind, lo_shift)
    packed = pack.without_empty(whole, 0.0)
    x = np.random.default_rng(seed).standard_normal((tokens, cols)).astype(np.float32)
    assert packed.hi.nbytes == packed.sizes[0]
    for planes in planes_of(packed):
        assert np.array_equal(pack.unpack(packed, planes), pack.unpack(whole, planes))
        assert np.array_equal(pack.unpack(pack.whole(packed), planes), pack.unpack(whole, planes))
        assert np.array_equal(pack.unpack_codes(packed, planes)[0], pack.unpack_codes(whole, planes)[0])
        want = reference.linear(whole, x, planes)
        assert np.array_equal(reference.linear(packed, x, planes), want)
        for isa in ISAS:
            assert np.array_equal(native.linear(packed, x, planes, isa=isa), want), (isa, kind, planes)
    for row in {0, rows // 2, rows - 1}:
        want_row = reference.read_row(whole, row)
        assert np.array_equal(reference.read_row(packed, row), want_row)
        for isa in ISAS:
            assert np.array_equal(native.read_row(packed, row, isa=isa), want_row)


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_left_out_meets_no_nan(isa: str) -> None:
    """A group that is not stored is no part of the sum, whatever its activations are."""
    packed = pack.without_empty(pruned(64, 128, 32, 0.5, 3, "nested"), 0.0)
    x = np.random.default_rng(4).standard_normal((12, 128)).astype(np.float32)
    x[1, 40] = np.nan
    y = native.linear(packed, x, isa=isa)
    assert np.array_equal(np.isnan(y[1].reshape(2, 32)).all(axis=1), packed.stored[:, 1])
    assert np.array_equal(y, reference.linear(packed, x), equal_nan=True)


def test_a_mask_is_made_where_it_pays() -> None:
    few = pruned(3200, 64, 32, 1.0, 0, "nested")
    assert pack.without_empty(few) is few
    half = pack.without_empty(pruned(320, 256, 32, 0.5, 1, "nested"))
    assert half.kept is not None
    assert half.nbytes == round(half.share * 10 * 8) * (64 + 512 + 512)
    assert pack.without_empty(half) is half
    floats = pack.pack_f32(np.zeros((40, 40), np.float32))
    assert pack.without_empty(floats) is floats
    nothing = pack.without_empty(pruned(70, 96, 32, 0.0, 2, "int4"))
    assert int(nothing.stored.sum()) == 1
    assert not pack.unpack(nothing).any()


def test_a_block_is_empty_only_if_both_planes_are() -> None:
    codes = np.zeros((32, 64), np.int8)
    lo = codes.copy()
    lo[5, 40] = 1
    packed = pack.without_empty(pack.pack_planes(codes, lo, np.ones((32, 2)), 32, 4), 0.0)
    assert packed.stored.tolist() == [[False, True]]
    assert pack.unpack(packed)[5, 40] == 1 / 16


@given(st.integers(1, 9), st.integers(1, 140), st.integers(0, 2**32 - 1))
def test_masks_come_back(tiles: int, groups: int, seed: int) -> None:
    stored = np.random.default_rng(seed).random((tiles, groups)) < 0.5
    mask = pack_mask(stored)
    assert mask.shape == (tiles * -(-groups // 8),)
    assert np.array_equal(unpack_mask(mask, groups), stored)


def test_masks_that_contradict_their_matrix() -> None:
    packed = pack.without_empty(pruned(96, 96, 32, 0.5, 7, "nested"), 0.0)
    assert packed.kept is not None
    x = np.ones((1, 96), np.float32)
    more = packed.kept.copy()
    more[0] = 0x0F  # group 3 of 3
    other = packed.kept ^ np.uint8(1)
    for kept in (packed.kept[:-1], more, other, np.zeros(0, np.uint8)):
        with pytest.raises(InputError, match=r"mask|size"):
            native.linear(replace(packed, kept=kept), x)
    floats = pack.pack_f32(np.ones((96, 96), np.float32))
    with pytest.raises(InputError, match="group"):
        native.linear(replace(floats, kept=packed.kept), x)
