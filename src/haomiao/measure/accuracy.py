"""How wrong a model or an operating point is: perplexity of a text, KL divergence and top-1 agreement of two points.

Works on functions from token ids to logits, so that any executor, or another engine, can be measured. A text is cut
into windows of `window` tokens that do not overlap; every token of a window but its first is predicted from those
before it. Intervals come from a bootstrap over windows, because neighbouring tokens are not independent. Knows nothing
about files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from haomiao.errors import InputError
from haomiao.metrics.divergence import kl_divergence, negative_log_likelihood, perplexity, top1_agreement
from haomiao.metrics.statistics import Interval, bootstrap_mean
from haomiao.types import F32

LogitsFunction = Callable[[Sequence[int]], F32]
"""Token ids [tokens] -> logits float32 [tokens, vocab]; row i predicts token i + 1."""

Progress = Callable[[int, int], None]
"""Called after each window with (tokens done, tokens in all)."""


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """Mean negative log-likelihood in nats per predicted token, with its interval, and the perplexity of the same."""

    nll: Interval
    tokens: int
    window: int

    @property
    def perplexity(self) -> Interval:
        """`exp` of the mean and of the interval's ends."""
        nll = self.nll
        return Interval(
            perplexity(nll.estimate), perplexity(nll.low), perplexity(nll.high), nll.samples, nll.confidence
        )

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return {
            "nll": self.nll.as_dict(),
            "perplexity": self.perplexity.as_dict(),
            "tokens": self.tokens,
            "window": self.window,
        }


@dataclass(frozen=True, slots=True)
class AgreementResult:
    """How a candidate differs from a reference on the same tokens."""

    kl: Interval
    """Mean KL(reference || candidate), nats per token."""
    top1: Interval
    """Share of positions at which both choose the same token."""
    reference: PerplexityResult
    candidate: PerplexityResult
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return {
            "kl": self.kl.as_dict(),
            "top1": self.top1.as_dict(),
            "reference": self.reference.as_dict(),
            "candidate": self.candidate.as_dict(),
            "tokens": self.tokens,
        }


def measure_perplexity(
    logits: LogitsFunction, token_ids: Sequence[int], *, window: int = 512, progress: Progress | None = None
) -> PerplexityResult:
    """Perplexity of `token_ids`. Raises `InputError` if fewer than two tokens are given or logits are not finite."""
    means: list[float] = []
    sizes: list[float] = []
    done = 0
    for ids in _windows(token_ids, window):
        nll = negative_log_likelihood(_checked(logits, ids)[:-1], ids[1:])
        means.append(float(nll.mean()))
        sizes.append(float(nll.size))
        done += len(ids)
        if progress:
            progress(done, len(token_ids))
    return PerplexityResult(bootstrap_mean(means, sizes), int(sum(sizes)), window)


def measure_agreement(
    reference: LogitsFunction,
    candidate: LogitsFunction,
    token_ids: Sequence[int],
    *,
    window: int = 512,
    progress: Progress | None = None,
) -> AgreementResult:
    """KL divergence and top-1 agreement at the predicted positions of `token_ids`, and both perplexities.

    The last row of a window is left out: it predicts a token that the window does not hold, so that all figures are
    over the same positions. Raises as `measure_perplexity`.
    """
    rows: list[tuple[float, float, float, float, float]] = []
    done = 0
    for ids in _windows(token_ids, window):
        p = _checked(reference, ids)[:-1].copy()  # logits may be a view that the next call overwrites
        q = _checked(candidate, ids)[:-1]
        if p.shape != q.shape:
            raise InputError(f"the two models have different vocabularies: {p.shape[1]} and {q.shape[1]} tokens")
        rows.append(
            (
                float(kl_divergence(p, q).mean()),
                float(top1_agreement(p, q).mean()),
                float(negative_log_likelihood(p, ids[1:]).mean()),
                float(negative_log_likelihood(q, ids[1:]).mean()),
                float(p.shape[0]),
            )
        )
        done += len(ids)
        if progress:
            progress(done, len(token_ids))
    kl, top1, nll_p, nll_q, sizes = np.array(rows).T
    tokens = int(sizes.sum())
    return AgreementResult(
        kl=bootstrap_mean(kl, sizes),
        top1=bootstrap_mean(top1, sizes),
        reference=PerplexityResult(bootstrap_mean(nll_p, sizes), tokens, window),
        candidate=PerplexityResult(bootstrap_mean(nll_q, sizes), tokens, window),
        tokens=tokens,
    )


def _windows(token_ids: Sequence[int], window: int) -> Iterator[list[int]]:
    """Windows of `window` tokens; a rest of one token predicts nothing and is left out."""
    if window < 2:
        raise InputError(f"a window needs at least 2 tokens, not {window}", param="window")
    if len(token_ids) < 2:
        raise InputError(f"at least 2 tokens are needed to measure a text, not {len(token_ids)}", param="text")
    for start in range(0, len(token_ids) - 1, window):
        yield list(token_ids[start : start + window])


def _checked(logits: LogitsFunction, ids: list[int]) -> npt.NDArray[np.float32]:
    rows = logits(ids)
    if rows.shape[0] != len(ids):
        raise InputError(f"{rows.shape[0]} rows of logits for {len(ids)} tokens")
    if not np.isfinite(rows).all():
        raise InputError("the model computes logits that are not finite")
    return rows
