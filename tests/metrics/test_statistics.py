"""Percentiles, summaries and bootstrap intervals against what is known of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haomiao.metrics.statistics import bootstrap_mean, percentile, summarize

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)


@given(numbers, st.floats(0, 100))
def test_percentile_lies_within_and_matches_order_statistics(values: list[float], q: float) -> None:
    assert min(values) <= percentile(values, q) <= max(values)
    assert percentile(values, 0) == min(values)
    assert percentile(values, 100) == max(values)


def test_percentile_interpolates() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5
    assert percentile([10.0, 20.0], 99) == pytest.approx(19.9)


@pytest.mark.parametrize(
    ("values", "q"), [([], 50), ([1.0], -1), ([1.0], 101), ([float("nan")], 50), ([float("inf")], 50)]
)
def test_percentile_refuses(values: list[float], q: float) -> None:
    with pytest.raises(ValueError):
        percentile(values, q)


def test_summary() -> None:
    summary = summarize([3.0, 1.0, 2.0])
    assert (summary.median, summary.low, summary.high, summary.samples) == (2.0, 1.0, 3.0, 3)


@given(numbers)
def test_interval_holds_its_ends_and_repeats(values: list[float]) -> None:
    interval = bootstrap_mean(values, resamples=200)
    slack = 1e-9 * max(1.0, max(abs(value) for value in values))
    assert min(values) - slack <= interval.low <= interval.high <= max(values) + slack
    assert interval.estimate == pytest.approx(float(np.mean(values)), abs=slack)
    assert interval == bootstrap_mean(values, resamples=200)


def test_interval_is_about_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    interval = bootstrap_mean(values)
    half = (interval.high - interval.low) / 2
    assert half == pytest.approx(1.96 * values.std() / np.sqrt(400), rel=0.1)


def test_weights_count() -> None:
    assert bootstrap_mean([1.0, 4.0], [3.0, 1.0]).estimate == 1.75
    single = bootstrap_mean([7.0], [2.0])
    assert (single.low, single.high, single.samples) == (7.0, 7.0, 1)
    for bad in ([1.0], [-1.0, 2.0], [0.0, 0.0]):
        with pytest.raises(ValueError):
            bootstrap_mean([1.0, 4.0], bad)
    with pytest.raises(ValueError):
        bootstrap_mean([1.0], confidence=1.0)
