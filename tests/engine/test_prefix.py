"""Names of prefix blocks: what they depend on, and what is found."""

from __future__ import annotations

from itertools import combinations

from haomiao.engine.prefix import PrefixChain
from haomiao.engine.state import BlockPool, PagedState
from tests.engine.fakes import prompt_of

TOKENS = prompt_of(100)


def chain(model: str = "m", point: str = "int8", kv: str = "bf16", salt: bytes = b"") -> PrefixChain:
    return PrefixChain(model_key=model, point=point, kv_type=kv, salt=salt)


def test_everything_that_the_contents_depend_on_is_hashed() -> None:
    chains = [
        chain(),
        chain(model="n"),
        chain(point="int4"),
        chain(kv="int8"),
        chain(salt=b"a"),
        chain(model="mi", point="nt8"),
        chain(kv="bf1", salt=b"6"),
    ]
    first = [each.names(TOKENS, 1)[0] for each in chains]
    assert len(set(first)) == len(first)
    other = [TOKENS[0] + 1, *TOKENS[1:]]
    later = [*TOKENS[:40], TOKENS[40] + 1, *TOKENS[41:]]
    names = [chain().names(each, 3) for each in (TOKENS, other, later)]
    assert all(a[2] != b[2] for a, b in combinations(names, 2)), "a block's name covers everything before it"
    assert names[0][0] == names[2][0] and names[0][1] != names[2][1]
    assert all(len(name) == 32 for name in names[0])


def test_only_full_blocks_within_the_limit_are_found() -> None:
    pool = BlockPool(8, 1, lambda pairs: None)
    state = PagedState(pool)
    state.append(100)
    chain().publish(pool, TOKENS, state)
    assert chain().lookup(pool, TOKENS, 100) == state.blocks[:3]
    assert chain().lookup(pool, TOKENS, 95) == state.blocks[:2]
    assert chain().lookup(pool, TOKENS[:64], 63) == state.blocks[:1]
    assert chain(salt=b"x").lookup(pool, TOKENS, 100) == []
    assert chain().lookup(pool, TOKENS, 0) == []


def test_the_first_of_two_equal_blocks_keeps_the_name() -> None:
    pool = BlockPool(8, 1, lambda pairs: None)
    first, second = PagedState(pool), PagedState(pool)
    for state in (first, second):
        state.append(64)
        chain().publish(pool, TOKENS, state)
    assert chain().lookup(pool, TOKENS, 64) == first.blocks
    pool.check_integrity([first, second])


def test_a_chain_grows_and_forks() -> None:
    one = chain()
    one.names(TOKENS, 1)
    twin = one.fork()
    assert twin.names(TOKENS, 3) == chain().names(TOKENS, 3) == one.names(TOKENS, 3)
