"""At which operating points the K and V of a sequence were computed: runs of tokens, in order.

What `int4` computed is not what `int8` would have: what is reused, published or left with a session is decided by this.
Knows neither blocks nor tokens' values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator


class Origin:
    """The points of the first `length` tokens of a sequence."""

    __slots__ = ("_runs", "length")

    def __init__(self) -> None:
        self.length = 0
        self._runs: list[tuple[str, int]] = []

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """(point, tokens) of every run."""
        return iter(self._runs)

    def add(self, point: str, tokens: int) -> None:
        """`tokens` more were computed at `point`."""
        if tokens <= 0:
            return
        if self._runs and self._runs[-1][0] == point:
            self._runs[-1] = point, self._runs[-1][1] + tokens
        else:
            self._runs.append((point, tokens))
        self.length += tokens

    def cut(self, length: int) -> None:
        """Forget everything from position `length` on."""
        while self._runs and self.length > length:
            point, tokens = self._runs.pop()
            self.length -= tokens
            if self.length < length:
                self._runs.append((point, length - self.length))
                self.length = length

    @property
    def point(self) -> str | None:
        """The one point of all tokens; None if there are several, or no tokens."""
        return self._runs[0][0] if len(self._runs) == 1 else None

    def within(self, points: Collection[str]) -> int:
        """How many tokens from the beginning were computed at one of `points`."""
        total = 0
        for point, tokens in self._runs:
            if point not in points:
                break
            total += tokens
        return total

    def fork(self) -> Origin:
        """An independent copy."""
        twin = Origin()
        twin._runs, twin.length = list(self._runs), self.length
        return twin
