"""A choice among options: its prompt, computed once, and the options that branch off and are scored.

Knows sequences and rows of logits; nothing of batches or of how scores are compared.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from haomiao.engine.logprobs import any_logprob
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


def option_tokens(job: Job) -> list[int]:
    """Tokens to compute for each option of a choice: the last one only where the end that follows is scored too."""
    return [len(option) - (not job.eos_ids) for option in job.request.options]
