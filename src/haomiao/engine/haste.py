"""What is owed to deadlines within a round: who must look for an end, who has no time left, what time is to spare.

Knows who is served, their budgets and what steps cost; plans and computes nothing.
"""

from __future__ import annotations

from haomiao.engine.batch import work_of
from haomiao.engine.budgets import CLOSING_TOKENS, Budgets
from haomiao.engine.cost import LearningCost, StepShape
from haomiao.engine.reporter import Reporter
from haomiao.engine.roster import Roster
from haomiao.engine.sequence import Sequence
from haomiao.errors import DeadlineError


class Haste:
    """Keeps what was promised, or ends it in time."""

    def __init__(self, roster: Roster, reporter: Reporter, budgets: Budgets, cost: LearningCost | None) -> None:
        self._roster = roster
        self._reporter = reporter
        self._budgets = budgets
        self._cost = cost

    def hasten(self, now: int) -> None:
        """Keep what was promised: whoever is short of time looks for an end, whoever has none left ends."""
        urgent = [sequence for sequence in self._roster if sequence.job.request.deadline_ns is not None]
        round_ns = self.decode_ns() if urgent else 0.0
        for sequence in urgent:
            if sequence not in self._roster:
                continue  # it ended with another sample
            left = self._budgets.tokens_left(now, sequence, round_ns)
            if left == 0:
                self._end_early(sequence, now)
            elif left <= CLOSING_TOKENS and sequence.job.request.on_budget != "refuse":
                sequence.hasten(left)

    def decode_ns(self) -> float:
        """What a round takes in which everything that decodes gets its token; 0 while nothing is known about time."""
        decoding = [sequence for sequence in self._roster if sequence.produced]
        total = 0.0
        for point in dict.fromkeys(self._budgets.point_of(sequence.job) for sequence in decoding):
            here = [sequence for sequence in decoding if self._budgets.point_of(sequence.job) == point]
            shape = StepShape(point, len(here), 0, sum(each.length for each in here), len(here), len(here))
            total += (self._cost.predict(shape) or 0.0) if self._cost is not None else 0.0
        return total

    def _end_early(self, sequence: Sequence, now: int) -> None:
        """End a sequence that has time for no step more: with what there is, or, when the time is up, without."""
        request = sequence.job.request
        spent = now >= (request.deadline_ns or now)
        if request.on_budget == "refuse" and not spent:
            return
        try:
            progress = sequence.close_early()
        except Exception as error:
            self._reporter.fail(sequence.job, error, now)
            return
        if progress is not None:
            self._reporter.tell(sequence, progress, now)
        elif spent:
            self._reporter.fail(sequence.job, DeadlineError("the budget was spent before the first token"), now)

    def spare_ns(self, now: int) -> float:
        """Nanoseconds that may be taken now without any budget suffering; all there is where nobody has one."""
        between = [each.job.request.itl_ns for each in self._roster if each.job.request.itl_ns is not None]
        spare = self._budgets.spare_ns(now, [work_of(sequence) for sequence in self._roster])
        return min(spare, min(between) - self.decode_ns()) if between else spare
