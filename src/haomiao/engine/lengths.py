"""How long answers turn out: `max_tokens` is an upper bound, and most answers end before it.

The 90th percentile of the latest answers whose limit was of the same order; what was cut off counts with its limit.
Knows numbers of tokens and nothing else.
"""

from __future__ import annotations

from collections import deque

KEPT = 128
ENOUGH = 16


class AnswerLengths:
    """Learns from answers that ended."""

    def __init__(self) -> None:
        self._kept: dict[int, deque[int]] = {}

    def record(self, max_tokens: int, produced: int, *, whole: bool) -> None:
        """An answer ended after `produced` tokens; `whole` if by itself."""
        kept = self._kept.setdefault(max_tokens.bit_length(), deque(maxlen=KEPT))
        kept.append(produced if whole else max_tokens)

    def expect(self, max_tokens: int) -> int:
        """Tokens that 9 of 10 such answers stay within; `max_tokens` before enough were seen."""
        kept = self._kept.get(max_tokens.bit_length())
        if kept is None or len(kept) < ENOUGH:
            return max_tokens
        return min(max_tokens, sorted(kept)[(9 * len(kept)) // 10])
