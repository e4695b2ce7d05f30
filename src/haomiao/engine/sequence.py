"""Live sequences: what each kind of work wants computed, and what it does with the logits that come back.

A sequence has tokens, and KV for the first of them. The engine computes more until `target` tokens are in KV, takes new
sequences in from `branches`, hands the wanted rows of logits to `consume`, and learns what became of each sequence.
Knows nothing about batches, blocks or the order in which sequences are served.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np

from haomiao.engine import masks
from haomiao.engine.logprobs import any_logprob, log_normalizer, log_softmax_at
from haomiao.engine.origin import Origin
from haomiao.engine.prefix import PrefixNames
from haomiao.engine.request import EngineRequest, FinishDetail
from haomiao.engine.sampler import Sampler
from haomiao.engine.state import PagedState
from haomiao.errors import ConstraintError, EngineError
from haomiao.types import F32, I32, U32, ScheduleEntry, StopMatcher, TokenConstraint, TokenLogprob

NO_ROWS = 1 << 62
"""A position that is never reached."""
SENTENCE_TOKENS = 24
"""Tokens that are looked at to see whether a sentence ended."""


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

    @property
    def point(self) -> str:
        """The most accurate point it may run at: its own."""
        return self.points[0]

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
    _normalizers: dict[int, float] = field(default_factory=dict)

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

    def branches(self) -> list[Sequence]:
        """New sequences with the same past that begin here; they consume the same rows. Asked for before `consume`."""
        return []

    def consume(self, rows: Rows | None) -> Progress:
        """Take the rows of a step that was just computed (None: there were none for this sequence)."""
        return Progress(detail="done" if self.length >= self.target else None)

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


class ChoicePrompt(Sequence):
    """The prompt of a choice: computed once, then every option branches off."""

    def __init__(self, job: Job, tokens: list[int]) -> None:
        super().__init__(job, tokens)
        self.rows_from = None

    @property
    def option_tokens(self) -> list[int]:
        """Tokens to compute for each option."""
        return option_tokens(self.job)

    def branches(self) -> list[Sequence]:
        if self.length < self.target:
            return []
        self.job.scores = [0.0] * len(self.job.request.options)
        return [Option(self.job, self.tokens, option, index) for index, option in enumerate(self.job.request.options)]


class Option(Sequence):
    """One option of a choice: its tokens are known; their log-probabilities are summed, that of the end included."""

    def __init__(self, job: Job, prompt: list[int], option: SequenceOf[int], index: int) -> None:
        super().__init__(job, [*prompt, *option], sample=index)
        self.prompt_length = len(prompt)
        self.rows_from = self.prompt_length
        self._scored = self.prompt_length  # tokens before this one have their score

    @property
    def leaves_kv(self) -> bool:
        return False

    @property
    def publishes(self) -> bool:
        return False  # nobody begins with a rejected option, and names cost time

    @property
    def target(self) -> int:
        return len(self.tokens) if self.job.eos_ids else len(self.tokens) - 1

    def score(self, rows: Rows) -> None:
        """Take rows into account; those that were taken already change nothing."""
        scores = self.job.scores
        for position, logits in rows:
            if position + 1 < self._scored:
                continue
            normalizer = rows.normalizer(position)
            if position + 1 < len(self.tokens):
                scores[self.sample] += float(logits[self.tokens[position + 1]]) - normalizer
            else:
                scores[self.sample] += any_logprob(logits, self.job.eos_ids, normalizer)
            self._scored = position + 2
        self.rows_from = max(self.prompt_length, self._scored - 1)

    def consume(self, rows: Rows | None) -> Progress:
        if rows is not None:
            self.score(rows)
        if self.length < self.target:
            return Progress()
        if self.job.request.normalize:
            self.job.scores[self.sample] /= self.target + 1 - self.prompt_length
        return Progress(detail="done")


class Generation(Sequence):
    """One sample of an answer."""

    def __init__(self, job: Job, tokens: list[int]) -> None:
        super().__init__(job, tokens)
        request = job.request
        params = request.sampling
        self._end_details: dict[int, FinishDetail] = dict.fromkeys(params.stop_token_ids, "stop_token")
        if not params.ignore_eos:
            self._end_details |= dict.fromkeys(job.eos_ids, "eos")
        self._sampler = Sampler(
            params, vocab_size=job.vocab_size, seed=job.seed, prompt_ids=tokens, end_ids=self._end_details
        )
        self._constraint: TokenConstraint | None = request.constraint.fork() if request.constraint else None
        self._mask: U32 | None = None  # what may come next, once it was asked for
        self._stop: StopMatcher | None = request.stop() if request.stop else None
        self._unforked = params.n - 1
        self._left: int | None = None  # tokens that there is time for, once that is short
        self.prompt_logprobs: list[TokenLogprob] = []
        self.rows_from = 0 if request.prompt_logprobs is not None and self.prompt_length > 1 else None

    @property
    def samples(self) -> int:
        """Samples that this sequence stands for: those that branch off later included."""
        return 1 + self._unforked

    def hasten(self, tokens: int) -> None:
        self._left = tokens

    @property
    def argmax_suffices(self) -> bool:
        if self._left is not None and self._left <= 1 + len(self.draft):
            return False  # the last token is chosen among those that end a sentence
        return self.rows_from is None and self._constraint is None and self._sampler.argmax_suffices(self.produced)

    def branches(self) -> list[Sequence]:
        if self.length < self.target:
            return []
        count, self._unforked = self._unforked, 0
        return [self._fork(index) for index in range(1, count + 1)]

    def consume(self, rows: Rows | None) -> Progress:
        if rows is not None and self.rows_from is not None:
            self._score_prompt(rows)
        if rows is None or self.length < self.target:
            return Progress()
        return self._verify(rows) if self.draft else self.advance(rows.logits[-1], int(rows.argmax[-1]))

    def close_early(self) -> Progress | None:
        """End now. What a grammar needs to be whole is added: those tokens cost no step."""
        if not self.produced:
            return None
        progress = Progress()
        if self._constraint is not None and not self._constraint.is_complete():
            closing = list(self._constraint.tokens_to_close())
            if len(closing) <= self.job.request.sampling.max_tokens - self.produced:
                for token_id in closing:
                    if progress.detail is None:
                        self._take(token_id, None, progress)
        if progress.detail is None:
            self._finish("budget_exhausted", progress)
        progress.detail = "budget_exhausted"
        return progress

    def _score_prompt(self, rows: Rows) -> None:
        """Log-probabilities of the prompt's own tokens, from the second on."""
        wanted = self.job.request.prompt_logprobs or 0
        for position, logits in rows:
            if position + 1 < self.prompt_length and position == len(self.prompt_logprobs):
                self.prompt_logprobs.append(log_softmax_at(logits, self.tokens[position + 1], wanted))
        done = len(self.prompt_logprobs)
        self.rows_from = done if done + 1 < self.prompt_length else None

    @property
    def may_speculate(self) -> bool:
        """True if tokens may be drafted: every row of logits that it still wants serves to choose a token."""
        return self.produced > 0 and self.rows_from is None and not self._unforked

    def shadow(self) -> Generation:
        """A copy that would choose the same tokens from the same logits; it makes no text and holds no KV."""
        return self._fork(self.sample, text=False)

    def _fork(self, sample: int, *, text: bool = True) -> Generation:
        twin = object.__new__(Generation)
        Sequence.__init__(twin, self.job, list(self.tokens), sample=sample)
        twin.rows_from = None
        twin.prompt_length = self.prompt_length
        twin._end_details = self._end_details
        twin._sampler = self._sampler.fork(sample)
        twin._constraint = self._constraint.fork() if self._constraint else None
        twin._mask = None
        twin._stop = self.job.request.stop() if text and self.job.request.stop else None
        twin._unforked = 0
        twin._left = None
        twin.prompt_logprobs = self.prompt_logprobs
        return twin

    def _verify(self, rows: Rows) -> Progress:
        """Choose tokens from the rows of a step that computed a draft, as long as the draft is what is chosen. A token
        is chosen as it would be without a draft, so nothing but the number of steps depends on it. K and V of drafted
        tokens that do not stand are cut off."""
        draft, self.draft = self.draft, []
        before, first = len(self.tokens), rows.logits.shape[0] - len(draft) - 1
        progress = Progress()
        stood = 0
        while progress.detail is None and stood == len(self.tokens) - before:
            self._choose(rows.logits[first + stood], int(rows.argmax[first + stood]), progress)
            for drafted, token_id in zip(draft[stood:], self.tokens[before + stood :], strict=False):
                if drafted != token_id:
                    break
                stood += 1
        self.cut(self.length - before - stood)
        self.drafted += len(draft)
        self.accepted += stood
        self.schedule[-1].tokens += stood - len(draft)
        return progress

    def advance(self, logits: F32, argmax: int) -> Progress:
        """Choose the next token."""
        progress = Progress()
        self._choose(logits, argmax, progress)
        return progress

    def _choose(self, logits: F32, argmax: int, progress: Progress) -> None:
        """Choose the next token; take what the grammar forces after it along, since that needs no logits."""
        before = self.produced
        mask = self._last_words() if self._constraint is None else self._allowed()
        token_id, logprob = self._sampler.choose(
            logits, argmax, position=len(self.tokens), produced=self.produced, mask=mask
        )
        self._take(token_id, logprob, progress)
        while progress.detail is None and self.job.request.sampling.logprobs is None:
            mask = self._allowed()
            forced = None if mask is None else masks.only_token(mask)
            if forced is None:
                break
            self._take(forced, None, progress)
        if self._left is not None and progress.detail is None:
            self._end_sentence(self.produced - before, progress)

    def _last_words(self) -> U32 | None:
        """What may come next if there is time for one token more and nothing has ended yet: the end of a sentence."""
        close = self.job.request.close
        if close is None or self._left is None or self._left > 1:
            return None
        ends = () if self.job.request.sampling.ignore_eos else self.job.eos_ids
        mask = masks.with_tokens(close.mask(), ends, True, self.job.vocab_size)
        return None if masks.is_empty(mask) else mask

    def _end_sentence(self, taken: int, progress: Progress) -> None:
        """`taken` tokens fewer are left: end where a sentence does, or where time does."""
        self._left = (self._left or 1) - taken
        close = self.job.request.close if self._constraint is None else None
        said = self.tokens[max(self.prompt_length, len(self.tokens) - SENTENCE_TOKENS) :]
        if (close is not None and close.is_complete(said)) or (self._left <= 0 and self._constraint is None):
            self._finish("budget_exhausted", progress)

    def _allowed(self) -> U32 | None:
        """What the grammar allows next, the end-of-sequence tokens where it may end; None without a grammar."""
        if self._constraint is None:
            return None
        if self._mask is None:
            may_end = self._constraint.is_complete() and not self.job.request.sampling.ignore_eos
            self._mask = masks.with_tokens(self._constraint.mask(), self.job.eos_ids, may_end, self.job.vocab_size)
            if masks.is_empty(self._mask):
                raise ConstraintError("the grammar allows no token here that the model knows")
        return self._mask

    def _take(self, token_id: int, logprob: TokenLogprob | None, progress: Progress) -> None:
        """Add a token to the answer and see whether it ends it."""
        end = self._end_details.get(token_id)
        if end is None and self._constraint is not None:
            if not self._constraint.accept(token_id):
                raise ConstraintError(f"the grammar refused token {token_id}")
            self._mask = None
        self._sampler.record(token_id)
        self.tokens.append(token_id)
        progress.token_ids.append(token_id)
        if logprob is not None:
            progress.logprobs.append(logprob)
        if end is not None:
            self._finish(end, progress)
            return
        if self._stop is not None:
            progress.text += self._stop.push(token_id)
            if self._stop.stopped is not None:
                progress.detail = "stop_string"
                return
        if self._constraint is not None and self._must_end():
            self._finish("constraint_complete", progress)
        elif self.produced >= self.job.request.sampling.max_tokens:
            self._finish("max_tokens", progress)

    def _must_end(self) -> bool:
        """True if the grammar is complete and nothing but the end may follow."""
        if self._constraint is None or not self._constraint.is_complete():
            return False
        following = masks.with_tokens(self._constraint.mask(), self.job.eos_ids, False, self.job.vocab_size)
        if not masks.is_empty(following):
            ends = () if self.job.request.sampling.ignore_eos else self.job.eos_ids
            self._mask = masks.with_tokens(following, ends, True, self.job.vocab_size)
            return False
        return True

    def _finish(self, detail: FinishDetail, progress: Progress) -> None:
        if self._stop is not None:
            progress.text += self._stop.flush()
        progress.detail = detail


def option_tokens(job: Job) -> list[int]:
    """Tokens to compute for each option of a choice: the last one only where the end that follows is scored too."""
    return [len(option) - (not job.eos_ids) for option in job.request.options]


def open_sequence(job: Job) -> Sequence:
    """The sequence with which a request begins."""
    tokens = list(job.request.prompt_ids)
    match job.request.work:
        case "generate":
            return Generation(job, tokens)
        case "prefill":
            return Sequence(job, tokens)
        case "choose":
            return ChoicePrompt(job, tokens)
        case "logits":
            return Reading(job, tokens)
