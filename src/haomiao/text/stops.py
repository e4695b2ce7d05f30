"""Finding stop strings in text as it is produced. Knows nothing about tokens; implements `types.StopMatcher`.

A stop string is found at the character that completes it, however the text is cut into tokens; among several that end
at the same character the longest counts. The method is Knuth, Morris and Pratt's (1977): for each stop string, the
length of its longest prefix that ends the text so far, constant amortized time per character. What may still become a
stop string is held back, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

from haomiao.errors import InputError
from haomiao.text.detokenize import Detokenizer

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024


class StopStrings:
    """Text of one sequence up to a stop string. Raises `InputError` for stop strings that are empty, long or many."""

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) for stop in stops):
            raise InputError("stop must be a list of strings", param="stop")
        if len(stops) > MAX_STOPS:
            raise InputError(f"{len(stops)} stop strings, at most {MAX_STOPS} are allowed", param="stop")
        for stop in stops:
            if not stop or len(stop) > MAX_STOP_CHARACTERS:
                raise InputError(
                    f"a stop string has 1 to {MAX_STOP_CHARACTERS} characters, not {len(stop)}", param="stop"
                )
        self._detokenizer = detokenizer
        self._stops = tuple(dict.fromkeys(stops))
        self._failures = [_failure(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._held = ""
        self._stopped: str | None = None

    @property
    def stopped(self) -> str | None:
        """The stop string that was found, or None. Everything pushed after it is ignored."""
        return self._stopped

    def push(self, token_id: int) -> str:
        """Text that is now certain: no part of it can belong to a stop string."""
        if self._stopped is not None:
            return ""
        return self._scan(self._detokenizer.push(token_id))

    def flush(self) -> str:
        """What was held back, when the answer ends without a stop string."""
        if self._stopped is not None:
            return ""
        text = self._scan(self._detokenizer.flush())
        if self._stopped is None:
            text, self._held = text + self._held, ""
            self._matched = [0] * len(self._stops)
        return text

    def _scan(self, text: str) -> str:
        if not self._stops or not text:
            return text
        known = self._held + text
        for position, character in enumerate(text, len(self._held) + 1):
            found = self._advance(character)
            if found is not None:
                self._stopped, self._held = found, ""
                return known[: position - len(found)]
        keep = max(self._matched)
        self._held = known[len(known) - keep :]
        return known[: len(known) - keep]

    def _advance(self, character: str) -> str | None:
        """Take one more character; the longest stop string that it completes."""
        found: str | None = None
        for index, stop in enumerate(self._stops):
            matched = self._matched[index]
            while matched and stop[matched] != character:
                matched = self._failures[index][matched - 1]
            if stop[matched] == character:
                matched += 1
            if matched == len(stop):
                if found is None or len(stop) > len(found):
                    found = stop
                matched = self._failures[index][matched - 1]
            self._matched[index] = matched
        return found


def _failure(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = table[length - 1]
        if stop[index] == stop[length]:
            length += 1
        table[index] = length
    return table
