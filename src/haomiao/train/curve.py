"""Loss against tokens, of the logs that a model's training wrote one after another.

Knows the two keys that it reads of a log's lines (`tokens`, seen so far, and `loss`); nothing about training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from haomiao.errors import InputError


def loss_against_tokens(logs: Sequence[Path], shares: int) -> list[tuple[int, float]]:
    """(tokens seen, mean training loss since the share before) for `shares` equal parts of all tokens.

    A log goes on where the one before ended, whatever number it begins at; a line counts for the tokens since the line
    before it. A share in which no line ends is left out. Raises `InputError` where no log names a loss."""
    seen, losses, weights, begun = [], [], [], 0
    for path in logs:
        last = 0
        for line in path.read_text(encoding="utf-8").splitlines():
            found = json.loads(line) if line else {}
            if "loss" in found and "tokens" in found:
                seen.append(begun + found["tokens"])
                losses.append(found["loss"])
                weights.append(found["tokens"] - last)
                last = found["tokens"]
        begun += last
    if not begun:
        raise InputError(f"no loss in {', '.join(map(str, logs))}", param="log")
    places = np.minimum(np.searchsorted(np.linspace(0, begun, shares + 1)[1:], seen), shares - 1)
    curve = []
    for share in np.unique(places):
        among = np.flatnonzero(places == share)
        mean = np.average(np.take(losses, among), weights=np.take(weights, among))
        curve.append((seen[among[-1]], float(mean)))
    return curve
