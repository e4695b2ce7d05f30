"""The learning rate of a step as a share of its peak. Arithmetic only.

`cosine`: half a cosine from 1 to `floor`. `trapezoid` (Hägele et al., arXiv:2405.18392): constant, then linear to
`floor` over the last `decay` share of the steps; before the fall begins the number of steps may be changed.
"""

from __future__ import annotations

import math

from haomiao.train.settings import Schedule


def rate_share(schedule: Schedule, step: int) -> float:
    """Of step `step` (from 0): rises over `warmup` steps, then as the schedule says."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.schedule == "cosine":
        done = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
        return schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    left = (schedule.steps - step) / max(1.0, fall_steps(schedule))
    return min(1.0, schedule.floor + (1 - schedule.floor) * max(0.0, left))


def fall_steps(schedule: Schedule) -> float:
    """Steps over which a trapezoid falls."""
    return schedule.decay * (schedule.steps - schedule.warmup)
