"""The cost model with invented machines: what it learns, how far its bounds hold, and how it follows neighbours."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.engine.cost import CostModel, StepShape, nonnegative_least_squares
from haomiao.engine.quantile import AdaptiveQuantile
from haomiao.errors import InputError

MS = 1_000_000


def machine(shape: StepShape) -> float:
    """Nanoseconds of an invented machine: flat up to four tokens, then linear."""
    tokens = shape.decode_tokens + shape.prefill_tokens
    rate = 1.0 if shape.point == "int8" else 0.6
    return rate * (2e6 + 5e4 * max(0, tokens - 4) + 2e5 * shape.logit_rows + 20 * shape.context_tokens)


def draw(rng: np.random.Generator, point: str = "int8") -> StepShape:
    decode, prefill = int(rng.integers(1, 9)), int(rng.integers(0, 256)) * int(rng.integers(0, 2))
    return StepShape(point, decode, prefill, int(rng.integers(0, 20_000)), decode, decode + (prefill > 0))


def calibrated(noise: Callable[[], float], steps: int = 300) -> CostModel:
    rng = np.random.default_rng(0)
    shapes = [draw(rng, point) for point in ("int8", "int4") for _ in range(steps)]
    cost = CostModel()
    cost.calibrate([(shape, machine(shape) * noise()) for shape in shapes])
    return cost


def test_it_finds_a_piecewise_linear_machine() -> None:
    rng = np.random.default_rng(1)
    cost = calibrated(lambda: 1.0)
    for _ in range(300):
        shape = draw(rng, "int4")
        assert cost.predict(shape) == pytest.approx(machine(shape), rel=0.05)
    assert cost.predict(StepShape("full", 1)) is None and cost.bound(StepShape("full", 1)) is None
    assert cost.knows(["int8", "int4"]) and not cost.knows(["bf16"])


def test_more_work_never_saves_time() -> None:
    rng = np.random.default_rng(2)
    cost = calibrated(lambda: rng.uniform(0.7, 1.4))
    times = [cost.predict(StepShape("int8", tokens, 0, 100, 1)) or 0 for tokens in range(1, 3000, 7)]
    assert all(later >= earlier for earlier, later in pairwise(times))


def test_without_calibration_it_learns_as_it_runs() -> None:
    rng = np.random.default_rng(3)
    cost = CostModel(minimum=32)
    for seen in range(200):
        shape = draw(rng)
        assert (cost.predict(shape) is None) == (seen < 32)
        cost.observe(shape, machine(shape) * rng.uniform(0.95, 1.05))
    for _ in range(100):
        shape = draw(rng)
        assert cost.predict(shape) == pytest.approx(machine(shape), rel=0.25)


def test_stated_coverage_is_measured_coverage() -> None:
    """Noise with a long tail: 99 of 100 steps stay inside, and the bound is not loose."""
    rng = np.random.default_rng(4)
    cost = calibrated(lambda: rng.lognormal(0, 0.05))
    ratios = []
    for _ in range(4000):
        shape = draw(rng)
        actual = machine(shape) * rng.lognormal(0, 0.05) * (1.5 if rng.random() < 0.003 else 1.0)
        ratios.append((cost.bound(shape) or 0) / actual)
        cost.observe(shape, actual)
    inside = np.mean(np.array(ratios) >= 1)
    assert 0.983 <= inside <= 0.997
    assert np.median(ratios) <= 1.25
    counted = cost.counters()
    assert counted["inside"] / counted["steps"] == pytest.approx(inside, abs=0.002)


@pytest.mark.parametrize("coverage", [0.9, 0.95])
def test_less_coverage_is_what_is_measured_then(coverage: float) -> None:
    rng = np.random.default_rng(4)
    cost, strict = CostModel(coverage), CostModel()
    steps = [(shape, machine(shape) * rng.lognormal(0, 0.1)) for shape in (draw(rng) for _ in range(400))]
    cost.calibrate(steps)
    strict.calibrate(steps)
    inside = 0
    for _ in range(4000):
        shape = draw(rng)
        actual = machine(shape) * rng.lognormal(0, 0.1)
        inside += actual <= (cost.bound(shape) or 0)
        cost.observe(shape, actual)
        strict.observe(shape, actual)
    assert inside / 4000 == pytest.approx(coverage, abs=0.012)
    assert cost.margin(8 * MS) < strict.margin(8 * MS)


@pytest.mark.parametrize("coverage", [0.0, 0.49, 1.0, float("nan")])
def test_a_coverage_that_nobody_can_state_is_refused(coverage: float) -> None:
    with pytest.raises(InputError, match="coverage"):
        CostModel(coverage)


def test_a_neighbour_that_comes_and_goes_is_not_counted_twice() -> None:
    """For 200 ms in turns the machine is as measured and three times slower. While it is slow a run of 256 ms is not
    bounded by three times what was seen in calm: it will be calm again; while it is calm, by more than is seen."""
    rng = np.random.default_rng(12)
    cost = calibrated(lambda: 1.0)
    shape = StepShape("int8", 1, 0, 100, 1)
    usual, bounds, now = machine(shape), {1.0: 0.0, 3.0: 0.0}, 0.0
    for _ in range(6000):
        slow = 3.0 if now // (200 * MS) % 2 else 1.0
        took = usual * slow * rng.uniform(0.97, 1.03)
        now += took
        cost.observe(shape, took)
        expected = 256 * MS * cost.slowness
        bounds[slow] = expected * cost.margin(expected) / (256 * MS)
        assert cost.margin(expected) >= 1.0 or cost.slowness < 1.0
    assert bounds[3.0] < 4.5 and bounds[1.0] > 1.5


def test_long_runs_are_bounded_more_tightly_than_steps() -> None:
    rng = np.random.default_rng(5)
    cost = calibrated(lambda: rng.lognormal(0, 0.1))
    for _ in range(3000):
        shape = draw(rng)
        cost.observe(shape, machine(shape) * rng.lognormal(0, 0.1))
    step, few, many = cost.margin(3 * MS), cost.margin(32 * MS), cost.margin(512 * MS)
    assert many < few < step < 1.5
    assert cost.margin(1e15) == cost.margin(2e9) and cost.margin(1) == cost.margin(1e5)


def test_a_rare_stall_is_charged_once_to_a_long_run() -> None:
    """A step of 2 ms in 250 stalls for 20 ms. Nearly all single steps see none, so their bound leaves it out; a run of
    60 steps sees one in five times, and its bound has room for about one or two, not for one in every step."""
    rng = np.random.default_rng(8)
    cost = calibrated(lambda: 1.0)
    shape = StepShape("int8", 1, 0, 100, 1)
    usual = machine(shape)
    runs, inside, bound, actual, expected = 0, 0, 0.0, 0.0, 0.0
    for step in range(12_000):
        took = usual * rng.uniform(0.98, 1.02) + (20 * MS if rng.random() < 0.004 else 0)
        if step % 60 == 0:
            if step > 6000:
                runs, inside = runs + 1, inside + (actual <= bound)
            expected = 60 * (cost.predict(shape) or 0)
            bound, actual = expected * cost.margin(expected), 0.0
        actual += took
        cost.observe(shape, took)
    assert (cost.bound(shape) or 0) <= 1.3 * usual
    assert 20 * MS <= bound - expected <= 80 * MS
    assert inside / runs >= 0.95 and runs == 99


def test_a_neighbour_scales_and_wide_margins_fade_when_the_machine_calms() -> None:
    rng = np.random.default_rng(9)
    cost = calibrated(lambda: 1.0)
    shape = StepShape("int8", 1, 0, 100, 1)
    for _ in range(2500):
        cost.observe(shape, machine(shape) * rng.uniform(2.9, 3.1))
    assert cost.predict(shape) == pytest.approx(3 * machine(shape), rel=0.05) and cost.slowness > 2.5
    assert cost.margin(64 * MS) < 1.1, "what lasts is in the expectation"
    for _ in range(600):
        cost.observe(shape, machine(shape) * rng.choice([1.0, 8.0], p=[0.9, 0.1]))
    assert cost.margin(2 * MS) > 3
    cost.rest(1_000 * MS * 60)
    assert cost.margin(2 * MS) == pytest.approx(1.5, abs=0.05), "a rest forgets"
    for _ in range(2100):
        cost.observe(shape, machine(shape))
    assert cost.margin(2 * MS) == pytest.approx(1.0, abs=0.05), "and calm steps do"


def test_a_neighbour_is_noticed_within_a_few_steps_and_forgotten_later() -> None:
    cost = calibrated(lambda: 1.0)
    shape = StepShape("int8", 2, 0, 500, 2, 2)
    usual = cost.predict(shape) or 0

    def run(slowness: float, steps: int) -> list[float]:
        predictions = []
        for _ in range(steps):
            cost.observe(shape, machine(shape) * slowness)
            predictions.append((cost.predict(shape) or 0) / usual)
        return predictions

    run(1.0, 30)
    slow = run(2.5, 40)
    assert min(slow[3:]) > 2.2, "three steps later"
    back = run(1.0, 40)
    assert back[3] > 2, "one quick step is no proof that the neighbour left"
    assert back[-1] == pytest.approx(1.0, abs=0.05) and cost.slowness == pytest.approx(1.0, abs=0.05)


def test_a_single_hiccup_moves_nothing() -> None:
    cost = calibrated(lambda: 1.0)
    shape = StepShape("int8", 1, 0, 10, 1)
    for _ in range(20):
        cost.observe(shape, machine(shape))
    usual = cost.predict(shape)
    cost.observe(shape, machine(shape) * 30)
    assert cost.predict(shape) == pytest.approx(usual, rel=0.05)


def test_what_the_fit_has_wrong_for_one_kind_is_learned_apart() -> None:
    cost = calibrated(lambda: 1.0)
    usual, odd = StepShape("int8", 1, 0, 100, 1), StepShape("int8", 0, 20, 9000, 0)
    for _ in range(60):
        cost.observe(usual, machine(usual))
        cost.observe(odd, machine(odd) * 1.8)
        cost.observe(usual, machine(usual))
    assert cost.predict(odd) == pytest.approx(1.8 * machine(odd), rel=0.1)
    assert cost.predict(usual) == pytest.approx(machine(usual), rel=0.1)
    assert (cost.idle().predict(odd) or 0) == pytest.approx(cost.predict(odd), rel=0.1)


def test_what_was_learned_is_kept_and_distrusted() -> None:
    rng = np.random.default_rng(6)
    cost = calibrated(lambda: rng.lognormal(0, 0.1))
    again = CostModel()
    state = cost.state()
    again.restore(state)
    shape = draw(rng)
    assert again.predict(shape) == cost.predict(shape) and again.bound(shape) == cost.bound(shape)
    for broken in (
        {},
        {**state, "weights": []},
        {**state, "weights": {"int8": [1.0]}},
        {**state, "margins": [1.0]},
        {**state, "margins": [float("nan")] * len(state["margins"])},
        {**state, "weights": {"int8": ["1"] * state["features"]}},
        {**state, "weights": {"int8": [-1.0] * state["features"]}},
    ):
        with pytest.raises(InputError):
            CostModel().restore(broken)


@given(
    seed=st.integers(0, 99),
    rows=st.integers(1, 30),
    columns=st.integers(1, 8),
)
@settings(max_examples=60, deadline=None)
def test_nonnegative_least_squares_meets_its_conditions(seed: int, rows: int, columns: int) -> None:
    """Karush, Kuhn and Tucker: no weight is negative, and where one is zero more of it would not help."""
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(0, 1, (rows, columns)), rng.uniform(-1, 1, rows)
    weights = nonnegative_least_squares(x, y)
    gradient = x.T @ (y - x @ weights)
    assert (weights >= 0).all()
    assert (gradient <= 1e-4).all() and np.abs(gradient[weights > 1e-9]).max(initial=0) <= 1e-4


def test_the_quantile_follows_a_distribution_that_drifts() -> None:
    rng = np.random.default_rng(7)
    quantile = AdaptiveQuantile(0.95, window=100)
    for step in range(5000):
        quantile.add(rng.normal(step / 500, 1))
    assert quantile.inside / quantile.seen == pytest.approx(0.95, abs=0.015)
    assert len(quantile) == 100 and len(quantile.latest()) == 100
