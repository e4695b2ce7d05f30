"""Random numbers against the published known answers of Random123 (kat_vectors, philox4x32 10)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haomiao.engine.random import fresh_seed, philox4x32, uniform, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert philox4x32(counter, key) == expected


def test_uniform_is_uniform_and_its_arguments_matter() -> None:
    draws = np.array([uniform(7, position, sample) for position in range(1000) for sample in range(4)])
    assert ((draws >= 0) & (draws < 1)).all()
    assert len(set(draws)) == len(draws)
    assert abs(draws.mean() - 0.5) < 0.02
    counts, _ = np.histogram(draws, bins=16, range=(0, 1))
    assert ((counts - 250) ** 2 / 250).sum() < 50  # chi-squared, 15 degrees of freedom
    assert uniform(7, 3, 1) == uniform(7, 3, 1) != uniform(8, 3, 1)
    assert uniform(-1, 0) == uniform((1 << 64) - 1, 0)


def test_fresh_seeds_differ_and_survive_json() -> None:
    seeds = {fresh_seed() for _ in range(100)}
    assert len(seeds) == 100 and all(0 <= seed < 1 << 53 for seed in seeds)


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(0, 2**32 - 1)), max_size=20))
def test_many_at_once_are_the_same(counters: list[tuple[int, int, int]]) -> None:
    assert uniforms(counters).tolist() == [uniform(*each) for each in counters]
