"""Prompts that begin alike and arrive together: the common part is computed once, and no answer depends on it."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.engine.request import DoneEvent
from tests.engine.fakes import FakeExecutor, alone, ask, collected, done_of, make_engine, prompt_of


class Counting(FakeExecutor):
    """Counts the tokens of every step."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"max_step_tokens": 256, **options})
        self.counted: list[int] = []

    def step(self, batch: Any) -> Any:
        self.counted.append(len(batch.token_ids))
        return super().step(batch)


def test_identical_prompts_together_are_computed_once() -> None:
    executor = Counting()
    engine = make_engine(executor)
    prompt = prompt_of(100)
    ids = [engine.submit(ask(prompt, max_tokens=3)) for _ in range(3)]
    events = engine.run_until()
    # the last block of 4 tokens is everybody's own
    assert executor.counted[:2] == [100, 1 + 4 + 4]
    assert [done_of(events, each).receipt.cached_tokens for each in ids] == [0, 96, 96]
    assert len({tuple(collected(events, each)[0]) for each in ids}) == 1
    engine.check_integrity()


def test_only_the_common_beginning_is_waited_for() -> None:
    executor = Counting()
    engine = make_engine(executor)
    first, second = prompt_of(70), [*prompt_of(70)[:40], *prompt_of(30, seed=5)]
    ids = [engine.submit(ask(each, max_tokens=2)) for each in (first, second, prompt_of(50, seed=9))]
    events = engine.run_until()
    assert executor.counted[:2] == [70 + 50, 1 + 1 + 38]
    assert [done_of(events, each).receipt.cached_tokens for each in ids] == [0, 32, 0]


def test_others_keys_and_points_are_not_waited_for() -> None:
    """Neither a salt nor a point of another kind shares blocks."""
    executor = Counting()
    engine = make_engine(executor)
    prompt = prompt_of(64)
    engine.submit(ask(prompt, max_tokens=1))
    engine.submit(ask(prompt, max_tokens=1, salt=b"another key"))
    engine.run_until()
    assert executor.counted == [128]


def test_without_a_prefix_cache_nobody_waits() -> None:
    executor = Counting()
    engine = make_engine(executor, prefix_cache=False)
    for _ in range(2):
        engine.submit(ask(prompt_of(64), max_tokens=1))
    engine.run_until()
    assert executor.counted == [128]


def test_who_is_waited_for_may_be_cancelled() -> None:
    engine = make_engine(Counting(max_step_tokens=40))
    first, second = (engine.submit(ask(prompt_of(100), max_tokens=3)) for _ in range(2))
    engine.step()
    engine.cancel(first)
    events = engine.run_until()
    assert collected(events, second) == alone(ask(prompt_of(100), max_tokens=3))
    engine.check_integrity()


@given(
    lengths=st.lists(st.tuples(st.integers(1, 120), st.integers(0, 120)), min_size=2, max_size=6),
    room=st.sampled_from([16, 48, 256]),
    blocks=st.sampled_from([12, 64]),
)
@settings(max_examples=40, deadline=None)
def test_answers_do_not_depend_on_who_waited(lengths: list[tuple[int, int]], room: int, blocks: int) -> None:
    """Common beginnings of all lengths, steps of all sizes, KV short or not."""
    engine = make_engine(FakeExecutor(max_step_tokens=room, kv_blocks=blocks))
    prompts = [
        [*prompt_of(120)[:common], *prompt_of(own, seed=index + 1)] for index, (common, own) in enumerate(lengths)
    ]
    ids = [engine.submit(ask(prompt, max_tokens=4)) for prompt in prompts]
    events = engine.run_until()
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert collected(events, request_id) == alone(ask(prompt, max_tokens=4))
    assert sum(isinstance(event, DoneEvent) for event in events) == len(ids)
    engine.check_integrity()
