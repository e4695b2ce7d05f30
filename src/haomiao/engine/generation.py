"""One sample of an answer: how its tokens are chosen, what ends it, and what of a draft stands.

Knows sampling, grammars and stop strings through their protocols; nothing of batches and blocks, and of time only the
number of tokens that it is told are left.
"""

from __future__ import annotations

from haomiao.engine import masks
from haomiao.engine.draw import Drawing
from haomiao.engine.logprobs import log_softmax_at
from haomiao.engine.request import FinishDetail
from haomiao.engine.sampler import Sampler
from haomiao.engine.sequence import Job, Progress, Rows, Sequence
from haomiao.errors import ConstraintError
from haomiao.types import F32, U32, StopMatcher, TokenConstraint, TokenLogprob

SENTENCE_TOKENS = 24
"""Tokens that are looked at to see whether a sentence ended."""


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
        return self._only_chosen and self._sampler.argmax_suffices(self.produced)

    def drawings(self, rows: int) -> list[Drawing | None]:
        if not self._only_chosen or self._unforked:  # each sample draws for itself
            return [None] * rows
        return [
            self._sampler.drawing(self.produced + index, len(self.tokens) + index)  # the row of the token before it
            for index in range(rows)
        ]

    @property
    def _only_chosen(self) -> bool:
        """True if rows of the next step serve to choose tokens only, from all there are."""
        if self._left is not None and self._left <= 1 + len(self.draft):
            return False  # the last token is chosen among those that end a sentence
        return self.rows_from is None and self._constraint is None

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
        return (
            self._verify(rows) if self.draft else self.advance(rows.logits[-1], int(rows.argmax[-1]), rows.drawn_at(-1))
        )

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
            at = first + stood
            self._choose(rows.logits[at], int(rows.argmax[at]), rows.drawn_at(at), progress)
            for drafted, token_id in zip(draft[stood:], self.tokens[before + stood :], strict=False):
                if drafted != token_id:
                    break
                stood += 1
        self.cut(self.length - before - stood)
        self.drafted += len(draft)
        self.accepted += stood
        self.schedule[-1].tokens += stood - len(draft)
        return progress

    def advance(self, logits: F32, argmax: int, drawn: int = -1) -> Progress:
        """Choose the next token. `drawn` is what the executor drew by `drawings`, -1: nothing."""
        progress = Progress()
        self._choose(logits, argmax, drawn, progress)
        return progress

    def _choose(self, logits: F32, argmax: int, drawn: int, progress: Progress) -> None:
        """Choose the next token; take what the grammar forces after it along, since that needs no logits."""
        before = self.produced
        mask = self._last_words() if self._constraint is None else self._allowed()
        token_id, logprob = self._sampler.choose(
            logits, argmax, position=len(self.tokens), produced=self.produced, mask=mask, drawn=drawn
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
