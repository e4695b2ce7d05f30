"""The screening kernels: bounds that hold for every float, equal in every instruction set, near what numpy says."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao import _core
from haomiao.kernels import pack, reference, reference_head
from haomiao.kernels.isa import available
from haomiao.kernels.native import linear, weight_of
from haomiao.kernels.packed import PackedTensor
from haomiao.types import F32


def head(rows: int, cols: int, group: int, lo_shift: int, rng: np.random.Generator) -> PackedTensor:
    """Random codes over the whole range, scales of either sign and of very different sizes."""
    groups = -(-cols // group)
    hi, lo = (rng.integers(-8, 8, (rows, cols)) for _ in range(2))
    scales = (rng.normal(size=(rows, groups)) * 10.0 ** rng.uniform(-6, 2, (rows, groups))).astype(np.float16)
    return pack.pack_planes(hi, lo, scales, group, lo_shift)


def byte_head(rows: int, cols: int, group: int, rng: np.random.Generator) -> PackedTensor:
    """The same in one-byte codes, many of them greatest, where a hi plane leaves out most."""
    codes = np.where(rng.random((rows, cols)) < 0.1, rng.choice([-128, -127, 127], (rows, cols)), 0)
    codes = np.where(codes == 0, rng.integers(-128, 128, (rows, cols)), codes)
    scales = rng.normal(size=(rows, -(-cols // group))) * 10.0 ** rng.uniform(-9, 2, (rows, -(-cols // group)))
    return pack.pack_int8(codes, scales.astype(np.float16), group)


def sketch_of(isa: str, packed: PackedTensor) -> tuple[PackedTensor, Any]:
    """The hi plane that the kernel makes of one-byte codes, and the norms [tiles, groups] of what it leaves out."""
    weight, tile_bytes = weight_of(packed), packed.padded_cols * 16 + packed.groups * 64
    hi = np.empty((packed.tiles, tile_bytes), np.uint8)
    norms = np.empty((packed.tiles, packed.padded_cols // 32), np.float32)
    for tile in range(packed.tiles):
        _core.head_sketch(isa, weight, tile, hi[tile], norms[tile])
    return PackedTensor("planes", packed.rows, packed.cols, packed.group, 0, hi.reshape(-1), None), norms


def row_of(packed: PackedTensor, kind: str, rng: np.random.Generator) -> F32:
    """An activation row; `aligned` ones point along what the hi plane leaves out of a row, where the bound is tight."""
    x = rng.normal(size=packed.cols)
    if kind == "sparse":
        x *= rng.random(packed.cols) < 0.05
    elif kind == "outliers":
        x *= 10.0 ** rng.uniform(-3, 3, packed.cols)
    elif kind == "aligned":
        row = rng.integers(packed.rows)
        coarse = reference_head.sketch(packed)[0] if packed.encoding == "int8" else packed
        x = (pack.unpack(packed, "hi+lo") - pack.unpack(coarse, "hi"))[row].astype(np.float64)
        x /= max(np.abs(x).max(), 1e-30)
    elif kind == "tiny":
        x *= 10.0 ** rng.uniform(-44, -18)
    return x.astype(np.float32)


def bounds_of(isa: str, packed: PackedTensor, x: F32) -> tuple[Any, Any, Any]:
    """(norms [tiles, groups], lengths [groups], (upper, seen) [tiles, 2]) as the kernels compute them."""
    groups = packed.padded_cols // 32
    norms, lengths = np.empty((packed.tiles, groups), np.float32), np.empty(groups, np.float32)
    coarse = packed
    if packed.encoding == "int8":
        coarse, norms = sketch_of(isa, packed)
    weight = weight_of(coarse)
    _core.lengths(isa, x, lengths)
    h = np.zeros(packed.tiles * 32, np.float32)
    h[: packed.rows] = linear(coarse, x[None], "hi", isa=isa)[0]
    found = np.empty((packed.tiles, 2), np.float32)
    for tile in range(packed.tiles):
        if packed.encoding == "planes":
            _core.lo_norms(isa, weight, tile, norms[tile])
        found[tile] = _core.head_bound(isa, weight, tile, norms[tile], lengths, h[32 * tile : 32 * tile + 32])
    return norms, lengths, found


@given(
    rows=st.integers(1, 100),
    cols=st.integers(1, 300),
    group=st.sampled_from([32, 64, 128]),
    lo_shift=st.one_of(st.none(), st.integers(0, 4)),
    kind=st.sampled_from(["normal", "sparse", "outliers", "aligned", "tiny"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_no_logit_exceeds_its_bound(
    rows: int, cols: int, group: int, lo_shift: int | None, kind: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    packed = byte_head(rows, cols, group, rng) if lo_shift is None else head(rows, cols, group, lo_shift, rng)
    x = row_of(packed, kind, rng)
    exact = np.full(packed.tiles * 32, -np.inf, np.float32)
    exact[:rows] = linear(packed, x[None], "hi+lo")[0]
    greatest = exact.reshape(-1, 32).max(axis=1)
    results = [bounds_of(isa, packed, x) for isa in available()]
    for norms, lengths, found in results:
        assert (greatest - np.abs(greatest) * np.float32(2.0**-24) - 1e-30 <= found[:, 0]).all()
        for mine, first in zip((norms, lengths, found), results[0], strict=True):
            np.testing.assert_array_equal(mine.view(np.uint32), first.view(np.uint32))
    norms, lengths, found = results[0]
    twin = reference_head.sketch(packed)[1] if lo_shift is None else reference_head.lo_norms(packed)
    np.testing.assert_allclose(norms, twin, rtol=1e-3, atol=0.01)
    assert (norms >= twin).all()
    np.testing.assert_allclose(lengths, reference_head.lengths(x, packed.padded_cols), rtol=1e-4, atol=2e-18)
    upper = np.full(packed.tiles * 32, -np.inf)
    upper[:rows] = reference_head.bounds(packed, x)
    assert (found[:, 0] >= upper.reshape(-1, 32).max(axis=1) - 1e-4 * np.abs(found[:, 0]) - 1e-30).all()


@given(
    rows=st.integers(1, 70), cols=st.integers(1, 300), group=st.sampled_from([32, 64, 128]), seed=st.integers(0, 9999)
)
@settings(max_examples=30, deadline=None)
def test_a_sketch_is_the_twins_plane(rows: int, cols: int, group: int, seed: int) -> None:
    packed = byte_head(rows, cols, group, np.random.default_rng(seed))
    expected, _ = reference_head.sketch(packed)
    for isa in available():
        np.testing.assert_array_equal(sketch_of(isa, packed)[0].hi, expected.hi)


def test_a_sketch_whose_scale_does_not_fit_says_nothing() -> None:
    packed = pack.pack_int8(np.full((32, 32), 3), np.full((32, 1), 60000.0, np.float16), 32)
    for isa in available():
        assert (bounds_of(isa, packed, np.ones(32, np.float32))[2][:, 0] == np.inf).all()


@given(rows=st.integers(1, 200), lo_shift=st.one_of(st.none(), st.integers(0, 4)), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_the_twin_finds_the_full_heads_argmax(rows: int, lo_shift: int | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    packed = byte_head(rows, 96, 32, rng) if lo_shift is None else head(rows, 96, 32, lo_shift, rng)
    x = row_of(packed, "normal", rng)
    token, tiles = reference_head.screened_argmax(packed, x)
    assert token == int(reference.linear(packed, x[None], "hi+lo")[0].argmax())
    assert token // 32 in tiles


def test_what_is_not_finite_is_never_screened_out() -> None:
    packed = head(64, 64, 32, 4, np.random.default_rng(0))
    for bad in (np.nan, np.inf):
        x = np.ones(64, np.float32)
        x[40] = bad
        for isa in available():
            lengths = np.empty(2, np.float32)
            _core.lengths(isa, x, lengths)
            norms = np.ones(2, np.float32)
            upper, _ = _core.head_bound(isa, weight_of(packed), 0, norms, lengths, np.full(32, np.nan, np.float32))
            assert not upper < np.finfo(np.float32).max
