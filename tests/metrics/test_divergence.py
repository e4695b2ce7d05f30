"""KL divergence, agreement and likelihood against their definitions, with logits that overflow a careless exp."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from haomiao.metrics.divergence import (
    kl_divergence,
    log_softmax,
    negative_log_likelihood,
    perplexity,
    top1_agreement,
)

logits = arrays(np.float32, (3, 5), elements=st.floats(-1e4, 1e4, width=32))


@given(logits)
def test_log_softmax_normalizes(rows: np.ndarray) -> None:
    np.testing.assert_allclose(np.exp(log_softmax(rows)).sum(axis=-1), 1.0, rtol=1e-12)


@given(logits, logits)
def test_kl_is_not_negative_and_zero_only_for_the_same(p: np.ndarray, q: np.ndarray) -> None:
    assert (kl_divergence(p, q) >= 0).all()
    assert (kl_divergence(p, p) == 0).all()
    # adding a constant to a row changes no probability
    np.testing.assert_allclose(kl_divergence(p, p.astype(np.float64) + 3), 0.0, atol=1e-9)


def test_kl_by_hand() -> None:
    p, q = np.log(np.array([[0.5, 0.5]])), np.log(np.array([[0.25, 0.75]]))
    assert kl_divergence(p, q)[0] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


@given(logits)
def test_likelihood_agrees_with_log_softmax(rows: np.ndarray) -> None:
    targets = [0, 4, 2]
    expected = -log_softmax(rows)[np.arange(3), targets]
    np.testing.assert_allclose(negative_log_likelihood(rows, targets), expected, rtol=1e-12, atol=1e-9)


def test_refusals() -> None:
    rows = np.zeros((2, 4), np.float32)
    for targets in ([0], [0, 4], [-1, 0]):
        with pytest.raises(ValueError):
            negative_log_likelihood(rows, targets)
    with pytest.raises(ValueError):
        kl_divergence(rows, np.zeros((2, 5)))
    with pytest.raises(ValueError):
        top1_agreement(rows, np.zeros((1, 4)))


def test_agreement_takes_the_lowest_index_of_equals() -> None:
    p = np.array([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    q = np.array([[5.0, 1.0, 5.0], [0.0, 1.0, 2.0]])
    assert top1_agreement(p, q).tolist() == [True, False]


def test_perplexity() -> None:
    assert perplexity(math.log(24.6)) == pytest.approx(24.6)
    assert perplexity(1e6) == math.inf
