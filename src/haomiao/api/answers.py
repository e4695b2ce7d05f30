"""What comes back: `Completion`, `Chunk`, `Choice`, and the stream that yields chunks. Knows events, not models."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from haomiao.engine.driver import Ticket
from haomiao.engine.request import DoneEvent, Event, FinishDetail
from haomiao.errors import EngineError, HaomiaoError
from haomiao.types import F32, FinishReason, Receipt, TokenLogprob


@dataclass(slots=True)
class Chunk:
    """What came out of one step. The last chunk of a sample has `finish_reason`, `finish_detail` and `receipt`."""

    text: str
    """Text that is certain: whole characters that are not the start of a stop string. It may be empty."""
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    finish_detail: FinishDetail | None = None
    receipt: Receipt | None = None
    index: int = 0
    """Which of the `n` samples."""


@dataclass(slots=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: list[int]
    """Everything that was generated: an end-of-sequence or stop token is the last one, and not part of `text`."""
    finish_reason: FinishReason
    finish_detail: FinishDetail
    logprobs: list[TokenLogprob] | None
    receipt: Receipt
    index: int = 0
    prompt_logprobs: list[TokenLogprob] | None = None


@dataclass(slots=True)
class Choice:
    """The likeliest of several options."""

    index: int
    option: str
    scores: list[float]
    """Natural-log probability of every option and its end, in the order given."""
    receipt: Receipt


@dataclass(slots=True)
class Embedding:
    """A text as a point: the mean of the hidden states that stand before the vocabulary head, over its tokens."""

    vector: F32
    """float32 [hidden], of length 1 unless asked otherwise."""
    token_ids: list[int]
    receipt: Receipt


class AnswerStream:
    """Chunks of one request as they are produced; closing it ends the request.

    An iterator and a context manager. The request runs from the moment the stream is made.
    """

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self._chunks: deque[Chunk] = deque()
        self._error: HaomiaoError | None = None

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> Chunk:
        while not self._chunks:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            events = self._wait()
            if not events:
                raise StopIteration
            chunks, self._error = chunks_of(events)
            self._chunks.extend(chunks)
        return self._chunks.popleft()

    def close(self) -> None:
        """End the request if it has not ended."""
        self._chunks.clear()
        self._ticket.cancel()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        ticket: Ticket | None = getattr(self, "_ticket", None)
        if ticket is not None:
            ticket.cancel()

    def _wait(self) -> list[Event]:
        try:
            return self._ticket.wait()
        except BaseException:  # an interrupt, or a request that failed: nobody will come back for it
            self._ticket.cancel()
            raise


def chunks_of(events: Sequence[Event]) -> tuple[list[Chunk], HaomiaoError | None]:
    """Chunks of events, the end of a sample in one with its last tokens; and the error of a request that failed."""
    chunks: list[Chunk] = []
    for event in events:
        if not isinstance(event, DoneEvent):
            chunks.append(Chunk(event.text, event.token_ids, event.logprobs, index=event.sample))
            continue
        if event.error is not None:
            return chunks, event.error
        if not chunks or chunks[-1].index != event.sample:
            chunks.append(Chunk("", [], index=event.sample))
        last = chunks[-1]
        last.finish_reason, last.finish_detail, last.receipt = event.finish_reason, event.finish_detail, event.receipt
    return chunks, None


def completions_of(events: Sequence[Event], samples: int) -> list[Completion]:
    """Whole answers out of all events of a request, by sample. Raises the error of a request that failed."""
    texts: list[list[str]] = [[] for _ in range(samples)]
    token_ids: list[list[int]] = [[] for _ in range(samples)]
    logprobs: list[list[TokenLogprob] | None] = [None] * samples
    answers: list[Completion] = []
    for event in events:
        index = event.sample
        if not isinstance(event, DoneEvent):
            texts[index].append(event.text)
            token_ids[index] += event.token_ids
            if event.logprobs is not None:
                logprobs[index] = [*(logprobs[index] or ()), *event.logprobs]
            continue
        if event.error is not None:
            raise event.error
        if event.finish_reason is not None and event.finish_detail is not None:
            answers.append(
                Completion(
                    "".join(texts[index]),
                    token_ids[index],
                    event.finish_reason,
                    event.finish_detail,
                    logprobs[index],
                    event.receipt,
                    index,
                    event.prompt_logprobs,
                )
            )
    return sorted(answers, key=lambda answer: answer.index)


def end_of(events: Iterable[Event]) -> DoneEvent:
    """The end of a request that has one and no tokens. Raises its error."""
    for event in events:
        if isinstance(event, DoneEvent):
            if event.error is not None:
                raise event.error
            return event
    raise EngineError("the request ended without a word")


def unit(vector: F32) -> F32:
    """The vector at length 1; one that is all zero stays as it is. Raises `EngineError` if it is not finite."""
    if not np.isfinite(vector).all():
        raise EngineError("the model's hidden states are not finite")
    length = float(np.sqrt(np.square(vector, dtype=np.float64).sum()))
    scaled: F32 = (vector / length).astype(np.float32) if length > 0 else vector
    return scaled
