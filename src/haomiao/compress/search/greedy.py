"""The descent: from the most accurate model, always the step that costs least error for the time it saves.

A step makes one matrix a level cheaper, leaves a layer out, or narrows all FFNs. What a step costs is measured, not
added up: a score stands until another step was taken; then the best by its old score is measured again and taken if it
is still the best (lazy greedy). Everything measured is looked up in a ledger first, so that a search that was
interrupted takes the same way again. Knows states, errors and times as numbers only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from haomiao.compress.search.levels import LEVELS, State


class Terrain(Protocol):
    """What the descent asks for."""

    matrices: tuple[str, ...]
    widths: int

    def few(self, state: State) -> float:
        """KL on a few held-out samples."""
        ...

    def ms(self, state: State) -> float:
        """Predicted milliseconds a step."""
        ...

    def deepest(self, name: str, state: State) -> int:
        """The last level a matrix can take."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """A step that was taken and where it led."""

    name: str
    state: State
    kl: float
    ms: float


Allowed = Callable[[Step], bool]


def moves(terrain: Terrain, state: State) -> dict[str, State]:
    """Every step from a state, by name."""
    found: dict[str, State] = {}
    for index, name in enumerate(terrain.matrices):
        level = state.levels[index] + 1
        if int(name.split(".")[1]) in state.layers and level <= terrain.deepest(name, state):
            levels = (*state.levels[:index], level, *state.levels[index + 1 :])
            found[f"{name} {LEVELS[level]}"] = replace(state, levels=levels)
    if len(state.layers) > 1:
        for layer in state.layers:
            found[f"without layer {layer}"] = replace(state, layers=tuple(i for i in state.layers if i != layer))
    if state.width + 1 < terrain.widths:
        found[f"width {state.width + 1}"] = _narrowed(terrain, state)
    return found


def _narrowed(terrain: Terrain, state: State) -> State:
    wider = replace(state, width=state.width + 1)
    pairs = zip(terrain.matrices, state.levels, strict=True)
    return replace(wider, levels=tuple(min(level, terrain.deepest(name, wider)) for name, level in pairs))


def descend(terrain: Terrain, start: State, allowed: Allowed) -> Iterator[Step]:
    """Steps, best first, until none is left. A step that `allowed` refuses is not offered again."""
    state, kl, ms = start, terrain.few(start), terrain.ms(start)
    scores: dict[str, tuple[float, int]] = {}  # name -> (KL for a millisecond, how many steps had been taken then)
    refused: set[str] = set()
    taken = 0
    while True:
        offered = {name: to for name, to in moves(terrain, state).items() if name not in refused}
        offered = {name: to for name, to in offered.items() if terrain.ms(to) < ms}
        if not offered:
            return
        for name, to in offered.items():
            if name not in scores:
                scores[name] = score(terrain, to, kl, ms), taken
        while True:
            best = min(offered, key=lambda name: (scores[name][0], name))
            if scores[best][1] == taken:
                break
            scores[best] = score(terrain, offered[best], kl, ms), taken
        step = Step(best, offered[best], terrain.few(offered[best]), terrain.ms(offered[best]))
        if not allowed(step):
            refused.add(best)
            continue
        yield step
        state, kl, ms = step.state, step.kl, terrain.ms(step.state)
        del scores[best]
        taken += 1


def score(terrain: Terrain, to: State, kl: float, ms: float) -> float:
    """Error for a millisecond that a step saves; below nothing where it makes the model better."""
    return (terrain.few(to) - kl) / (ms - terrain.ms(to))
