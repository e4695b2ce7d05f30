"""How much time may be taken from those who are served: arithmetic on their budgets and on predicted steps.

Knows no clock and no cost model; both are arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from haomiao.engine.sequence import Sequence

PREFILL_SHARE = 0.25
"""A prompt token is taken to cost so much of a decode step; it costs less on every machine seen."""


def spare_ns(now: int, live: Iterable[Sequence], queued: bool, step_ns: Callable[[Sequence], float]) -> float:
    """Nanoseconds until the first budget would suffer, if each sequence needs its longest answer, one step after the
    other; infinite without budgets, 0 where nothing can be said. `step_ns` bounds the next step of a sequence."""
    if queued:
        return 0.0
    spare = math.inf
    for sequence in live:
        request = sequence.job.request
        if request.deadline_ns is None and request.ttft_deadline_ns is None and request.itl_ns is None:
            continue
        step = step_ns(sequence)
        if step <= 0:
            return 0.0
        prefill = max(1.0, PREFILL_SHARE * (sequence.target - sequence.length)) * step
        if request.itl_ns is not None:
            spare = min(spare, request.itl_ns - step)
        if request.ttft_deadline_ns is not None and not sequence.produced:
            spare = min(spare, request.ttft_deadline_ns - now - prefill)
        if request.deadline_ns is not None:
            left = request.sampling.max_tokens - sequence.produced
            spare = min(spare, request.deadline_ns - now - prefill - left * step)
    return max(spare, 0.0)
