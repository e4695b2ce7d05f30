"""Live sequences: what a piece of work wants computed, and what it does with the logits that come back.

A sequence has tokens, and KV for the first of them. The engine computes more until `target` tokens are in KV, takes new
sequences in from `branches`, hands the wanted rows of logits to `consume`, and learns what became of each sequence.
Answers are `generation`, choices `choice`. Knows nothing about batches, blocks or the order in which sequences are
served.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from haomiao.engine.draw import Drawing
from haomiao.engine.logprobs import log_normalizer
from haomiao.engine.origin import Origin
from haomiao.engine.prefix import PrefixNames
from haomiao.engine.request import EngineRequest, FinishDetail
from haomiao.engine.state import PagedState
from haomiao.errors import EngineError
from haomiao.types import F32, F64, I32, ScheduleEntry, TokenLogprob

NO_ROWS = 1 << 62
"""A position that is never reached."""


@dataclass(slots=True)
class Job:
    """A request while it is served: what its sequences share."""

    id: int
    request: EngineRequest
    points: tuple[str, ...]
    """Points it may run at, the most accurate first."""
    arrival_ns: int
    seed: int
    eos_ids: tuple[int, ...]
    vocab_size: int
    started_ns: int | None = None
    cached_tokens: int = 0
    open: int = 0
    """Sequences not yet ended."""
    scores: list[float] = field(default_factory=list)
    """One per option of a choice."""
    top: int = 0
    """Index of `points[0]` in the engine's ladder; `bottom` is that of the last one."""
    bottom: int = 0
    least: int = 1
    """Tokens without which the answer is not worth having."""
    expected: int = 1
    """Tokens that answers like it turn out to have, at most."""
    promised_ns: int | None = None
    """The bound on its end that was stated when it was admitted."""
    forecast_ns: int | None = None
    """The expectation under that bound, and below it the time from which it counts."""
    admitted_ns: int = 0
    names: PrefixNames | None = None
    """Names of its prefix blocks, where they were asked for already."""

    @property
    def point(self) -> str:
        """The most accurate point it may run at: its own."""
        return self.points[0]

    @property
    def single_prefill(self) -> bool:
        """It is a choice that stands for an answer which there was no time to generate."""
        return self.request.work == "choose" and self.request.all_answers is not None

    @property
    def budgeted(self) -> bool:
        """It has a deadline."""
        return self.request.deadline_ns is not None or self.request.ttft_deadline_ns is not None


@dataclass(slots=True)
class Rows:
    """Logits of consecutive positions of one sequence; the row of position `p` predicts token `p + 1`.

    Views of the executor's buffers: what must outlive the step is copied.
    """

    first: int
    logits: F32  # [rows, vocab]
    argmax: I32  # [rows]
    drawn: I32 | None = None  # [rows] tokens that the executor drew, -1: none
    _normalizers: dict[int, float] = field(default_factory=dict)

    def drawn_at(self, index: int) -> int:
        """What the executor drew of a row; -1: nothing, look at the logits."""
        return -1 if self.drawn is None else int(self.drawn[index])

    def normalizer(self, position: int) -> float:
        """log(sum(exp(logits))) of a position's row, computed once for all that ask."""
        if position not in self._normalizers:
            self._normalizers[position] = log_normalizer(self.logits[position - self.first])
        return self._normalizers[position]

    def __iter__(self) -> Iterator[tuple[int, F32]]:
        """(position, logits [vocab]) of every row."""
        for index in range(self.logits.shape[0]):
            yield self.first + index, self.logits[index]


@dataclass(slots=True)
class Progress:
    """What a sequence did with its logits."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    detail: FinishDetail | None = None
    """Set when the sequence ended."""


class Sequence:
    """What all kinds have in common. Used as it is, it only fills KV (`prefill`)."""

    def __init__(self, job: Job, tokens: list[int], *, sample: int = 0) -> None:
        self.job = job
        self.sample = sample
        self.key = -1  # set when the engine takes it in
        self.tokens = tokens
        self.prompt_length = len(tokens)
        self.state: PagedState | None = None
        self.names: PrefixNames | None = None
        self.origin = Origin()
        self.point = job.point
        self.last_served_ns = job.arrival_ns
        self.first_token_ns: int | None = None
        self.schedule: list[ScheduleEntry] = []
        self.rows_from: int | None = NO_ROWS
        """Logits are wanted for every position from here on; None: for the last one before `target`."""
        self.hidden_from = NO_ROWS
        """Final hidden states are wanted for every position from here on."""
        self.draft: list[int] = []
        """Tokens that may follow `tokens`, computed with them in the next step. Provisional: K and V of those that do
        not stand are cut off again (engine/speculate)."""
        self.drafted = 0
        self.accepted = 0
        self.step_kls: list[float] = []
        """What the monitor found, nats."""

    @property
    def kv(self) -> PagedState:
        """The KV of a sequence that is being computed. Raises `EngineError` if it has none."""
        if self.state is None:
            raise EngineError("a sequence without KV cannot be computed")
        return self.state

    @property
    def leaves_kv(self) -> bool:
        """True for the sequence whose KV a session keeps."""
        return self.sample == 0

    @property
    def publishes(self) -> bool:
        """True if others may start from its full blocks."""
        return True

    @property
    def length(self) -> int:
        """Tokens in KV."""
        return 0 if self.state is None else self.state.length

    @property
    def target(self) -> int:
        """Tokens that must be in KV before the sequence can go on."""
        return len(self.tokens)

    def cut(self, tokens: int) -> None:
        """Take back room for `tokens` tokens that were not computed after all; a draft among them is forgotten."""
        self.draft = []
        if self.state is not None:
            self.state.truncate(self.state.length - tokens)

    @property
    def produced(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def argmax_suffices(self) -> bool:
        """True if the rows of the next step are read for nothing but their argmax."""
        return False

    def drawings(self, rows: int) -> list[Drawing | None]:
        """How each of the next step's `rows` last rows is drawn, where nothing else of them is read; else None."""
        return [None] * rows

    def branches(self) -> list[Sequence]:
        """New sequences with the same past that begin here; they consume the same rows. Asked for before `consume`."""
        return []

    def consume(self, rows: Rows | None) -> Progress:
        """Take the rows of a step that was just computed (None: there were none for this sequence)."""
        return Progress(detail="done" if self.length >= self.target else None)

    def see(self, first: int, hidden: F32) -> None:
        """Take final hidden states [rows, hidden] of the positions from `first` on. Called before `consume`."""

    def close_early(self) -> Progress | None:
        """End with what there is because time is up; None if there is nothing worth having."""
        return None

    def hasten(self, tokens: int) -> None:
        """There is time for about so many tokens of the answer: look for its end."""

    def reused(self) -> None:
        """Note in the schedule what its KV was computed at, where that is not the point of the request."""
        for point, tokens in self.origin:
            if point != self.job.point:
                self.schedule.append(ScheduleEntry(point, 0, tokens))

    def account(self, point: str, tokens: int) -> None:
        """Note one step at `point`, which computed the last `tokens` of the KV."""
        self.point = point
        self.origin.cut(self.length - tokens)
        self.origin.add(point, tokens)
        if self.schedule and self.schedule[-1].point == point:
            self.schedule[-1].steps += 1
            self.schedule[-1].tokens += tokens
        else:
            self.schedule.append(ScheduleEntry(point, 1, tokens))


class Reading(Sequence):
    """Every row of logits of the given tokens, float32 [tokens, vocab]."""

    def __init__(self, job: Job, tokens: list[int]) -> None:
        super().__init__(job, tokens)
        self.rows_from = 0
        self.logits = np.empty((len(tokens), job.vocab_size), dtype=np.float32)

    def consume(self, rows: Rows | None) -> Progress:
        if rows is not None:
            end = rows.first + rows.logits.shape[0]
            self.logits[rows.first : end] = rows.logits
            self.rows_from = end
        return super().consume(rows)


class Embedding(Sequence):
    """The mean of the final hidden states of the given tokens, float32 [hidden].

    They are added up in float64, position after position, so that the bits do not depend on how the prefill was cut.
    """

    def __init__(self, job: Job, tokens: list[int]) -> None:
        super().__init__(job, tokens)
        self.hidden_from = 0
        self._sum: F64 | None = None

    @property
    def publishes(self) -> bool:
        return False  # every position is computed, so nothing is found in the cache; what others begin with stays there

    @property
    def mean(self) -> F32 | None:
        """The mean over the positions seen, None before there are any."""
        return None if self._sum is None else (self._sum / self.hidden_from).astype(np.float32)

    def see(self, first: int, hidden: F32) -> None:
        if self._sum is None:
            self._sum = np.zeros(hidden.shape[1])
        for row in hidden[self.hidden_from - first :]:
            self._sum += row
        self.hidden_from = first + hidden.shape[0]
