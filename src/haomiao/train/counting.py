"""A linear classifier that counts words and characters: what a small model is taught by where labels are few.

TF-IDF of words (one and two in a row) and of characters (one to four in a row, within words), then multinomial logistic
regression with an L2 penalty, fitted by L-BFGS (Joachims 1998, "Text categorization with support vector machines",
section 3, for the kind of features; the penalty's strength by what is held out). Knows nothing about models.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

WORDS, CHARACTERS = 2, 4
STRENGTHS = (3.0, 30.0)
"""Weight of the loss against the penalty: the better of these on what is held out."""
ITERATIONS = 60


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return re.findall(r"\w+", text.lower())


def features_of(text: str) -> tuple[Counter[str], Counter[str]]:
    """How often words and their pairs occur, and sequences of characters in words with a blank at both ends."""
    words = words_of(text)
    pairs = Counter(" ".join(words[i : i + n]) for n in range(1, WORDS + 1) for i in range(len(words) - n + 1))
    characters: Counter[str] = Counter()
    for word in text.lower().split():
        word = f" {word} "
        characters.update(word[i : i + n] for n in range(1, CHARACTERS + 1) for i in range(len(word) - n + 1))
    return pairs, characters


@dataclass(frozen=True)
class Features:
    """Which sequences have a column, and what each weighs."""

    columns: tuple[dict[str, int], dict[str, int]]
    """Of words, of characters."""
    weights: npt.NDArray[np.float32]
    """Inverse document frequencies, smoothed."""

    @classmethod
    def of(cls, texts: Iterable[str]) -> Features:
        """All that occur in `texts`."""
        seen: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        size = 0
        for text in texts:
            size += 1
            for kind, found in zip(seen, features_of(text), strict=True):
                kind.update(found.keys())
        first = {name: place for place, name in enumerate(seen[0])}
        second = {name: len(first) + place for place, name in enumerate(seen[1])}
        frequencies = np.fromiter((*seen[0].values(), *seen[1].values()), np.float64)
        return cls((first, second), (np.log((1 + size) / (1 + frequencies)) + 1).astype(np.float32))

    def bags(self, texts: Sequence[str]) -> Bags:
        """The columns of each text and their values; each kind's part of a text has length one."""
        begins, columns, values = [], [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
        size = 0
        for text in texts:
            begins.append(size)
            for known, found in zip(self.columns, features_of(text), strict=True):
                kept = [(place, count) for name, count in found.items() if (place := known.get(name)) is not None]
                if not kept:
                    continue
                places, counts = np.array(kept).T
                row = (1 + np.log(counts)).astype(np.float32) * self.weights[places]
                columns.append(places)
                values.append(row / np.sqrt(np.square(row).sum()))
                size += len(row)
        found_columns, found_values = (torch.from_numpy(np.concatenate(each)) for each in (columns, values))
        return Bags(torch.tensor(begins), found_columns, found_values)


@dataclass(frozen=True)
class Bags:
    """Sparse rows: where each begins in `columns` and `values`."""

    begins: Tensor
    columns: Tensor
    values: Tensor

    def times(self, table: Tensor) -> Tensor:
        """[rows, labels] for a table [columns, labels]."""
        return F.embedding_bag(self.columns, table, self.begins, per_sample_weights=self.values, mode="sum")


class Counting:
    """The fitted classifier."""

    def __init__(self, texts: Sequence[str], targets: Tensor, strength: float) -> None:
        """`targets` float32 [texts, labels]: how likely each label is."""
        self._features = Features.of(texts)
        bags = self._features.bags(texts)
        table = torch.zeros(len(self._features.weights), targets.shape[1], requires_grad=True)
        bias = torch.zeros(targets.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([table, bias], max_iter=ITERATIONS, history_size=8, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            wrong = F.cross_entropy(bags.times(table) + bias, targets, reduction="sum")
            penalized = strength * wrong + 0.5 * table.square().sum()
            torch.autograd.backward(penalized)
            return penalized.detach()

        optimizer.step(loss)
        self._table, self._bias = table.detach(), bias.detach()

    def logits(self, texts: Sequence[str]) -> Tensor:
        """[texts, labels]."""
        return self._features.bags(texts).times(self._table) + self._bias

    def share_right(self, texts: Sequence[str], answers: Sequence[int]) -> float:
        """How many of `texts` get their label, a place in the rows of `targets`."""
        return float((self.logits(texts).argmax(dim=1) == torch.tensor(answers)).float().mean())
