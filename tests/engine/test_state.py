"""Paged state as a state machine: no leak, no double free, forks independent, cached blocks never written."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from haomiao.engine.prefix import PrefixChain
from haomiao.engine.state import BlockPool, PagedState
from haomiao.errors import EngineError, InputError, KvExhaustedError
from haomiao.types import I32, KV_BLOCK_TOKENS, SequenceState

BLOCKS = 12


class Storage:
    """Block contents, so that sharing can be watched: one integer per token."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        self.cells = np.full((blocks, KV_BLOCK_TOKENS), -1, dtype=np.int64)
        self.pool = BlockPool(blocks, 64, self.copy)

    def copy(self, pairs: I32) -> None:
        for source, target in pairs:
            self.cells[target] = self.cells[source]

    def read(self, state: PagedState) -> list[int]:
        return [int(self.cells[state.blocks[i // 32], i % 32]) for i in range(state.length)]

    def write(self, state: PagedState, tokens: list[int]) -> None:
        start = state.length
        state.append(len(tokens))
        for offset, token in enumerate(tokens):
            position = start + offset
            self.cells[state.blocks[position // 32], position % 32] = token


class PagedMachine(RuleBasedStateMachine):
    """Every rule is checked against a plain list of tokens per state."""

    states: Bundle[int] = Bundle("states")

    def __init__(self) -> None:
        super().__init__()
        self.storage = Storage()
        self.live: dict[int, PagedState] = {}
        self.model: dict[int, list[int]] = {}
        self.chains: dict[int, PrefixChain] = {}
        self.next = 0

    def _add(self, state: PagedState, tokens: list[int]) -> int:
        self.next += 1
        self.live[self.next], self.model[self.next] = state, tokens
        return self.next

    @initialize(target=states)
    def first(self) -> int:
        return self._add(PagedState(self.storage.pool), [])

    @rule(target=states)
    def begin(self) -> int:
        return self._add(PagedState(self.storage.pool), [])

    @rule(key=states, count=st.integers(0, 100), value=st.integers(0, 3))
    def append(self, key: int, count: int, value: int) -> None:
        state, before = self.live[key], list(self.live[key].blocks)
        tokens = [value] * count
        try:
            self.storage.write(state, tokens)
        except KvExhaustedError:
            assert state.blocks == before and state.length == len(self.model[key])
        else:
            self.model[key] = self.model[key] + tokens

    @rule(key=states, share=st.floats(0, 1))
    def truncate(self, key: int, share: float) -> None:
        length = int(share * self.live[key].length)
        self.live[key].truncate(length)
        self.model[key] = self.model[key][:length]

    @rule(target=states, key=states)
    def fork(self, key: int) -> int:
        return self._add(self.live[key].fork(), list(self.model[key]))

    @rule(key=states)
    def release(self, key: int) -> None:
        self.live[key].release()
        self.live[key].release()
        self.model[key] = []

    @rule(key=states)
    def publish(self, key: int) -> None:
        chain = PrefixChain(model_key="m", point="int8", kv_type="bf16")
        chain.publish(self.storage.pool, self.model[key], self.live[key])

    @rule(target=states, tokens=st.lists(st.integers(0, 3), min_size=1, max_size=4))
    def resume(self, tokens: list[int]) -> int:
        wanted = [token for token in tokens for _ in range(32)]
        chain = PrefixChain(model_key="m", point="int8", kv_type="bf16")
        found = chain.lookup(self.storage.pool, wanted, len(wanted))
        return self._add(PagedState(self.storage.pool, found), wanted[: 32 * len(found)])

    @invariant()
    def contents_are_what_was_written(self) -> None:
        for key, state in self.live.items():
            assert self.storage.read(state) == self.model[key]

    @invariant()
    def counts_are_right(self) -> None:
        self.storage.pool.check_integrity(self.live.values())

    @invariant()
    def no_block_is_lost(self) -> None:
        held = {block for state in self.live.values() for block in state.blocks}
        assert self.storage.pool.available == BLOCKS - len(held)


TestPagedMachine = PagedMachine.TestCase
TestPagedMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_fork_copies_only_the_partial_block() -> None:
    storage = Storage()
    state = PagedState(storage.pool)
    assert isinstance(state, SequenceState)
    storage.write(state, list(range(40)))
    twin = state.fork()
    assert state.bytes() == twin.bytes() == 2 * 64 and storage.pool.available == BLOCKS - 2
    storage.write(twin, [100])
    assert twin.blocks[0] == state.blocks[0] and twin.blocks[1] != state.blocks[1]
    storage.write(state, [200])
    assert storage.read(state)[-1] == 200 and storage.read(twin)[-1] == 100
    assert list(state.snapshot()) == state.blocks and state.snapshot().dtype == np.int32


def test_exhaustion_names_the_numbers_and_cached_blocks_make_room() -> None:
    storage = Storage(4)
    state = PagedState(storage.pool)
    tokens = list(range(128))
    storage.write(state, tokens)
    chain = PrefixChain(model_key="m", point="int8", kv_type="bf16")
    chain.publish(storage.pool, tokens, state)
    with pytest.raises(KvExhaustedError, match="1 KV blocks are needed and 0 of 4"):
        PagedState(storage.pool).append(1)
    state.release()
    assert storage.pool.available == 4 and len(chain.lookup(storage.pool, tokens, 128)) == 4
    PagedState(storage.pool).append(1)
    assert len(chain.lookup(storage.pool, tokens, 128)) == 3, "the end of a chain goes first"
    storage.pool.drop_cached()
    assert not chain.lookup(storage.pool, tokens, 128)


def test_misuse_is_named() -> None:
    storage = Storage()
    with pytest.raises(InputError, match="cannot be cut to 1"):
        PagedState(storage.pool).truncate(1)
    with pytest.raises(EngineError, match="given back twice"):
        storage.pool.drop([3])
    with pytest.raises(InputError, match="at least one block"):
        BlockPool(0, 1, storage.copy)


def test_integrity_notices_a_lost_block() -> None:
    storage = Storage()
    state = PagedState(storage.pool)
    state.append(10)
    with pytest.raises(EngineError, match="counts 1 holders and has 0"):
        storage.pool.check_integrity([])
