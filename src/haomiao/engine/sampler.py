"""How the next token is chosen from a row of logits.

The order is: penalties, bias, tokens that are not allowed; then greedy, or temperature, top-k, top-p, min-p and a draw.
Penalties are those of transformers and vLLM: repetition (Keskar et al., "CTRL", 2019, section 4.1) over prompt and
output, presence and frequency (as OpenAI's API states them) over the output. top-p is that of Holtzman et al. 2020,
min-p of Nguyen et al. 2024. Same logits, parameters and position: same token, whatever the company.
Knows nothing about text, grammars or requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from haomiao.engine import masks
from haomiao.engine.draw import Drawing, Filters, draw
from haomiao.engine.logprobs import log_softmax_at
from haomiao.engine.random import uniform
from haomiao.engine.validate import validate as validate
from haomiao.errors import EngineError
from haomiao.types import F32, U32, SamplingParams, TokenLogprob

LEAST_TEMPERATURE = 1e-6
"""What is less counts as this, so that nothing overflows."""


class Sampler:
    """Chooses the tokens of one sample of one request, and remembers what its penalties count."""

    def __init__(
        self,
        params: SamplingParams,
        *,
        vocab_size: int,
        seed: int,
        sample: int = 0,
        prompt_ids: Sequence[int] = (),
        end_ids: Iterable[int] = (),
    ) -> None:
        """`end_ids` are not chosen before `min_tokens` are out. `params` must have passed `validate`."""
        self.params = params
        self.vocab_size = vocab_size
        self.seed = seed
        self.sample = sample
        self.end_ids = tuple(end_ids)
        self._bias_ids = np.fromiter(params.logit_bias.keys(), dtype=np.int64, count=len(params.logit_bias))
        self._bias = np.fromiter(params.logit_bias.values(), dtype=np.float32, count=len(params.logit_bias))
        self._repetition = params.repetition_penalty != 1.0
        self._counting = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self._seen: npt.NDArray[np.bool_] | None = None  # [vocab] in prompt or output
        self._counts: dict[int, int] = {}  # output tokens
        if self._repetition:
            self._seen = np.zeros(vocab_size, dtype=np.bool_)
            self._seen[np.asarray(prompt_ids, dtype=np.int64)] = True
        self._changes_logits = self._repetition or self._counting or bool(params.logit_bias)

    def fork(self, sample: int) -> Sampler:
        """A sampler at the same place for another sample of the request."""
        twin = Sampler(self.params, vocab_size=self.vocab_size, seed=self.seed, sample=sample, end_ids=self.end_ids)
        twin._seen = None if self._seen is None else self._seen.copy()
        twin._counts = dict(self._counts)
        return twin

    def record(self, token_id: int) -> None:
        """Count a token of the output, chosen or forced."""
        if self._seen is not None:
            self._seen[token_id] = True
        if self._counting:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1

    @property
    def _plain(self) -> bool:
        return self.params.temperature == 0.0 and not self._changes_logits and self.params.logprobs is None

    def argmax_suffices(self, produced: int) -> bool:
        """True if `choose` after `produced` tokens, without a mask, will not look at the logits."""
        return self._plain and not (produced < self.params.min_tokens and self.end_ids)

    def drawing(self, produced: int, position: int) -> Drawing | None:
        """How a row is drawn of which `choose` after `produced` tokens, without a mask, reads nothing else; None if it
        reads more, or does not draw."""
        params = self.params
        if params.temperature == 0.0 or self._changes_logits or params.logprobs is not None:
            return None
        if produced < params.min_tokens and self.end_ids:
            return None
        top_k = params.top_k if params.top_k < self.vocab_size else 0
        temperature = max(params.temperature, LEAST_TEMPERATURE)
        return Drawing(temperature, top_k, params.top_p, params.min_p, self.seed, position, self.sample)

    def choose(
        self, logits: F32, argmax: int, *, position: int, produced: int, mask: U32 | None = None, drawn: int = -1
    ) -> tuple[int, TokenLogprob | None]:
        """The next token and, if asked for, its log-probability.

        `logits` is float32 [vocab] and is not changed; `argmax` is the executor's. `position` is the absolute position
        of the token that is chosen, `produced` how many were before it. `drawn` is what the executor drew by `drawing`,
        -1: nothing. Raises `EngineError` for logits that are not finite, or if nothing is allowed.
        """
        if drawn >= 0:
            return drawn, None
        withheld = self.end_ids if produced < self.params.min_tokens else ()
        greedy = self.params.temperature == 0.0
        if self._plain and argmax not in withheld and (mask is None or masks.contains(mask, argmax)):
            return argmax, None
        row = self._allowed(self._changed(logits), withheld, mask)
        best = int(row.argmax())  # the first of the greatest; a NaN counts as the greatest
        peak = float(row[best])
        if not math.isfinite(peak):
            if peak == -math.inf and np.isfinite(logits).all():
                raise EngineError("no token is allowed here")
            raise EngineError("the model computed logits that are not finite")
        token = best if greedy else self._draw(row, peak, position)
        if self.params.logprobs is None:
            return token, None
        return token, log_softmax_at(row, token, self.params.logprobs)

    def _changed(self, logits: F32) -> F32:
        """A copy with penalties and bias; the row itself if there are none."""
        if not self._changes_logits:
            return logits
        row = logits.copy()
        if self._seen is not None:
            seen = np.flatnonzero(self._seen)
            values = row[seen]
            penalty = np.float32(self.params.repetition_penalty)
            row[seen] = np.where(values > 0, values / penalty, values * penalty)
        if self._counts:
            ids = np.fromiter(self._counts.keys(), dtype=np.int64, count=len(self._counts))
            counts = np.fromiter(self._counts.values(), dtype=np.float32, count=len(self._counts))
            row[ids] -= np.float32(self.params.frequency_penalty) * counts + np.float32(self.params.presence_penalty)
        if self._bias_ids.shape[0]:
            row[self._bias_ids] += self._bias
        return row

    def _allowed(self, row: F32, withheld: Sequence[int], mask: U32 | None) -> F32:
        """A copy in which what is not allowed is -inf; the row itself if everything is allowed."""
        if mask is not None:
            row = np.where(masks.to_bool(mask, row.shape[0]), row, np.float32(-np.inf))
        if withheld:
            open_row = row if mask is not None else row.copy()
            kept = open_row[list(withheld)]
            open_row[list(withheld)] = -np.inf
            if mask is not None and not np.isfinite(open_row.max()):
                open_row[list(withheld)] = kept  # the grammar leaves nothing but the end, and the grammar is stronger
            return open_row
        return row

    def _draw(self, row: F32, peak: float, position: int) -> int:
        """Temperature, top-k, top-p, min-p, then the inverse of the cumulative distribution."""
        params = self.params
        scaled = (row - np.float32(peak)) / np.float32(max(params.temperature, LEAST_TEMPERATURE))
        filters = Filters(params.top_k, params.top_p, params.min_p)
        return draw(scaled, filters, uniform(self.seed, position, self.sample))
