"""Prefix reuse: full blocks of a sequence, named by a hash of everything that their contents depend on.

The name of block `i` is BLAKE2b-256 over the name of block `i - 1` and the block's token ids; the chain begins with the
model, the operating point, the KV type and the caller's salt. A collision would hand one user's past to another, so the
hash is a cryptographic one. K and V depend on the point at which they were computed, so the point itself is hashed,
not its family, and a block is published only while its whole past was computed at that one point: after the throttle
moved, nothing of the answer is.
Knows block pools and token ids; nothing about requests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from haomiao.engine.origin import Origin
from haomiao.engine.state import BlockPool, PagedState
from haomiao.types import KV_BLOCK_TOKENS


class PrefixChain:
    """The names of a token sequence's full blocks, computed once and extended as the sequence grows."""

    __slots__ = ("_names", "_published", "_root")

    def __init__(self, *, model_key: str, point: str, kv_type: str, salt: bytes = b"") -> None:
        digest = hashlib.blake2b(digest_size=32, person=b"haomiao-prefix-1")
        for part in (model_key.encode(), point.encode(), kv_type.encode(), salt):
            digest.update(len(part).to_bytes(8, "little"))  # so that no two lists of parts run together
            digest.update(part)
        self._root = digest.digest()
        self._names: list[bytes] = []
        self._published = 0

    def names(self, tokens: Sequence[int], blocks: int) -> list[bytes]:
        """Names of the first `blocks` full blocks of `tokens`. Tokens already named must not have changed."""
        known = len(self._names)
        if known < blocks:
            data = np.array(tokens[known * KV_BLOCK_TOKENS : blocks * KV_BLOCK_TOKENS], dtype="<i4").tobytes()
            name = self._names[-1] if known else self._root
            for start in range(0, len(data), 4 * KV_BLOCK_TOKENS):
                name = hashlib.blake2b(name + data[start : start + 4 * KV_BLOCK_TOKENS], digest_size=32).digest()
                self._names.append(name)
        return self._names[:blocks]

    def lookup(self, pool: BlockPool, tokens: Sequence[int], limit: int) -> list[int]:
        """Blocks in the pool that hold a prefix of `tokens`, at most `limit` tokens of it. Nothing is held yet."""
        found: list[int] = []
        for name in self.names(tokens, max(0, min(limit, len(tokens)) // KV_BLOCK_TOKENS)):
            block = pool.find(name)
            if block is None:
                break
            found.append(block)
        return found

    def publish(self, pool: BlockPool, tokens: Sequence[int], state: PagedState) -> None:
        """Name the full blocks of `state`, which must be computed and hold the K and V of `tokens`."""
        full = state.length // KV_BLOCK_TOKENS
        if full > self._published:
            names = self.names(tokens, full)
            for index in range(self._published, full):
                pool.publish(state.blocks[index], names[index])
        self._published = full

    def fork(self) -> PrefixChain:
        """A copy for a sequence that shares the present past."""
        twin = object.__new__(PrefixChain)
        twin._root, twin._names, twin._published = self._root, list(self._names), self._published
        return twin

    def restart(self) -> None:
        """The sequence lost its state and computes it anew: everything may be published again."""
        self._published = 0


class PrefixNames:
    """The chains of one sequence, one for every point at which it may begin; made when they are asked for."""

    __slots__ = ("_chains", "_make")

    def __init__(self, make: Callable[[str], PrefixChain]) -> None:
        self._make = make
        self._chains: dict[str, PrefixChain] = {}

    def lookup(
        self, pool: BlockPool, tokens: Sequence[int], limit: int, points: Sequence[str]
    ) -> tuple[str, list[int]]:
        """The longest cached prefix at any of `points`, and its point; of equal ones the first."""
        best: tuple[str, list[int]] = (points[0], [])
        for point in points:
            found = self._of(point).lookup(pool, tokens, limit)
            if len(found) > len(best[1]):
                best = point, found
        return best

    def names(self, tokens: Sequence[int], blocks: int, point: str) -> list[bytes]:
        """Names of the first `blocks` full blocks of `tokens` if they are computed at `point`."""
        return list(self._of(point).names(tokens, blocks))

    def publish(self, pool: BlockPool, tokens: Sequence[int], state: PagedState, origin: Origin) -> None:
        """Name the full blocks of `state` if all of it was computed at one point."""
        if origin.point is not None:
            self._of(origin.point).publish(pool, tokens, state)

    def fork(self) -> PrefixNames:
        """A copy for a sequence that shares the present past."""
        twin = PrefixNames(self._make)
        twin._chains = {point: chain.fork() for point, chain in self._chains.items()}
        return twin

    def restart(self) -> None:
        """The sequence lost its state and computes it anew: everything may be published again."""
        for chain in self._chains.values():
            chain.restart()

    def _of(self, point: str) -> PrefixChain:
        chain = self._chains.get(point)
        if chain is None:
            chain = self._chains[point] = self._make(point)
        return chain
