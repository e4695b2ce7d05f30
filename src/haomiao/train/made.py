"""Made-up examples: a cheap, endless supply of sentences with a counting classifier's opinion of each.

A small model learns a few hundred sentences by heart; a linear classifier over counted words does not, and is hard to
beat there. So the classifier (`counting`), fitted on what is learnt, teaches the model on text that nobody wrote: two
sentences of the data, cut and joined, with words left out or replaced, half of these by words of the whole text and
half by words of the vocabulary, so that rare ones are heard of too. The model learns its opinions (Bucila, Caruana and
Niculescu-Mizil 2006, "Model compression", section 2: pseudo-labelled synthetic data; Hinton, Vinyals and Dean,
arXiv:1503.02531, section 2: softened by a temperature). Knows nothing about models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from haomiao.train.counting import STRENGTHS, Counting

MADE = 4
"""Names the stream of random numbers that makes examples."""
TEMPERATURE = 2.0
"""Softens the opinions that are learnt."""
JOINED = 0.5
"""Share that continues with the end of another sentence."""
NOISE = 0.6
"""Most words that are changed; the share is drawn evenly below it."""
REPLACED = 0.7
"""Share of the changed words that others take the place of; the rest is left out."""
_UNIT = re.compile(r"\s*(?:[\u3400-\u9fff]|[^\W\u3400-\u9fff]+(?:['\u2019][^\W\u3400-\u9fff]+)*|[^\w\s])")

_WORD = re.compile(r"[^\W\u3400-\u9fff]")


def units_of(text: str) -> list[str]:
    """Words with the blanks before them, single Chinese characters, single signs: what sentences are cut between."""
    return _UNIT.findall(text) or [text]


def spoken(units: Sequence[str]) -> str:
    """Units as text: words that met without a blank get one."""
    text = ""
    for unit in units:
        apart = text and unit and _WORD.match(text[-1]) and _WORD.match(unit[0])
        text += f" {unit}" if apart else unit
    return text.strip()


@dataclass(frozen=True)
class Made:
    """Texts of a step, and the logits [texts, labels] that the classifier gives them."""

    texts: list[str]
    opinions: Tensor


class Maker:
    """Makes examples out of labelled `texts`. `answers` are the places of their labels among `labels`."""

    def __init__(
        self,
        texts: Sequence[str],
        answers: Sequence[int],
        labels: int,
        held: tuple[Sequence[str], Sequence[int]],
        seed: int,
    ) -> None:
        """The classifier's strength is the one that is right most often on what is `held` out."""
        targets = F.one_hot(torch.tensor(answers), labels).float()
        fitted = [Counting(texts, targets, strength) for strength in STRENGTHS]
        self.shares = [counted.share_right(*held) for counted in fitted]
        """How often each strength is right on what is held out."""
        self.teacher = fitted[int(np.argmax(self.shares))]
        self._texts, self._seed = list(texts), seed
        self._units = [units_of(text) for text in texts]
        self._place = {text: place for place, text in enumerate(texts)}
        self._said = [unit for units in self._units for unit in units]
        self._known = sorted(set(self._said))

    def make(self, step: int, texts: Sequence[str], times: int) -> Made:
        """`times` variations of each of `texts`, which are among those learnt: a function of its arguments alone."""
        random = np.random.Generator(np.random.Philox([self._seed, MADE, step]))
        made = [self._variation(text, random) for text in texts for _ in range(times)]
        return Made(made, self.teacher.logits(made))

    def _variation(self, text: str, random: np.random.Generator) -> str:
        units = self._units[self._place[text]]
        if random.random() < JOINED:
            other = self._units[int(random.integers(len(self._units)))]
            units = units[: int(random.integers(len(units) + 1))] + other[int(random.integers(len(other) + 1)) :]
        changed, drawn = random.random() * NOISE, random.random(len(units))
        found = [
            unit if share >= changed else self._word(random) if share < REPLACED * changed else ""
            for unit, share in zip(units, drawn, strict=True)
        ]
        return spoken(found) or text

    def _word(self, random: np.random.Generator) -> str:
        words = self._known if random.random() < 0.5 else self._said
        return words[int(random.integers(len(words)))]
