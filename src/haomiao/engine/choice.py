"""A choice among options: its prompt, computed once, and the options that branch off and are scored.

An answer of a grammar that allows few may be chosen so when there is no time to generate it: its likeliest option is
then told as its text. Knows sequences and rows of logits; nothing of batches and budgets.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from haomiao.engine.logprobs import any_logprob
from haomiao.engine.request import EngineRequest
from haomiao.engine.sequence import Job, Progress, Rows, Sequence


class ChoicePrompt(Sequence):
    """The prompt of a choice: computed once, then every option branches off."""

    def __init__(self, job: Job, tokens: list[int]) -> None:
        super().__init__(job, tokens)
        self.rows_from = None

    @property
    def option_tokens(self) -> list[int]:
        """Tokens to compute for each option."""
        return option_tokens(self.job)

    @property
    def decides(self) -> bool:
        """The row of logits that ends the prompt decides: every option is one token, and no end is scored."""
        return not any(self.option_tokens)

    def branches(self) -> list[Sequence]:
        if self.length < self.target or self.decides:
            return []
        self.job.scores = [0.0] * len(self.job.request.options)
        return [Option(self.job, self.tokens, option, index) for index, option in enumerate(self.job.request.options)]

    def consume(self, rows: Rows | None) -> Progress:
        if self.length < self.target:
            return Progress()
        if rows is not None and self.decides:
            *_, (position, logits) = rows
            normalizer = rows.normalizer(position)
            self.job.scores = [float(logits[token]) - normalizer for (token,) in self.job.request.options]
        return _ending(self.job)


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
        return _ending(self.job)


def _ending(job: Job) -> Progress:
    """The end of one of the job's sequences; that of the last one brings the answer that was chosen."""
    if not job.single_prefill or job.open > 1:
        return Progress(detail="done")
    answer = list(job.request.options[max(range(len(job.scores)), key=job.scores.__getitem__)])
    matcher = job.request.stop() if job.request.stop else None
    text = "" if matcher is None else "".join(map(matcher.push, answer)) + matcher.flush()
    return Progress(answer, text, detail="single_prefill")


def ways(request: EngineRequest) -> Iterator[EngineRequest]:
    """How a request may be answered, in the order in which that is tried: as it asks, then, if its budget may be
    degraded, by choosing among all its answers. What a choice cannot give (several samples, log-probabilities, an
    answer cut by a stop or bent by biases) is never chosen."""
    yield request
    params = request.sampling
    bent = params.stop or params.stop_token_ids or params.logit_bias or params.ignore_eos
    more = params.n > 1 or params.logprobs is not None or request.prompt_logprobs is not None
    budgeted = request.deadline_ns is not None or request.ttft_deadline_ns is not None
    if request.work != "generate" or request.all_answers is None or bent or more:
        return
    if request.on_budget == "degrade" and budgeted:
        options = tuple(tuple(answer) for answer in request.all_answers())
        if options and max(map(len, options)) <= params.max_tokens:
            yield replace(request, work="choose", options=options)


def option_tokens(job: Job) -> list[int]:
    """Tokens to compute for each option of a choice: the last one only where the end that follows is scored too."""
    return [len(option) - (not job.eos_ids) for option in job.request.options]
