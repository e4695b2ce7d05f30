"""The parts of speculation one by one: the suffix scan, acceptance, costs, lengths and the bound on what may be
lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haomiao.engine.scheduler import SchedulerState, SequenceView, plan
from haomiao.engine.speculate.acceptance import Acceptance
from haomiao.engine.speculate.costs import Allowance, StepCosts
from haomiao.engine.speculate.lengths import PATIENCE, Candidate, choose_lengths
from haomiao.engine.speculate.suffix import LONGEST_MATCH, SuffixScan


def slow_sequel(tokens: list[int], most: int) -> tuple[list[int], int]:
    """The twin of `SuffixScan.sequel`, written as it is said."""
    places, match = [], 0
    for length in range(1, min(LONGEST_MATCH, len(tokens) - 1) + 1):
        found = [end for end in range(length, len(tokens)) if tokens[end - length : end] == tokens[-length:]]
        if not found:
            break
        places, match = found, length
    out: list[int] = []
    while match and len(out) < most:
        known = tokens + out
        votes = [known[place + len(out)] for place in places]
        counts = {value: votes.count(value) for value in votes}
        best = max(counts.values()) if len(votes) >= 3 else 0
        chosen = next(value for value in reversed(votes) if counts[value] >= best)
        places = [place for place, value in zip(places, votes, strict=True) if value == chosen]
        out.append(chosen)
    return out, match


@given(
    tokens=st.lists(st.integers(0, 3), max_size=60),
    most=st.integers(0, 9),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
def test_the_longest_suffix_and_what_followed_it(tokens: list[int], most: int, cuts: list[int]) -> None:
    scan = SuffixScan()
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(tokens)], strict=True):
        scan.extend(tokens[start:end])
        scan.sequel(3)  # what is proposed leaves no trace
    found, match = scan.sequel(most)
    expected = slow_sequel(tokens, most) if most else ([], 0)
    assert (found, match) == expected


def test_a_period_goes_on() -> None:
    assert SuffixScan([1, 2, 3, 1, 2, 3]).sequel(7) == ([1, 2, 3, 1, 2, 3, 1], 3)
    assert SuffixScan([7, 7]).sequel(3) == ([7, 7, 7], 1)
    assert SuffixScan([1, 2, 3]).sequel(3) == ([], 0)
    long = list(range(200)) * 2
    assert SuffixScan(long).sequel(4) == ([0, 1, 2, 3], LONGEST_MATCH)


def test_acceptance_follows_what_is_seen() -> None:
    acceptance = Acceptance((0.2, 0.8))
    assert acceptance.estimate(1, 0) == pytest.approx(0.2) and acceptance.estimate(1, 1) == pytest.approx(0.8)
    for _ in range(50):
        acceptance.observe(1, 0, drafted=4, stood=4)
        acceptance.observe(2, 1, drafted=4, stood=0)
    assert acceptance.estimate(1, 0) > 0.95 and acceptance.estimate(2, 1) < 0.1
    assert acceptance.estimate(3, 0) > 0.8, "a new sequence starts from what others saw"
    before = acceptance.estimate(2, 1)
    for _ in range(500):
        acceptance.idle(2)
        acceptance.observe(4, 1, drafted=2, stood=2)
    assert acceptance.estimate(2, 1) > before + 0.5, "a bad spell is forgiven"
    acceptance.release(2)
    acceptance.release(2)
    assert acceptance.estimate(2, 1) == acceptance.estimate(99, 1)


def test_costs_keep_the_shape_and_follow_the_speed() -> None:
    costs = StepCosts()
    assert costs.predict("int8", 1) is None and not costs.knows("int8")
    rng = np.random.default_rng(0)
    for step in range(400):
        speed = 1e6 if step < 200 else 2.5e6  # a neighbour came
        tokens = int(rng.choice([1, 4, 8]))
        costs.observe("int8", tokens, speed * {1: 1.0, 4: 1.05, 8: 1.8}[tokens] * float(rng.uniform(0.97, 1.05)))
    assert costs.predict("int8", 1) == pytest.approx(2.5e6, rel=0.08)
    assert costs.ratio("int8", 4) == pytest.approx(1.05, abs=0.06)
    assert costs.ratio("int8", 8) == pytest.approx(1.8, abs=0.1)
    assert costs.ratio("int8", 1) == 1.0
    assert costs.ratio("int8", 4) <= costs.ratio("int8", 6) <= costs.ratio("int8", 8) < costs.ratio("int8", 20)
    assert costs.widest("int8") == 8 and costs.widest("int4") == 1
    costs.observe("int8", 0, 5.0)
    costs.observe("int8", 10_000, 5.0)
    assert costs.predict("int8", 1) == pytest.approx(2.5e6, rel=0.08), "what is no step teaches nothing"


def test_a_lucky_first_measurement_is_soon_forgotten() -> None:
    """Four tokens seemed as cheap as one, once. The speed of one must not take the blame for ever."""
    costs = StepCosts()
    for _ in range(20):
        costs.observe("int8", 1, 1e6)
    costs.observe("int8", 4, 1e6)
    for step in range(32):
        costs.observe("int8", 4 if step % 16 else 1, 2.6e6 if step % 16 else 1e6)
    assert costs.ratio("int8", 4) > 2.0
    assert costs.predict("int8", 1) == pytest.approx(1e6, rel=0.25)


@given(seed=st.integers(0, 99), loss=st.floats(0.0, 8.0))
def test_the_allowance_bounds_the_loss(seed: int, loss: float) -> None:
    """A player that drafts whenever it may, whatever comes of it."""
    rng = np.random.default_rng(seed)
    allowance, lost, passed = Allowance(share=0.01, steps=6.0), 0.0, 0.0
    for _ in range(2000):
        if allowance.open:
            taken, worth = 1.0 + loss * float(rng.random()), 1.0 + float(rng.random()) * 0.2
        else:
            taken, worth = 1.0, 1.0
        allowance.settle(taken, 1.0, worth)
        lost, passed = lost + taken - worth, passed + taken
        assert lost <= 6.0 + loss + 0.01 * passed + 1e-6


CANDIDATES = st.lists(st.tuples(st.floats(0.0, 1.0), st.integers(1, 8), st.booleans()), min_size=0, max_size=6).map(
    lambda drawn: [Candidate(key, chance, most, rounds) for key, (chance, most, rounds) in enumerate(drawn)]
)


@given(
    candidates=CANDIDATES, others=st.integers(0, 5), slope=st.floats(0.0, 1.0), round_cost=st.floats(0.0, 1.0),
    spare=st.integers(-1, 30), limit=st.sampled_from([None, 0.5, 1.5, 3.0]),
)  # fmt: skip
def test_lengths_pay_and_nobody_pays_for_others(
    candidates: list[Candidate], others: int, slope: float, round_cost: float, spare: int, limit: float | None
) -> None:
    decoding = max(1, len(candidates) + others)
    lengths = choose_lengths(
        candidates, decoding, lambda m: 1.0 + slope * (m - decoding), lambda n: round_cost,
        spare=spare, limit_ns=limit, alone=not others,
    )  # fmt: skip
    assert all(0 < count <= next(c for c in candidates if c.key == key).most for key, count in lengths.items())
    assert sum(lengths.values()) <= max(spare, 0)
    if not lengths:
        return
    gain = {c.key: sum(c.chance**j for j in range(1, lengths.get(c.key, 0) + 1)) for c in candidates}
    rounds = max((lengths.get(c.key, 0) for c in candidates if c.rounds), default=0)
    time = 1.0 + slope * sum(lengths.values()) + round_cost * rounds
    assert (decoding + sum(gain.values())) / time > decoding, "faster than without"
    assert limit is None or time <= limit
    least = 0.0 if others else min(gain.values())
    assert time <= (1 + PATIENCE) * (1 + least) + 1e-9, "and for everyone in the step"


@given(steps=st.lists(st.tuples(st.integers(1, 8), st.floats(1.0, 1e12)), min_size=1, max_size=200))
def test_costs_stay_sound_whatever_is_measured(steps: list[tuple[int, float]]) -> None:
    costs, seen = StepCosts(), {1}
    for tokens, nanoseconds in steps:
        costs.observe("int8", tokens, nanoseconds)
        seen.add(tokens)
        assert all(1.0 <= costs.ratio("int8", each) <= 2.001 * each for each in seen)
        assert all(1.0 <= costs.ratio("int8", each) < 1e3 for each in range(1, 9))
        assert 0.0 < (costs.predict("int8", 1) or 0.0) < 1e15


def test_lengths_grow_with_the_chance_and_shrink_with_the_cost() -> None:
    def most(chance: float, slope: float) -> int:
        found = choose_lengths([Candidate(1, chance, 8)], 1, lambda m: 1 + slope * (m - 1), lambda n: 0.0, spare=99)
        return found.get(1, 0)

    assert [most(chance, 0.1) for chance in (0.05, 0.3, 0.7, 0.95)] == sorted(
        most(c, 0.1) for c in (0.05, 0.3, 0.7, 0.95)
    )
    assert most(0.05, 0.1) == 0 and most(0.95, 0.1) == 8 and most(0.9, 1.0) == 0 and most(0.9, 0.0) == 8


def test_nobody_gives_way_for_a_draft() -> None:
    def state(free: int) -> SchedulerState:
        views: list[Any] = [
            SequenceView(1, "int8", 6, drafted=5, decoding=True, length=31, running=True, blocks_alone=1, rows_from=31),
            SequenceView(2, "int8", 1, decoding=True, length=20, running=True, blocks_alone=1, arrival_ns=1),
        ]
        return SchedulerState(tuple(views), free, 64, 64, 64)

    scarce, roomy = plan(0, state(0)), plan(0, state(9))
    assert [(span.key, span.tokens) for span in scarce.spans] == [(1, 1), (2, 1)] and not scarce.preempt
    assert [(span.key, span.tokens) for span in roomy.spans] == [(1, 6), (2, 1)]
