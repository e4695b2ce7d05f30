"""Paged KV: a pool of reference-counted blocks, and the sequence state made of them.

A block holds the K and V of `KV_BLOCK_TOKENS` tokens in every layer. Blocks are counted, shared and copied here; their
bytes live in the executor. A block may carry a name (a prefix key, engine/prefix.py); a named block that nobody holds
any more stays findable until its room is needed, the least recently used first. Knows nothing about tokens or requests.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from haomiao.errors import EngineError, InputError, KvExhaustedError
from haomiao.types import I32, KV_BLOCK_TOKENS


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // KV_BLOCK_TOKENS)


class BlockPool:
    """Who holds which block. `copy` copies block contents, given int32 [n, 2] pairs (from, to)."""

    def __init__(self, blocks: int, bytes_per_block: int, copy: Callable[[I32], None]) -> None:
        if blocks < 1:
            raise InputError(f"a KV pool needs at least one block, not {blocks}", param="kv_memory")
        self.blocks = blocks
        self.bytes_per_block = bytes_per_block
        self._copy = copy
        self._holders = [0] * blocks
        self._free = list(range(blocks - 1, -1, -1))  # a stack: low ids first, so that untouched memory stays untouched
        self._names: dict[int, bytes] = {}  # block -> name
        self._named: dict[bytes, int] = {}  # name -> block
        self._idle: OrderedDict[int, None] = OrderedDict()  # named blocks without holders, least recently used first

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give: free ones, and named ones that nobody holds."""
        return len(self._free) + len(self._idle)

    @property
    def cached(self) -> int:
        """Named blocks, held or not."""
        return len(self._names)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, one holder each. Raises `KvExhaustedError` and changes nothing if there are too few."""
        if count > self.available:
            raise KvExhaustedError(f"{count} KV blocks are needed and {self.available} of {self.blocks} are left")
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                self._forget_name(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each block, which must be held or named."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._idle[block]
            self._holders[block] += 1

    def drop(self, blocks: Sequence[int]) -> None:
        """One holder less for each block, the last first: of a chain the end is evicted before its beginning."""
        for block in reversed(blocks):
            if self._holders[block] < 1:
                raise EngineError(f"KV block {block} was given back twice")
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._names:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def holders(self, block: int) -> int:
        """How many states hold the block."""
        return self._holders[block]

    def publish(self, block: int, name: bytes) -> None:
        """Make a held block findable by `name`. If another block has the name already, that one keeps it."""
        if name not in self._named and block not in self._names:
            self._named[name] = block
            self._names[block] = name

    def find(self, name: bytes) -> int | None:
        """The block of that name, or None. It is not held: `share` it before anything is allocated."""
        return self._named.get(name)

    def withdraw(self, block: int) -> None:
        """Take a held block's name away, because it is about to be written."""
        if block in self._names:
            self._forget_name(block)

    def copy(self, source: int, target: int) -> None:
        """Copy one block's contents."""
        self._copy(np.array([[source, target]], dtype=np.int32))

    def drop_cached(self) -> None:
        """Forget all names; blocks that nobody holds become free."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._names.clear()
        self._named.clear()

    def _forget_name(self, block: int) -> None:
        del self._named[self._names.pop(block)]

    def check_integrity(self, states: Iterable[PagedState]) -> None:
        """Raise `EngineError` unless the counts are exactly those of `states`, and every block is in one place."""
        held = Counter(block for state in states for block in state.blocks)
        for block in range(self.blocks):
            if self._holders[block] != held[block]:
                raise EngineError(f"KV block {block} counts {self._holders[block]} holders and has {held[block]}")
        free, idle = set(self._free), set(self._idle)
        if len(free) != len(self._free) or free & idle or free | idle != {b for b in range(self.blocks) if not held[b]}:
            raise EngineError("the lists of free and idle KV blocks contradict the holders")
        if not idle <= set(self._names) or free & set(self._names):
            raise EngineError("a KV block without holders is idle without a name, or free with one")
        if {name: block for block, name in self._names.items()} != self._named:
            raise EngineError("names of KV blocks contradict each other")


class PagedState:
    """A sequence's KV as a list of blocks: `types.SequenceState`.

    Only the last block is ever written, and only while no other state holds it; a shared one is copied first.
    """

    def __init__(self, pool: BlockPool, blocks: Sequence[int] = ()) -> None:
        """A state whose past is `blocks`, all full and found by name, to be held here as well."""
        self._pool = pool
        pool.share(blocks)
        self.blocks = list(blocks)
        self.length = len(self.blocks) * KV_BLOCK_TOKENS

    def append(self, tokens: int) -> None:
        """Make room for `tokens` more. Raises `KvExhaustedError` and changes nothing if it cannot."""
        if tokens <= 0:
            return
        own_copy = self.tail_shared
        fresh = self._pool.allocate(blocks_for(self.length + tokens) - len(self.blocks) + own_copy)
        if own_copy:
            shared, self.blocks[-1] = self.blocks[-1], fresh.pop(0)
            self._pool.copy(shared, self.blocks[-1])
            self._pool.drop([shared])
        elif self.length % KV_BLOCK_TOKENS:
            self._pool.withdraw(self.blocks[-1])
        self.blocks += fresh
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on. A length beyond the present one is refused."""
        if not 0 <= length <= self.length:
            raise InputError(f"a sequence of {self.length} tokens cannot be cut to {length}")
        keep = blocks_for(length)
        self._pool.drop(self.blocks[keep:])
        del self.blocks[keep:]
        self.length = length

    def fork(self) -> PagedState:
        """A second state with the same past; blocks are shared until one of them writes."""
        twin = PagedState(self._pool, self.blocks)
        twin.length = self.length
        return twin

    def snapshot(self) -> I32:
        """The block table that a step reads, int32 [blocks]."""
        return np.array(self.blocks, dtype=np.int32)

    def bytes(self) -> int:
        """Bytes held, shared storage counted once per holder."""
        return len(self.blocks) * self._pool.bytes_per_block

    def release(self) -> None:
        """Give everything back; idempotent."""
        self.truncate(0)

    @property
    def tail_shared(self) -> bool:
        """True if the next append must copy the last block first."""
        return self.length % KV_BLOCK_TOKENS != 0 and self._pool.holders(self.blocks[-1]) > 1

    @property
    def blocks_alone(self) -> int:
        """Blocks that nobody else holds: what `release` would make available."""
        return sum(1 for block in self.blocks if self._pool.holders(block) == 1)
