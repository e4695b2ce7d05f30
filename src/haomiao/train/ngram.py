"""An n-gram language model: what counting alone predicts, the measure beside which a trained model stands.

Interpolated Kneser-Ney with three discounts (Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language
Modeling", 1999, sections 3 and 4.1.5): the highest order takes counts as they are, every lower one the number of
different tokens that precede, the lowest is mixed with the uniform distribution. Nothing is pruned.

Counts are sorted arrays: an n-gram is named by (its first n - 1 tokens' name) * vocabulary + (its last token), so a key
of any order fits 64 bits and a search finds it. A text of 26 M tokens needs about 120 bytes a token while order 5 is
made. Knows token ids; nothing of text, models or torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from haomiao.errors import InputError

MAX_ORDER = 8
MAX_VOCABULARY = 1 << 20
ABSENT = -1
"""Name of an n-gram that the text does not hold."""

Ids = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Order:
    """All n-grams of one length. `keys` [grams] ascending; the name of an n-gram is its place there."""

    keys: Ids
    counts: npt.NDArray[np.int32]
    """[grams]: occurrences, or (below the highest order) different tokens that precede."""
    totals: Ids
    """[contexts]: sum of the counts that follow."""
    left: F64
    """[contexts]: what the discounts take from them, to be given to the order below."""
    discounts: tuple[float, float, float]
    """Taken from counts of 1, 2, and 3 or more."""

    def find(self, keys: Ids) -> Ids:
        """Names of n-grams by their keys; `ABSENT` where there is none."""
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, places, ABSENT)


class NGram:
    """The model of one stream of tokens. Raises `InputError` for a stream, order or vocabulary that cannot be."""

    def __init__(self, tokens: npt.ArrayLike, vocabulary: int, order: int = 5) -> None:
        stream = np.asarray(tokens, np.int64)
        if not 1 <= order <= MAX_ORDER or not 1 <= vocabulary <= MAX_VOCABULARY:
            raise InputError(f"an n-gram model has order 1 to {MAX_ORDER} and at most {MAX_VOCABULARY} tokens")
        if stream.ndim != 1 or len(stream) < order:
            raise InputError(f"a model of order {order} needs a stream of as many tokens")
        if stream.min() < 0 or stream.max() >= vocabulary:
            raise InputError(f"token ids lie between 0 and {vocabulary - 1}")
        self.vocabulary, self.order = vocabulary, order
        self.orders = _count(stream, vocabulary, order)

    def probabilities(self, tokens: npt.ArrayLike, order: int | None = None) -> F64:
        """The probability of every token of a stream [n] given up to `order - 1` before it: float64 [n].

        A lower `order` than the model's is what the model falls back on; to be judged by itself, it is made by itself.
        """
        stream = np.asarray(tokens, np.int64)
        if stream.ndim != 1 or (len(stream) and (stream.min() < 0 or stream.max() >= self.vocabulary)):
            raise InputError(f"token ids lie between 0 and {self.vocabulary - 1}")
        found = np.full(len(stream), 1.0 / self.vocabulary)
        context = np.zeros(len(stream), np.int64)  # the name of what stands before each token; that of nothing is 0
        for level in self.orders[:order]:
            here = level.find(np.where(context == ABSENT, ABSENT, context * self.vocabulary + stream))
            found = _interpolated(level, context, here, found)
            context = np.concatenate(([ABSENT], here[:-1]))[: len(stream)]
        return found


def _interpolated(level: Order, context: Ids, here: Ids, below: F64) -> F64:
    """One order over the one below; where the context never occurred, what is below."""
    known = (context != ABSENT) & (level.totals[context] > 0)
    total = np.where(known, level.totals[context], 1)
    count = np.where(here == ABSENT, 0, level.counts[here])
    discount = np.array([0.0, *level.discounts])[np.minimum(count, 3)]
    mixed = (count - discount + level.left[context] * below) / total
    return np.where(known, mixed, below)


def _count(stream: Ids, vocabulary: int, order: int) -> list[Order]:
    """The orders from 1 upwards. Names of the n-grams that end at each place go from one order to the next."""
    orders: list[Order] = []
    names = np.zeros(len(stream), np.int64)  # of what stands before each place
    ending = names  # of the n-grams that end at each place
    contexts = 1
    below: tuple[Ids, npt.NDArray[np.int32], int] | None = None
    for length in range(1, order + 1):
        keys, first, here, occurrences = np.unique(
            names * vocabulary + stream[length - 1 :], return_index=True, return_inverse=True, return_counts=True
        )
        if below is not None:  # each of these n-grams is one more token before its own ending
            kept, _, kept_contexts = below
            preceded = np.bincount(ending[first + 1], minlength=len(kept)).astype(np.int32)
            orders.append(_order(kept, preceded, kept_contexts, vocabulary))
        below = keys, occurrences.astype(np.int32), contexts
        contexts, names, ending = len(keys), here[:-1], here
    assert below is not None  # there is an order
    orders.append(_order(*below, vocabulary))
    return orders


def _order(keys: Ids, counts: npt.NDArray[np.int32], contexts: int, vocabulary: int) -> Order:
    """Discounts of an order, and what they leave for the one below."""
    discounts = _discounts(counts)
    owner = keys // vocabulary
    totals = np.bincount(owner, weights=counts, minlength=contexts).astype(np.int64)
    taken = np.array([0.0, *discounts])[np.minimum(counts, 3)]
    left = np.bincount(owner, weights=taken, minlength=contexts).astype(np.float64)
    return Order(keys, counts, totals, left, discounts)


def _discounts(counts: npt.NDArray[np.int32]) -> tuple[float, float, float]:
    """Chen and Goodman's estimates from the number of n-grams with counts 1 to 4. Where those are so few that an
    estimate leaves (0, count], half of each count: every context then leaves something to what was never seen."""
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == times)) for times in (1, 2, 3, 4))
    if n1 and n2 and n3:
        y = n1 / (n1 + 2 * n2)
        found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        if all(0.0 < each <= times for times, each in enumerate(found, 1)):
            return found
    return 0.5, 1.0, 1.5
