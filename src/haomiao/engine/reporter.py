"""What is told: events and receipts out of the progress, the end and the failure of sequences.

A sequence that ended leaves the roster here, so that nothing ends without a word. Knows no executor and no schedule.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from haomiao.engine.account import Letterhead, make_receipt
from haomiao.engine.generation import Generation
from haomiao.engine.request import FINISH_REASONS, DoneEvent, Event, FinishDetail, TokenEvent
from haomiao.engine.roster import Roster
from haomiao.engine.sequence import Embedding, Job, Progress, Reading
from haomiao.engine.sequence import Sequence as Live
from haomiao.errors import EngineError, HaomiaoError, KvExhaustedError
from haomiao.types import Observer, Receipt, StepBatch, StepResult


class Reporter:
    """Collects the events of one step; receipts go to the observers too."""

    def __init__(
        self,
        roster: Roster,
        letterhead: Letterhead,
        observers: Sequence[Observer],
        ended: Callable[[Job, Live, int, FinishDetail], None] | None = None,
    ) -> None:
        """`ended` is told of every answer that ended without an error."""
        self._roster = roster
        self._ended = ended
        self._letterhead = letterhead
        self._observers = tuple(observers)
        self._events: list[Event] = []
        self.own: set[int] = set()
        """Live requests that nobody made: nothing is told of them."""

    def take(self) -> list[Event]:
        """The events since the last time, in the order in which they happened."""
        events, self._events = self._events, []
        return events

    def tell(self, sequence: Live, progress: Progress, now: int) -> Receipt | None:
        """Turn a sequence's progress into events, and let it go if it ended: then its receipt is returned."""
        job, detail = sequence.job, progress.detail
        generated = isinstance(sequence, Generation)
        sample = sequence.sample if generated else 0
        if progress.token_ids or progress.text:
            if sequence.first_token_ns is None:
                sequence.first_token_ns = now
            logprobs = None if job.request.sampling.logprobs is None else progress.logprobs
            self._events.append(TokenEvent(job.id, sample, progress.token_ids, progress.text, logprobs, sequence.point))
        if detail is None:
            return None
        self._roster.leave(sequence)
        if not generated and job.open:
            return None  # a choice ends with its last option
        if self._ended is not None:
            self._ended(job, sequence, now, detail)
        receipt = make_receipt(self._letterhead, job, sequence, now, detail=detail)
        if job.single_prefill:
            receipt.completion_tokens = len(progress.token_ids)  # the answer's, not those of the last option scored
        self._finish(
            DoneEvent(
                job.id,
                sample,
                receipt,
                finish_reason=FINISH_REASONS[detail],
                finish_detail=detail,
                scores=job.scores if job.request.work == "choose" and not job.single_prefill else None,
                logits=sequence.logits if isinstance(sequence, Reading) else None,
                embedding=sequence.mean if isinstance(sequence, Embedding) else None,
                prompt_logprobs=sequence.prompt_logprobs if isinstance(sequence, Generation) else None,
            )
        )
        return receipt

    def fail(self, job: Job, error: Exception, now: int) -> None:
        """End a request with an error: one event for each of its samples that is still open."""
        shown = as_error(error)
        told: set[int] = set()
        for sequence in self._roster.of(job):
            self._roster.leave(sequence)
            sample = sequence.sample if isinstance(sequence, Generation) else 0
            if sample not in told:
                told.add(sample)
                receipt = make_receipt(self._letterhead, job, sequence, now, error=shown)
                self._finish(DoneEvent(job.id, sample, receipt, error=shown))

    def refuse(self, job: Job, error: Exception, now: int) -> None:
        """End a request that never became a sequence."""
        shown = as_error(error)
        self._finish(DoneEvent(job.id, 0, make_receipt(self._letterhead, job, None, now, error=shown), error=shown))

    def refused(self, job: Job, error: HaomiaoError, now: int) -> None:
        """A request was turned away when it was submitted; its caller knows, the observers do not yet."""
        receipt = make_receipt(self._letterhead, job, None, now, error=error)
        self._notify(lambda observer: observer.on_finish(receipt))

    def stepped(self, batch: StepBatch, result: StepResult) -> None:
        """Tell the observers of a step."""
        self._notify(lambda observer: observer.on_step(batch, result))

    def _finish(self, event: DoneEvent) -> None:
        if event.request_id in self.own:
            self.own.remove(event.request_id)
            return
        self._events.append(event)
        self._notify(lambda observer: observer.on_finish(event.receipt))

    def _notify(self, tell: Callable[[Observer], None]) -> None:
        """Tell the observers. One that fails is logged; no request suffers for it."""
        for observer in self._observers:
            try:
                tell(observer)
            except Exception:
                logging.getLogger(__name__).exception("the observer %s failed", type(observer).__name__)


def as_error(error: Exception) -> HaomiaoError:
    """What a user may see of an exception: ours as it is, anything else as an internal one."""
    if isinstance(error, HaomiaoError):
        return error
    if isinstance(error, MemoryError):
        return KvExhaustedError("the machine has no memory left for this request")
    failure = EngineError(f"{type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
