"""Forecast, admission and throttle with invented times: pure functions, no engine and no clock."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.engine.admission import admit, ladder_of, permitted
from haomiao.engine.cost import Cost, StepShape
from haomiao.engine.forecast import NEVER, Machine, Work, forecast
from haomiao.engine.request import EngineRequest
from haomiao.engine.throttle import HOLD_REVIEWS, Gear, choose
from haomiao.errors import BudgetError, InputError, OverloadError

MS = 1_000_000
MACHINE = Machine(("int8", "int4"), max_step_tokens=64, chunk_tokens=64)


class Times:
    """An invented machine: 1 ms a step and 0.1 ms a token at int8, half of it at int4."""

    def __init__(self, slowness: float = 1.0, margin: float = 1.0) -> None:
        self.slowness = slowness
        self._margin = margin

    def predict(self, shape: StepShape) -> float | None:
        if shape.point not in MACHINE.ladder:
            return None
        rate = 1.0 if shape.point == "int8" else 0.5
        return self.slowness * rate * (MS + MS / 10 * shape.tokens)

    def bound(self, shape: StepShape) -> float | None:
        expected = self.predict(shape)
        return None if expected is None else expected * self._margin

    def margin(self, nanoseconds: float) -> float:
        return self._margin

    def idle(self) -> Cost:
        return Times(1.0, self._margin)


def work(key: int, prefill: int, decode: int = 0, least: int | None = None, **fields: Any) -> Work:
    return Work(key, prefill, decode, decode if least is None else least, **{"bottom": 1, **fields})


def ends(*works: Work, **options: Any) -> list[float]:
    done = forecast(0, works, MACHINE, Times(), options.pop("level", 0), **options)
    assert done is not None
    return [done[each.key].end_ns / MS for each in works]


# ---- forecast -------------------------------------------------------------------------------------------------------


def test_prefill_then_decode() -> None:
    done = forecast(5 * MS, [work(1, 10, 3)], MACHINE, Times(), 0)
    assert done is not None
    assert done[1].first_ns == 5 * MS + 2 * MS, "1 ms and 10 tokens"
    assert done[1].end_ns == 5 * MS + 2 * MS + int(3 * 1.1 * MS)
    assert ends(work(1, 0, 4)) == pytest.approx([4.4])
    assert ends(work(1, 0, 4), level=1) == pytest.approx([2.2])
    assert ends(work(1, 0, 4, least=1), least=True) == pytest.approx([1.1])


def test_long_prompts_take_chunks_and_decoding_goes_along() -> None:
    assert ends(work(1, 128)) == pytest.approx([2 * 7.4])
    first, second = ends(work(1, 0, 2), work(2, 128))
    assert first == pytest.approx(2 * 7.4), "one token a step, beside 63 of prefill"
    assert second == pytest.approx(2 * 7.4 + 1.2), "two tokens are left after that"
    small = replace(MACHINE, chunk_tokens=8)
    done = forecast(0, [work(1, 24)], small, Times(), 0)
    assert done is not None and done[1].end_ns == pytest.approx(3 * 1.8 * MS)


def test_what_is_due_before_all_that_may_come_is_played_uncut() -> None:
    machine = replace(MACHINE, chunk_tokens=8, tightest_ns=20 * MS)
    urgent, lax = work(1, 24, deadline_ns=20 * MS), work(2, 24, deadline_ns=24 * MS)
    done = forecast(0, [urgent], machine, Times(), 0)
    assert done is not None and done[1].end_ns == pytest.approx(3.4 * MS), "one step"
    done = forecast(0, [lax], machine, Times(), 0)
    assert done is not None and done[2].end_ns == pytest.approx(3 * 1.8 * MS), "played in equal steps"
    done = forecast(0, [urgent, lax], machine, Times(), 0)
    assert done is not None and done[2].end_ns == pytest.approx((3.4 + 3 * 1.8) * MS), "nothing of it beside the other"
    done = forecast(5 * MS, [lax], machine, Times(), 0)
    assert done is not None and done[2].end_ns == pytest.approx(8.4 * MS), "a while later it goes before all, too"


def test_the_urgent_prefills_first() -> None:
    lax, urgent = work(1, 64, deadline_ns=900 * MS), work(2, 64, deadline_ns=100 * MS)
    assert ends(lax, urgent) == pytest.approx([14.8, 7.4])


def test_points_take_turns() -> None:
    fixed, free = work(1, 0, 2, bottom=0), work(2, 0, 2)
    assert ends(fixed, free) == pytest.approx([2.4, 2.4]), "together at int8"
    assert ends(fixed, free, level=1) == pytest.approx([3.3, 3.3]), "one at int8 and one at int4, one after the other"


def test_samples_and_options_are_wide() -> None:
    assert ends(work(1, 4, 1, width=12)) == pytest.approx([1.4 + 2.2])
    assert ends(work(1, 0, 1, width=128)) == pytest.approx([13.8 * 2]), "more than one step holds"


def test_an_unknown_point_is_not_predicted_and_endless_work_never_ends() -> None:
    assert forecast(0, [work(1, 3)], Machine(("full",), 64, 64), Times(), 0) is None
    done = forecast(0, [work(key, 64) for key in range(600)], MACHINE, Times(), 0)
    assert done is not None and done[500].end_ns < NEVER and done[599].end_ns == NEVER


WORKS = st.lists(
    st.builds(
        lambda prefill, decode, least, length, width, budget, fixed: (
            prefill,
            decode,
            min(least, decode),
            length,
            width,
            budget,
            fixed,
        ),
        prefill=st.integers(0, 200),
        decode=st.integers(0, 60),
        least=st.integers(0, 60),
        length=st.integers(0, 300),
        width=st.integers(1, 4),
        budget=st.none() | st.integers(1, 500),
        fixed=st.booleans(),
    ),
    min_size=1,
    max_size=8,
).map(
    lambda rows: [
        work(
            key,
            prefill,
            decode,
            least,
            length=length,
            width=width,
            bottom=0 if fixed else 1,
            arrival_ns=key,
            deadline_ns=None if budget is None else budget * MS,
        )
        for key, (prefill, decode, least, length, width, budget, fixed) in enumerate(rows, 1)
    ]
)


@given(works=WORKS, slowness=st.floats(1.0, 5.0))
@settings(max_examples=150, deadline=None)
def test_forecasts_are_monotone(works: list[Work], slowness: float) -> None:
    """A slower machine is never earlier, less work never later, and the first token never after the end."""
    usual = forecast(0, works, MACHINE, Times(), 0)
    slow = forecast(0, works, MACHINE, Times(slowness), 0)
    least = forecast(0, works, MACHINE, Times(), 0, least=True)
    assert usual is not None and slow is not None and least is not None
    assert set(usual) == {each.key for each in works}
    for each in works:
        assert usual[each.key].first_ns <= usual[each.key].end_ns <= slow[each.key].end_ns
    assert max(done.end_ns for done in least.values()) <= max(done.end_ns for done in usual.values())


# ---- which points ---------------------------------------------------------------------------------------------------

ERRORS = {"int8": 0.001, "int4": 0.02}


def points(default: str = "int8", lowest: str = "int4", errors: dict[str, float] = ERRORS, **fields: Any) -> str:
    request = EngineRequest([1], **{"deadline_ns": 1, **fields})
    top, bottom = permitted(request, MACHINE.ladder, default, lowest, errors)
    return "+".join(MACHINE.ladder[top : bottom + 1])


def test_a_request_says_how_far_it_may_be_lowered() -> None:
    assert ladder_of(["int4", "full", "int8"]) == ("full", "int8", "int4")
    assert points() == "int8+int4"
    assert points(deadline_ns=None) == "int8", "nobody is lowered without a budget"
    assert points(on_budget="truncate") == points(on_budget="refuse") == points(min_point="int8") == "int8"
    assert points(lowest="int8") == "int8" and points(point="int4") == "int4"
    assert points(default="int4", min_point="int8") == "int8"
    assert points(max_kl=0.05) == "int8+int4" and points(max_kl=0.01) == "int8"
    assert points(default="int4", max_kl=0.01) == "int8", "lifted to where it holds"
    with pytest.raises(InputError, match="below min_point"):
        points(point="int4", min_point="int8")
    for impossible in ({"max_kl": 1e-6}, {"point": "int4", "max_kl": 0.01}, {"errors": {}, "max_kl": 0.5}):
        with pytest.raises(BudgetError, match="no permitted point") as caught:
            points(**impossible)
        assert caught.value.param == "max_kl" and caught.value.status == 422


# ---- admission ------------------------------------------------------------------------------------------------------


def test_a_feasible_budget_is_promised_a_bound() -> None:
    one = work(1, 10, 20, 5, deadline_ns=100 * MS)
    found = admit(0, one, [], MACHINE, Times(margin=1.2), 0, free_ns=0)
    assert found is not None and found == (pytest.approx(24 * 1.2 * MS), pytest.approx(24 * 1.2 * MS))
    later = admit(0, one, [], MACHINE, Times(), 0, free_ns=7 * MS, stretch=1.5)
    assert later is not None and later[0] == pytest.approx(31 * 1.5 * MS) and later[1] == 31 * MS
    cut = admit(0, replace(one, deadline_ns=20 * MS, bottom=0), [], MACHINE, Times(), 0, free_ns=0)
    assert cut is not None and cut[0] == 20 * MS, "it ends at its deadline, with what there is"
    assert admit(0, replace(one, deadline_ns=None), [], MACHINE, Times(), 0, free_ns=0) is None
    assert admit(0, one, [], Machine(("full",), 64, 64), Times(), 0, free_ns=0) is None


def test_what_is_admitted_at_a_lower_point_is_promised_the_time_of_that_point() -> None:
    choice = work(1, 10, deadline_ns=3 * MS)
    assert admit(0, choice, [], MACHINE, Times(), 0, free_ns=0) == (2 * MS, 2 * MS), "int8 keeps it"
    tight = replace(choice, deadline_ns=int(1.5 * MS))
    assert admit(0, tight, [], MACHINE, Times(), 0, free_ns=0) == (MS, MS), "int4 does"
    assert admit(0, tight, [], MACHINE, Times(), 1, free_ns=0) == (MS, MS)
    guest = work(2, 0, 500, width=15)
    assert admit(0, choice, [guest], MACHINE, Times(), 0, free_ns=0) == (2 * MS, 2 * MS), "the guest waits first"
    assert admit(0, tight, [guest], MACHINE, Times(), 0, free_ns=0) == (MS, MS)
    long = work(3, 10, 20, 5, deadline_ns=15 * MS)
    assert admit(0, long, [], MACHINE, Times(), 0, free_ns=0) == (12 * MS, 12 * MS), "lowered rather than cut"
    longer = replace(long, deadline_ns=11 * MS)
    assert admit(0, longer, [], MACHINE, Times(), 0, free_ns=0) == (11 * MS, 11 * MS), "lowered, and cut"


def test_what_an_idle_machine_cannot_do_is_infeasible() -> None:
    one = work(1, 10, 20, 5, deadline_ns=3 * MS)
    with pytest.raises(BudgetError, match=r"even an idle machine needs 3\.8 ms") as caught:
        admit(0, one, [], MACHINE, Times(slowness=9), 0, free_ns=0)
    assert caught.value.predicted_ms == pytest.approx(3.75) and caught.value.retry_after_ms is None
    whole = replace(one, least=20, deadline_ns=11 * MS)
    with pytest.raises(BudgetError, match=r"12\.0 ms"):
        admit(0, whole, [], MACHINE, Times(), 0, free_ns=0)
    first = replace(one, deadline_ns=None, first_ns=MS // 2)
    with pytest.raises(BudgetError, match=r"a first token within 0\.5 ms"):
        admit(0, first, [], MACHINE, Times(), 0, free_ns=0)


def test_what_only_the_load_forbids_may_come_again() -> None:
    one = work(1, 10, 20, 5, deadline_ns=10 * MS)
    with pytest.raises(OverloadError, match="beside 0 other requests") as caught:
        admit(0, one, [], MACHINE, Times(slowness=4), 0, free_ns=0)
    assert caught.value.predicted_ms == pytest.approx(15.0) and caught.value.retry_after_ms == pytest.approx(50)
    with pytest.raises(OverloadError):
        admit(0, one, [], MACHINE, Times(), 0, free_ns=8 * MS)


def test_a_forecast_that_was_too_wide_lately_is_believed_less() -> None:
    """The newcomer's own end alone: neither the promises of others nor its first token stand on it."""
    one = work(1, 10, 20, 5, deadline_ns=10 * MS)
    late: dict[str, Any] = {"free_ns": 8 * MS}
    assert admit(0, one, [], MACHINE, Times(), 0, **late, stretch=0.8) is not None
    for stretch in (0.9, 1.0, 2.0):
        with pytest.raises(OverloadError):
            admit(0, one, [], MACHINE, Times(), 0, **late, stretch=stretch)
    with pytest.raises(OverloadError):  # half of it is believed in any case
        admit(0, one, [], MACHINE, Times(), 0, free_ns=20 * MS, stretch=0.01)
    first = replace(one, deadline_ns=None, first_ns=8 * MS)
    with pytest.raises(OverloadError):
        admit(0, first, [], MACHINE, Times(), 0, **late, stretch=0.8)
    admitted, newcomer = work(1, 0, 20, 20, deadline_ns=12 * MS), work(2, 60, 5, 5, deadline_ns=50 * MS)
    with pytest.raises(OverloadError):
        admit(0, newcomer, [admitted], MACHINE, Times(), 0, free_ns=0, stretch=0.5)


def test_nobody_is_admitted_at_the_cost_of_a_promise() -> None:
    admitted = work(1, 0, 20, 20, deadline_ns=12 * MS)
    newcomer = work(2, 60, 5, 5, deadline_ns=50 * MS)
    assert admit(0, newcomer, [replace(admitted, deadline_ns=40 * MS)], MACHINE, Times(), 0, free_ns=0) is not None
    with pytest.raises(OverloadError):
        admit(0, newcomer, [admitted], MACHINE, Times(), 0, free_ns=0)
    lost = replace(admitted, deadline_ns=5 * MS)
    assert admit(0, newcomer, [lost], MACHINE, Times(), 0, free_ns=0) is not None, "late with or without it"
    guest = work(3, 0, 1000)
    assert admit(0, newcomer, [guest], MACHINE, Times(), 0, free_ns=0) is not None, "who has no budget waits"


# ---- throttle -------------------------------------------------------------------------------------------------------


def gear(*works: Work, at: Gear | None = None, slowness: float = 1.0, now: int = 0) -> Gear:
    return choose(now, works, MACHINE, Times(slowness), at or Gear())


def test_the_most_accurate_point_that_holds() -> None:
    assert gear() == Gear() and gear(work(1, 5, 5)) == Gear()
    assert gear(work(1, 10, 20, 1, deadline_ns=30 * MS)).level == 0
    assert gear(work(1, 10, 20, 1, deadline_ns=20 * MS)).level == 1
    assert gear(work(1, 10, 20, 1, deadline_ns=5 * MS)).level == 1, "the cheapest if none holds"
    assert gear(work(1, 10, 20, 1, deadline_ns=30 * MS), slowness=1.5).level == 1, "a neighbour came"


def test_guests_wait_before_anything_is_lowered() -> None:
    guest, urgent = work(1, 60), work(2, 0, 10, 1, deadline_ns=12 * MS)
    assert gear(guest, urgent) == Gear(0, False)
    assert gear(guest, replace(urgent, deadline_ns=40 * MS)) == Gear(0, True, 1)
    assert gear(guest, replace(urgent, deadline_ns=8 * MS)).level == 1


def test_works_that_cannot_be_lowered_lower_nobody() -> None:
    fixed = work(1, 0, 50, 1, deadline_ns=20 * MS, bottom=0)
    free = work(2, 0, 5, 1, deadline_ns=90 * MS)
    assert gear(fixed, free).level == 0


def test_down_at_once_and_up_after_a_while() -> None:
    tight = work(1, 0, 20, 1, deadline_ns=20 * MS)
    lax = replace(tight, deadline_ns=200 * MS)
    low = gear(tight)
    assert low.level == 1
    seen = [low]
    for _ in range(HOLD_REVIEWS + 2):
        seen.append(gear(lax, at=seen[-1]))
    levels = [each.level for each in seen]
    assert levels == sorted(levels, reverse=True) and levels[HOLD_REVIEWS] == 1 and levels[-1] == 0
    barely = replace(tight, deadline_ns=23 * MS)
    assert gear(barely).level == 0, "it would hold at int8"
    now = low
    for _ in range(10):
        now = gear(barely, at=now)
    assert now.level == 1, "but without room to spare nobody goes up"
