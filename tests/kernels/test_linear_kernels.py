"""Linear kernels: every instruction set of this machine against the numpy twin, and the promises about bits."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao import _core
from haomiao.errors import InputError
from haomiao.kernels import isa as instruction_sets
from haomiao.kernels import native, pack, reference, rtn
from haomiao.kernels.packed import PackedTensor

ISAS = instruction_sets.available()
PLANES: tuple[Literal["hi", "hi+lo"], ...] = ("hi", "hi+lo")


def packed_matrices(weights: np.ndarray, group: int, lo_shift: int) -> list[PackedTensor]:
    return [
        pack.pack_f32(weights),
        pack.pack_bf16(weights),
        rtn.quantize_int8(weights, group),
        rtn.quantize_planes(weights, group, lo_shift),
        rtn.quantize_planes(weights, group, with_lo=False),
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 100),
    st.integers(1, 300),
    st.sampled_from([32, 64, 128]),
    st.integers(0, 4),
    st.one_of(st.integers(1, 9), st.sampled_from([24, 25, 40, 200])),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_every_instruction_set_equals_the_twin(
    rows: int, cols: int, group: int, lo_shift: int, tokens: int, with_bias: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    weights = random.standard_normal((rows, cols)).astype(np.float32)
    x = random.standard_normal((tokens, cols)).astype(np.float32) * np.float32(10.0 ** random.integers(-3, 3))
    bias = random.standard_normal(rows).astype(np.float32) if with_bias else None
    for packed in packed_matrices(weights, group, lo_shift):
        for activation in reference.allowed_activations(packed):
            for planes in PLANES if packed.lo is not None else PLANES[:1]:
                want = reference.linear(packed, x, planes, activation, bias)
                for isa in ISAS:
                    found = native.linear(packed, x, planes, activation, bias, isa=isa)
                    if activation == "bf16" and isa == "avx512_bf16":
                        scale = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(weights, axis=1)[None, :]
                        assert (np.abs(found - want) <= 1e-5 * scale).all()
                    else:
                        assert np.array_equal(found, want), (isa, packed.encoding, activation, planes)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4, 7, 8, 9, 30]),
    st.integers(0, 4),
    st.sampled_from(["one sign", "by column", "random"]),
    st.integers(0, 2**32 - 1),
)
def test_the_greatest_sums_are_exact(tokens: int, lo_shift: int, signs: str, seed: int) -> None:
    """Codes at the ends of their range times activations of +-127: where sums of 16 bits would wrap or saturate."""
    random = np.random.default_rng(seed)
    rows, cols = 40, 96
    sign = np.ones((rows + tokens, cols), np.int64)
    if signs == "by column":
        sign[:] = random.choice([-1, 1], cols)
    elif signs == "random":
        sign = random.choice([-1, 1], sign.shape)
    of_weights, of_tokens = sign[:rows], sign[rows:]
    scales = np.ones((rows, cols // 32), np.float16)
    codes8, codes4 = np.where(of_weights < 0, -128, 127), np.where(of_weights < 0, -8, 7)
    matrices = [
        (pack.pack_int8(codes8, scales, 32), codes8),
        (pack.pack_planes(codes4, None, scales, 32, 0), codes4),
        (pack.pack_planes(codes4, codes4, scales, 32, lo_shift), codes4 * (1 << lo_shift) + codes4),
    ]
    for packed, codes in matrices:
        factor = 2.0**-lo_shift if packed.lo is not None else 1.0
        x = of_tokens.astype(np.float32) * 127  # a scale of exactly 1
        want = (of_tokens * 127) @ codes.T * factor
        for isa in ISAS:
            assert np.array_equal(native.linear(packed, x, isa=isa), want.astype(np.float32)), (isa, packed.encoding)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.data())
def test_a_token_does_not_depend_on_its_company(tokens: int, data: st.DataObject) -> None:
    random = np.random.default_rng(tokens)
    weights = random.standard_normal((70, 160)).astype(np.float32)
    x = random.standard_normal((tokens, 160)).astype(np.float32)
    chosen = data.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=12))
    for packed in packed_matrices(weights, 32, 4):
        for activation in reference.allowed_activations(packed):
            for isa in ISAS:
                whole = native.linear(packed, x, activation=activation, isa=isa)
                part = native.linear(packed, x[chosen], activation=activation, isa=isa)
                assert np.array_equal(part, whole[chosen]), (isa, packed.encoding, activation)


@pytest.mark.parametrize("isa", ISAS)
def test_tile_ranges_join_to_the_whole(isa: str) -> None:
    random = np.random.default_rng(5)
    weights = random.standard_normal((150, 96)).astype(np.float32)
    x = random.standard_normal((30, 96)).astype(np.float32)
    for packed in packed_matrices(weights, 32, 4):
        whole = native.linear(packed, x, isa=isa)
        for cut in range(packed.tiles + 1):
            left = native.linear(packed, x, isa=isa, tiles=(0, cut))
            right = native.linear(packed, x, isa=isa, tiles=(cut, packed.tiles))
            assert np.isnan(left[:, cut * 32 :]).all()
            assert np.isnan(right[:, : cut * 32]).all()
            assert np.array_equal(np.where(np.isnan(left), right, left), whole)


@pytest.mark.parametrize("isa", ISAS)
def test_strange_activations(isa: str) -> None:
    """NaN and infinities make their own token NaN and no other; tiny values count as zero at the int points."""
    random = np.random.default_rng(6)
    packed = rtn.quantize_planes(random.standard_normal((40, 96)).astype(np.float32))
    x = random.standard_normal((5, 96)).astype(np.float32)
    clean = native.linear(packed, x, isa=isa)
    x[0, 5], x[1, 95], x[2, 40] = np.nan, np.inf, -np.inf
    x[3] *= np.float32(1e-40)
    y = native.linear(packed, x, isa=isa)
    assert np.isnan(y[:3]).all()
    assert not y[3].any()
    assert np.array_equal(y[4], clean[4])
    assert np.array_equal(y, reference.linear(packed, x), equal_nan=True)
    for other in (pack.pack_f32(pack.unpack(packed)), pack.pack_bf16(pack.unpack(packed))):
        assert np.array_equal(native.linear(other, x, isa=isa)[4], native.linear(other, x[4:], isa=isa)[0])


@pytest.mark.parametrize("isa", ISAS)
def test_read_row(isa: str) -> None:
    weights = np.random.default_rng(8).standard_normal((50, 70)).astype(np.float32)
    for packed in packed_matrices(weights, 64, 3):
        for row in (0, 31, 32, 49):
            assert np.array_equal(native.read_row(packed, row, isa=isa), pack.unpack(packed)[row])
            assert np.array_equal(reference.read_row(packed, row), pack.unpack(packed)[row])
        with pytest.raises(InputError):
            native.read_row(packed, 50, isa=isa)
        with pytest.raises(InputError):
            reference.read_row(packed, -1)


@pytest.mark.parametrize(
    ("name", "median", "tail"),
    # |y - f32 y| / (|x| |w|), median and 99.9 % over 512 x 64 outputs of 896 columns, Gaussian weights and activations
    [("bf16", 6e-5, 3e-4), ("int8", 1.9e-4, 9.5e-4), ("int4", 2.05e-3, 1.0e-2)],
)
def test_errors_against_f32(name: str, median: float, tail: float) -> None:
    random = np.random.default_rng(11)
    weights = random.standard_normal((512, 896)).astype(np.float32)
    x = random.standard_normal((64, 896)).astype(np.float32)
    packed = pack.pack_bf16(weights) if name == "bf16" else rtn.quantize_planes(weights)
    y = native.linear(packed, x, "hi" if name == "int4" else "hi+lo")
    exact = x.astype(np.float64) @ weights.T.astype(np.float64)
    scale = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(weights, axis=1)[None, :]
    error = np.abs(y - exact) / scale
    assert np.quantile(error, 0.5) < median
    assert np.quantile(error, 0.999) < tail


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def to_float32(exact: Fraction) -> float:
    """Round a fraction to float32, ties to even, by comparing the exact neighbours."""
    with np.errstate(over="ignore"):
        guess = np.float32(float(exact))
        if np.isinf(guess):
            return float(guess)
        candidates = [guess, np.nextafter(guess, np.float32(np.inf)), np.nextafter(guess, np.float32(-np.inf))]
    candidates = [c for c in candidates if np.isfinite(c)]
    distance = [abs(Fraction(float(c)) - exact) for c in candidates]
    best = [c for c, d in zip(candidates, distance, strict=True) if d == min(distance)]
    return float(min(best, key=lambda c: int(np.float32(c).view(np.uint32)) & 1))


@settings(max_examples=500)
@given(finite, finite, finite)
def test_fma_rounds_once(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if abs(exact) < Fraction(float(np.finfo(np.float32).max)):
        found = reference.fma(np.float32(a), np.float32(b), np.float32(c))
        assert float(found) == to_float32(exact)


def test_fma_where_two_roundings_would_err() -> None:
    """a * b + c halfway between two float32 but for a bit far below float64's last."""
    a, b = np.float32(1 + 2**-12), np.float32(1 + 2**-12)
    c = np.float32(2**-60)
    assert reference.fma(a, b, c) == np.float32(1 + 2**-11 + 2**-23)
    assert reference.fma(a, b, -c) == np.float32(1 + 2**-11)


def test_calls_that_contradict_themselves() -> None:
    packed = rtn.quantize_planes(np.ones((4, 64), np.float32))
    x = np.ones((2, 64), np.float32)
    for linear in (native.linear, reference.linear):
        with pytest.raises(InputError, match="activations"):
            linear(packed, x, activation="f32")
        with pytest.raises(InputError, match=r"\[tokens, 64\]"):
            linear(packed, x[:, :32])
    with pytest.raises(InputError, match="planes"):
        native.linear(packed, x, "lo")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="bias"):
        native.linear(packed, x, bias=np.ones(3, np.float32))
    with pytest.raises(InputError, match="tile range"):
        native.linear(packed, x, tiles=(0, 9))
    with pytest.raises(InputError, match="instruction set"):
        native.linear(packed, x, isa="mmx")
    broken = PackedTensor("planes", 4, 64, 32, 4, packed.hi[:-1], packed.lo)
    with pytest.raises(InputError, match="size"):
        native.linear(broken, x)


@pytest.mark.parametrize(
    "arguments",
    [
        {"tokens": 3},
        {"rows": 7},
        {"both": True, "activation": "bf16"},
        {"activation": "f64"},
        {"prepared": 8},
        {"tiles": (1, 0)},
        {"tiles": (-1, 1)},
    ],
)
def test_the_binding_refuses_wrong_shapes(arguments: dict[str, Any]) -> None:
    packed = rtn.quantize_planes(np.ones((4, 64), np.float32))
    prepared = _core.prepare(ISAS[0], "int8", np.ones((2, 64), np.float32), 64)
    out = np.zeros((arguments.get("tokens", 2), arguments.get("rows", 4)), np.float32)
    with pytest.raises(ValueError, match=r"\w"):
        _core.linear(
            ISAS[0],
            native.weight_of(packed),
            arguments.get("both", False),
            arguments.get("activation", "int8"),
            prepared[arguments.get("prepared", 0) :],
            out,
            None,
            *arguments.get("tiles", (0, 1)),
        )
    with pytest.raises(ValueError, match="padded_cols"):
        _core.prepare(ISAS[0], "int8", np.ones((2, 64), np.float32), 65)
    with pytest.raises(ValueError, match="padded_cols"):
        _core.prepare(ISAS[0], "int8", np.ones((2, 64), np.float32), 32)
