"""How far one set of logits is from another: log-softmax, KL divergence, top-1 agreement, negative log-likelihood.

All arithmetic is float64 on float32 inputs, in nats. Knows nothing about models or text.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
Logits = npt.NDArray[np.floating]


def log_softmax(logits: Logits) -> F64:
    """`logits - log(sum(exp(logits)))` over the last axis, shifted by the maximum so that nothing overflows."""
    wide = np.asarray(logits, dtype=np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def negative_log_likelihood(logits: Logits, targets: npt.ArrayLike) -> F64:
    """`-log p(target)` of each row, nats. `logits` [rows, vocab], `targets` [rows]."""
    picked = np.asarray(targets, dtype=np.int64).reshape(-1)
    if logits.ndim != 2 or picked.shape[0] != logits.shape[0]:
        raise ValueError(f"one target for each row of logits: {picked.shape[0]} for {logits.shape}")
    if picked.size and (picked.min() < 0 or picked.max() >= logits.shape[1]):
        raise ValueError("a target lies outside the vocabulary")
    wide = np.asarray(logits, dtype=np.float64)
    highest = wide.max(axis=-1)
    normalizer = highest + np.log(np.exp(wide - highest[:, None]).sum(axis=-1))
    return np.asarray(normalizer - wide[np.arange(picked.shape[0]), picked])


def kl_divergence(reference: Logits, other: Logits) -> F64:
    """`KL(reference || other)` of each row, nats, never below 0. Both are logits [rows, vocab]."""
    _same_shape(reference, other)
    log_p = log_softmax(reference)
    divergence = (np.exp(log_p) * (log_p - log_softmax(other))).sum(axis=-1)
    return np.asarray(np.maximum(divergence, 0.0))  # rounding may leave -1e-17


def top1_agreement(reference: Logits, other: Logits) -> npt.NDArray[np.bool_]:
    """Of each row, whether both choose the same token (the lowest index among the greatest logits)."""
    _same_shape(reference, other)
    return np.asarray(np.argmax(reference, axis=-1) == np.argmax(other, axis=-1))


def perplexity(mean_nll: float) -> float:
    """`exp` of a mean negative log-likelihood in nats; infinite where that overflows."""
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf


def _same_shape(reference: Logits, other: Logits) -> None:
    if reference.shape != other.shape:
        raise ValueError(f"logits of different shapes: {reference.shape} and {other.shape}")
