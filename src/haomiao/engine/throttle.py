"""The throttle: the most accurate point at which every admitted budget still holds, chosen anew as the work changes.

A pure function of the time, the work, the cost and the gear it stood in. Down at once, by as much as it takes: first
those without a budget wait, then everything that may runs at a lower point. Up one notch at a time, only after a while
and only with room to spare, so that it does not flap. Knows no sequences and no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from haomiao.engine.cost import Cost
from haomiao.engine.forecast import Finish, Machine, Work, forecast

HOLD_REVIEWS = 3
"""Reviews without trouble before it goes up."""
SPARE = 0.85
"""Share of the time left that a gear may use before it is gone up to."""


@dataclass(frozen=True, slots=True)
class Gear:
    """Where the throttle stands."""

    level: int = 0
    """Index in the ladder: 0 is the most accurate point."""
    guests: bool = True
    """Those without a budget may share steps; if not they get their floor and nothing else."""
    calm: int = 0
    """Reviews since it last went down."""


def choose(now: int, works: Sequence[Work], machine: Machine, cost: Cost, gear: Gear, floor_ns: int = 0) -> Gear:
    """The gear for the next steps. `floor_ns` is the step that those without a budget get now and then in any gear."""
    budgeted = [work for work in works if not work.guest]
    if not budgeted:
        return Gear()
    first, last = min(work.top for work in budgeted), max(work.bottom for work in budgeted)
    company = [True, False] if len(budgeted) < len(works) else [True]
    gears = [(level, guests) for level in range(first, last + 1) for guests in company]

    def holds(one: tuple[int, bool], share: float) -> bool:
        return _holds(now, works, machine, cost, one, share, floor_ns)

    at = min(range(len(gears)), key=lambda index: (abs(gears[index][0] - gear.level), gears[index][1] != gear.guests))
    if holds(gears[at], 1.0):
        calm = gear.calm + 1
        if at and calm > HOLD_REVIEWS and holds(gears[at - 1], SPARE):
            return Gear(*gears[at - 1], HOLD_REVIEWS - 1)  # the next notch follows quickly if it holds as well
        return Gear(*gears[at], calm)
    for lower in gears[at + 1 :]:
        if holds(lower, 1.0):
            return Gear(*lower)
    return Gear(*gears[-1])


def _holds(
    now: int,
    works: Sequence[Work],
    machine: Machine,
    cost: Cost,
    gear: tuple[int, bool],
    share: float,
    floor_ns: int,
) -> bool:
    """True if every budget holds in this gear within `share` of the time that is left. Works that may be cut but not
    lowered keep guests waiting, and never lower the point for others."""
    level, guests = gear
    playing = [work for work in works if guests or not work.guest]
    company = len(playing) > sum(not work.guest for work in works)
    done = forecast(now, playing, machine, cost, level, floor_ns=0 if guests else floor_ns)
    if done is None:
        return True
    for work in playing:
        if work.guest or (work.bottom == work.top and work.least < work.decode and not company):
            continue
        finish = done[work.key]
        if share < 1.0:
            finish = Finish(_stretched(now, finish.first_ns, share), _stretched(now, finish.end_ns, share))
        if not finish.keeps(work):
            return False
    return True


def _stretched(now: int, at: int, share: float) -> int:
    return now + int((at - now) / share)
