"""What an opened model holds beside its weights: tokenizer, ends of answers, measured errors, points of the throttle.

Knows artifacts and tokenizers; nothing of engines and requests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from haomiao.errors import InputError, ModelNotFoundError

if TYPE_CHECKING:
    from pathlib import Path

    from haomiao.models.open import OpenedModel
    from haomiao.text.tokenizer import Tokenizer


class Beside(threading.Thread):
    """The tokenizer, loaded beside the weights. (`concurrent.futures` would be as good, but takes 5 ms to import.)"""

    def __init__(self, load: Callable[[], Tokenizer | None]) -> None:
        super().__init__(name="haomiao-tokenizer", daemon=True)
        self._load = load
        self._found: Tokenizer | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._found = self._load()
        except BaseException as error:  # raised where the result is asked for
            self._error = error

    def result(self) -> Tokenizer | None:
        """What was loaded, once it is. Raises what loading raised."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._found


def points_of_throttle(points: Sequence[str] | None, switchable: Sequence[str], point: str) -> tuple[str, ...]:
    """The points that a budget may lower a request to, the default one included. Raises `InputError`."""
    if points is None:
        return tuple(switchable)
    if isinstance(points, str) or not all(isinstance(each, str) for each in points):
        raise InputError("points must be a sequence of names", param="points")
    for each in points:
        if each not in switchable:
            known = ", ".join(switchable)
            raise InputError(f"the throttle can use {known} beside {point}, not {each!r:.40}", param="points")
    return tuple(dict.fromkeys((point, *points)))


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The checkpoint's tokenizer; None if it has none."""
    from haomiao.text.tokenizer import Tokenizer

    try:
        return Tokenizer(directory)
    except ModelNotFoundError:
        return None


def end_ids(tokenizer: Tokenizer | None, opened: OpenedModel) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's, else the config's."""
    found: Any = () if tokenizer is None else tokenizer.eos_ids
    if not found:
        named = opened.artifact.meta.get("config", {}).get("eos_token_id")
        found = named if isinstance(named, list) else [named]
    return tuple(each for each in found if type(each) is int and 0 <= each < opened.plan.vocab_size)


def measured_errors(opened: OpenedModel) -> dict[str, float]:
    """Mean KL to `full` by point, for those points where the artifact has it."""
    found = opened.artifact.meta.get("errors")
    errors: dict[str, float] = {}
    for point, measured in found.items() if isinstance(found, dict) else ():
        value = measured.get("kl") if isinstance(measured, dict) else None
        if isinstance(value, dict):
            value = value.get("estimate")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            errors[point] = float(value)
    return errors
