"""A short way to the end of a grammar, for answers that must close before their deadline.

Knows nothing about which grammar it is: it looks at the bytes that are forced and the characters that are allowed.
Limited discrepancy search (Harvey and Ginsberg 1995): characters are tried in an order that tends to close things
(quotes, brackets, digits), a path costs the ranks of its choices and a little for its length, and among siblings whose
next tokens are the same only one is followed. Bounded in states, so that the outcome does not depend on the machine; it
may find a longer way than the shortest, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from heapq import heappop, heappush
from itertools import count
from typing import Any

import numpy as np

from haomiao.errors import ConstraintError

MAX_STATES = 2048
MAX_TOKENS = 2048
MAX_VISITS = 128
"""How often a state that allows the same tokens is gone on from: loops end, counted repetitions may go on so long."""
_LENGTH_COST = 0.005
_ORDER = b'"x}],0)>.;@nte1:{[-a '
"""Characters tried first, in this order; then the rest by their codes."""


class Closer:
    """Closes grammars of one tokenizer.

    `alphabet` maps single ASCII bytes to token ids; `rewrite` reads text greedily as the longest tokens there are.
    """

    def __init__(self, alphabet: Mapping[bytes, int], rewrite: Callable[[str], list[int]]) -> None:
        order = sorted(alphabet, key=lambda data: (_ORDER.find(data) if data in _ORDER else len(_ORDER), data))
        self._alphabet = dict(alphabet)
        self._bytes = {token: data for data, token in alphabet.items()}
        self._tokens = [alphabet[data] for data in order]
        self._rewrite = rewrite

    def close(self, matcher: Any) -> list[int]:
        """Tokens from the matcher's position (which is left as it is) to an accepting one.

        Raises `ConstraintError` if none are found within the bounds.
        """
        start = matcher.deep_copy()
        path = self._force(start, [])
        if start.is_accepting():
            return self._fewer(matcher, path)
        seen: set[tuple[int, bytes]] = set()
        visits: dict[bytes, int] = {}
        order = count()
        queue: list[tuple[float, int, list[int], int, Any, int]] = []
        for rank, token in enumerate(self._allowed(start)):
            heappush(queue, (float(rank), next(order), path, -1, start, token))
        for number in range(MAX_STATES):
            if not queue:
                break
            cost, _, path, parent, before, token = heappop(queue)
            state = before.deep_copy()
            if state.try_consume_tokens([token]) != 1:
                continue
            path = self._force(state, [*path, token])
            if state.is_accepting():
                return self._fewer(matcher, path)
            if state.is_error() or state.is_stopped() or len(path) > MAX_TOKENS:
                continue
            outcome = bytes(state.compute_bitmask())
            visits[outcome] = visits.get(outcome, 0) + 1
            if (parent, outcome) in seen or visits[outcome] > MAX_VISITS:
                continue
            seen.add((parent, outcome))
            for rank, following in enumerate(self._allowed(state)):
                heappush(queue, (cost + _LENGTH_COST + rank, next(order), path, number, state, following))
        raise ConstraintError(f"no completion found within {MAX_STATES} states")

    def _force(self, state: Any, path: list[int]) -> list[int]:
        """Take the bytes that have no alternative. Returns the longer path."""
        path = list(path)
        while len(path) <= MAX_TOKENS and not state.is_accepting() and not state.is_stopped():
            forced: bytes = state.compute_ff_bytes()
            tokens = [self._alphabet.get(forced[at : at + 1], -1) for at in range(len(forced))]
            if -1 in tokens:
                tokens = list(state.compute_ff_tokens())
            if not tokens or state.try_consume_tokens(tokens[:1]) != 1:
                break
            path.append(tokens[0])
        return path

    def _allowed(self, state: Any) -> list[int]:
        """Allowed characters in the order of preference; a few tokens of any kind if there is none."""
        mask = np.frombuffer(state.compute_bitmask(), dtype=np.uint8)
        if state.is_error():
            return []
        found = [token for token in self._tokens if mask[token >> 3] >> (token & 7) & 1]
        return found or [int(token) for token in np.flatnonzero(np.unpackbits(mask, bitorder="little"))[:32]]

    def _fewer(self, matcher: Any, path: list[int]) -> list[int]:
        """The same text in fewer tokens, where that is allowed too."""
        text = b"".join(self._bytes.get(token, b"\xff") for token in path)
        if b"\xff" in text:
            return path
        tokens = self._rewrite(text.decode("ascii"))
        check = matcher.deep_copy()
        if check.try_consume_tokens(tokens) == len(tokens) and check.is_accepting() and len(tokens) < len(path):
            return tokens
        return path
