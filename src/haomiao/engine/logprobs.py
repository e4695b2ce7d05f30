"""Log-probabilities of rows of logits: of given tokens and of the likeliest alternatives.

Exponentials in float32, sums in float64, row by row, so that a row's result does not depend on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from haomiao.engine.order import descending, largest
from haomiao.types import F32, TokenLogprob


def log_normalizer(row: F32) -> float:
    """log(sum(exp(row))), float32 [vocab] in, natural log out. NaN if the row is not finite."""
    peak = row.max()
    if not math.isfinite(peak):
        return math.nan
    return float(peak) + math.log(float(np.exp(row - peak).sum(dtype=np.float64)))


def any_logprob(row: F32, token_ids: Sequence[int], normalizer: float) -> float:
    """Natural-log probability that the token is any of `token_ids`; `normalizer` is the row's."""
    values = [float(row[token_id]) - normalizer for token_id in token_ids]
    peak = max(values)
    return peak + math.log(sum(math.exp(value - peak) for value in values)) if len(values) > 1 else peak


def log_softmax_at(row: F32, token_id: int, alternatives: int) -> TokenLogprob:
    """A token's log-probability and those of the likeliest `alternatives` tokens, likeliest first."""
    normalizer = log_normalizer(row)
    top = []
    if alternatives > 0:
        ids = descending(row, largest(row, alternatives))[:alternatives]
        top = [(int(each), float(row[each]) - normalizer) for each in ids]
    return TokenLogprob(token_id, float(row[token_id]) - normalizer, top)
