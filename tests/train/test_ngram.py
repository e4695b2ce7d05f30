"""The n-gram model: probabilities that sum to one, and the same as from its definition with dictionaries."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.errors import InputError
from haomiao.train.ngram import NGram

VOCABULARY = 5


class Counted:
    """The definition, with dictionaries: slow and plain. Discounts are the model's own."""

    def __init__(self, tokens: Sequence[int], order: int, discounts: Sequence[tuple[float, float, float]]) -> None:
        self.discounts = discounts
        self.counts: list[Counter[tuple[int, ...]]] = []
        for length in range(1, order + 1):
            longer = length + (length < order)
            grams = [tuple(tokens[i : i + longer]) for i in range(len(tokens) - longer + 1)]
            self.counts.append(Counter(grams) if length == order else Counter(gram[1:] for gram in set(grams)))
        self.after: list[dict[tuple[int, ...], list[int]]] = []
        for counter in self.counts:
            after = defaultdict(list)
            for gram, count in counter.items():
                after[gram[:-1]].append(count)
            self.after.append(after)

    def probability(self, context: tuple[int, ...], token: int) -> float:
        if len(context) >= len(self.counts):
            context = context[len(context) - len(self.counts) + 1 :]
        below = self.probability(context[1:], token) if context else 1 / VOCABULARY
        after = self.after[len(context)].get(context)
        if not after:
            return below
        taken = [0.0, *self.discounts[len(context)]]
        count = self.counts[len(context)][(*context, token)]
        left = sum(taken[min(each, 3)] for each in after)
        return (count - taken[min(count, 3)] + left * below) / sum(after)


streams = st.lists(st.integers(0, VOCABULARY - 1), min_size=4, max_size=60)


@given(stream=streams, held=streams, order=st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_is_what_the_definition_says(stream: list[int], held: list[int], order: int) -> None:
    model = NGram(stream, VOCABULARY, order)
    twin = Counted(stream, order, [level.discounts for level in model.orders])
    wanted = [twin.probability(tuple(held[max(0, i - order + 1) : i]), token) for i, token in enumerate(held)]
    np.testing.assert_allclose(model.probabilities(held), wanted, rtol=1e-12)


@given(stream=streams, context=st.lists(st.integers(0, VOCABULARY - 1), max_size=4), order=st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_sums_to_one(stream: list[int], context: list[int], order: int) -> None:
    model = NGram(stream, VOCABULARY, order)
    after = [model.probabilities([*context, token])[-1] for token in range(VOCABULARY)]
    assert min(after) > 0
    assert sum(after) == pytest.approx(1)


def test_discounts_are_those_of_the_paper() -> None:
    # four tokens occur once, two twice, one three times, one four times: Y = 4 / (4 + 2 * 2) = 1/2
    stream = [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 7, 7, 7, 7]
    model = NGram(stream, 8, 1)
    assert model.orders[0].discounts == pytest.approx((1 - 0.5 * 2 * 2 / 4, 2 - 0.5 * 3 * 1 / 2, 3 - 0.5 * 4 * 1 / 1))


def test_learns_what_follows() -> None:
    random = np.random.default_rng(1)
    words = random.integers(0, 50, (50, 6))  # each of 50 words is six tokens
    text = [words[i].ravel() for i in random.integers(0, 50, (2, 3000))]
    nats = [-np.log(NGram(text[0], 50, order).probabilities(text[1])).mean() for order in (1, 2, 3, 4)]
    assert nats == sorted(nats, reverse=True) and nats[3] < 0.4 * nats[0]


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "order"), [([0, 1], 2, 3), ([0, 2], 2, 1), ([-1, 0], 2, 1), ([[0]], 2, 1), ([0], 2, 9)]
)
def test_refuses_what_cannot_be(tokens: list[int], vocabulary: int, order: int) -> None:
    with pytest.raises(InputError):
        NGram(tokens, vocabulary, order)
    with pytest.raises(InputError):
        NGram([0, 1], 2, 1).probabilities([2])
