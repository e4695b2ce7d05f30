"""What came out of a step: every sequence gets its rows of logits, and what became of it is told.

Knows who is served and who listens; not how a step is planned or computed.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from haomiao.engine.batch import Share
from haomiao.engine.choice import Option
from haomiao.engine.monitor import Monitor
from haomiao.engine.reporter import Reporter
from haomiao.engine.roster import Roster
from haomiao.engine.sequence import Rows
from haomiao.engine.speculate.speculator import Speculator
from haomiao.errors import CancelledError
from haomiao.types import StepResult


class Emission:
    """Takes the results of steps in."""

    def __init__(
        self,
        roster: Roster,
        reporter: Reporter,
        speculator: Speculator,
        monitor: Monitor,
        clock: Callable[[], int],
    ) -> None:
        self._roster = roster
        self._reporter = reporter
        self._speculator = speculator
        self._monitor = monitor
        self._clock = clock

    def emit(self, point: str, shares: list[Share], result: StepResult) -> None:
        """Hand every sequence its logits, and tell what became of it."""
        now = self._clock()
        row = state = 0
        for index, share in enumerate(shares):
            sequence = share.sequence
            first, row = row, row + share.rows
            seen, state = state, state + share.hidden
            if sequence.state is None:
                continue  # its request failed a moment ago, with another sample
            rows = _rows(sequence.length - share.rows, result, first, row) if share.rows else None
            try:
                sequence.account(point, share.tokens)
                if share.hidden and result.hidden is not None:
                    sequence.see(sequence.length - share.hidden, result.hidden[seen:state])
                if share.branches and rows is not None:
                    self._take_in_branches(share, rows)
                branches = [] if share.branches or share.parent else sequence.branches()
                for branch in branches:
                    self._roster.enter(branch, past=sequence)
                for each in (sequence, *branches):
                    progress = each.consume(rows)
                    self._roster.publish(each)  # now that it holds nothing but what stands
                    receipt = self._reporter.tell(each, progress, now)
                    if receipt is not None:
                        self._monitor.ended(each, receipt)
            except Exception as error:
                for branch_share in share.branches:
                    branch_share.take_back()
                self._reporter.fail(sequence.job, error, now)
            except BaseException:  # an interrupt: this request is half told, and the rest of the step not looked at
                take_back([*share.branches, *shares[index + 1 :]])
                self._reporter.fail(sequence.job, CancelledError("the request was interrupted"), now)
                raise
        self._speculator.settle(point, shares)

    def _take_in_branches(self, share: Share, rows: Rows) -> None:
        """Take in what branched off within the step. Its own share follows; the rows here are those before it."""
        for each in share.branches:
            self._roster.enter(each.sequence, past=share.sequence)
        for each in share.branches:
            if isinstance(each.sequence, Option):
                each.sequence.score(rows)
            if not each.tokens:
                self._reporter.tell(each.sequence, each.sequence.consume(None), self._clock())


def _rows(position: int, result: StepResult, first: int, end: int) -> Rows:
    """Rows `first` to `end` of a step; the first one is that of `position`."""
    drawn = None if result.drawn is None else result.drawn[first:end]
    return Rows(position, result.logits[first:end], result.argmax[first:end], drawn)


def take_back(shares: SequenceOf[Share]) -> None:
    """The step was not computed: nothing stays of the room that was made for it."""
    for share in shares:
        for each in share.branches:
            each.take_back()
        share.take_back()
