"""How many threads work on a step: fewer where that is quicker, all again when it no longer is.

Durations are invented: a core is taken away, given back, or the model is so small that meeting costs most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haomiao.engine.executors.crew import CALM_STEPS, CROWDED_STEPS, Crew


def run(
    crew: Crew, steps: int, takes: Callable[[int], float], *, tokens: int = 1, crowded: bool = False
) -> Counter[int]:
    """So many steps; `takes` are nanoseconds by threads. How many steps each number of threads computed."""
    used: Counter[int] = Counter()
    for _ in range(steps):
        threads = crew.choose("int4", tokens, crowded)
        used[threads] += 1
        crew.observe("int4", tokens, threads, int(takes(threads)))
    return used


def shared(threads: int) -> float:
    """Two cores for the engine alone."""
    return 1e6 / threads + 1e5


def taken(threads: int) -> float:
    """Somebody else has one of them."""
    return 1e6 if threads == 1 else 2.5e6


def test_alone_all_threads_work() -> None:
    """Looks at one thread fewer are too rare for the 99th percentile."""
    used = run(Crew(2), 20_000, shared)
    assert used[1] < 0.005 * 20_000


def test_a_neighbour_sends_one_home_and_it_comes_back() -> None:
    """A few dozen steps to go, and to come back; in between looks are rare and short."""
    crew = Crew(2)
    run(crew, 200, shared)
    going = run(crew, 3 * CROWDED_STEPS, taken, crowded=True)
    assert going[1] > CROWDED_STEPS
    assert run(crew, 5000, taken, crowded=True)[2] < 0.01 * 5000
    run(crew, 1000, shared)
    assert run(crew, 1000, shared)[1] < 0.05 * 1000


def test_a_model_too_small_for_two_threads() -> None:
    """Found without anybody being waited for."""
    crew = Crew(2)
    run(crew, 2 * CALM_STEPS, lambda threads: 5e5 * threads)
    assert run(crew, 1000, lambda threads: 5e5 * threads)[1] > 0.99 * 1000


def test_many_threads_go_down_by_one_at_a_time() -> None:
    """Two of eight cores are taken: six threads."""
    crew = Crew(8)

    def takes(threads: int) -> float:
        return 8e6 / threads if threads <= 6 else 4e6 + 1e5 * threads

    run(crew, 4000, takes, crowded=True)
    used = run(crew, 2000, takes, crowded=True)
    assert used.most_common(1)[0][0] == 6
    assert set(used) <= {5, 6, 7}


def test_kinds_of_steps_are_told_apart() -> None:
    """Prefill keeps both threads while decode has one."""
    crew = Crew(2)
    for _ in range(3 * CROWDED_STEPS):
        run(crew, 1, taken, tokens=1, crowded=True)
        run(crew, 1, lambda threads: 1e8 / threads, tokens=200, crowded=True)
    assert crew.choose("int4", 1, True) == 1
    assert crew.choose("int4", 250, True) == 2
    assert crew.choose("int8", 1, True) == 2


@given(st.integers(1, 16), st.lists(st.tuples(st.integers(1, 600), st.booleans(), st.floats(0, 1e12)), max_size=300))
def test_there_are_never_more_threads_than_there_are(threads: int, steps: list[tuple[int, bool, float]]) -> None:
    """Whatever steps take."""
    crew = Crew(threads)
    for tokens, crowded, nanoseconds in steps:
        chosen = crew.choose("int4", tokens, crowded)
        assert 1 <= chosen <= threads
        crew.observe("int4", tokens, chosen, int(nanoseconds))


@pytest.mark.parametrize("threads", [2, 4])
def test_a_step_that_failed_is_no_observation(threads: int) -> None:
    """A look whose steps are never told goes on; nothing is chosen that does not exist."""
    crew = Crew(threads)
    assert {crew.choose("int4", 1, True) for _ in range(500)} <= {threads, threads - 1}
