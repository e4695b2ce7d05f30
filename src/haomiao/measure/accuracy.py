"""How wrong a model or an operating point is: perplexity of a text, KL divergence and top-1 agreement, task accuracy.

Works on functions from token ids to logits, so that any executor, or another engine, can be measured. A text is cut
into windows of `window` tokens that do not overlap; every token of a window but its first is predicted from those
before it. Intervals come from a bootstrap over windows, because neighbouring tokens are not independent. Knows nothing
about files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from haomiao.errors import InputError
from haomiao.metrics.divergence import log_softmax, negative_log_likelihood, perplexity, top1_agreement
from haomiao.metrics.statistics import Interval, bootstrap_mean, percentile
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
    kl_median: float
    kl_p99: float
    """Over single tokens: half of them, and all but one in a hundred, diverge less."""
    top1: Interval
    """Share of positions at which both choose the same token."""
    reference: PerplexityResult
    candidate: PerplexityResult
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return {
            "kl": self.kl.as_dict(),
            "kl_median": self.kl_median,
            "kl_p99": self.kl_p99,
            "top1": self.top1.as_dict(),
            "reference": self.reference.as_dict(),
            "candidate": self.candidate.as_dict(),
            "tokens": self.tokens,
        }


COMPARED_ROWS = 32


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
    return measure_against(reference, {"": candidate}, token_ids, window=window, progress=progress)[""]


def measure_against(
    reference: LogitsFunction,
    candidates: Mapping[str, LogitsFunction],
    token_ids: Sequence[int],
    *,
    window: int = 512,
    progress: Progress | None = None,
) -> dict[str, AgreementResult]:
    """`measure_agreement` of several candidates, by name; the reference is run once for all."""
    rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in candidates}
    divergences: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in candidates}
    done = 0
    for ids in _windows(token_ids, window):
        p = _checked(reference, ids)[:-1].copy()  # logits may be a view that the next call overwrites
        for name, candidate in candidates.items():
            q = _checked(candidate, ids)[:-1]
            if p.shape != q.shape:
                raise InputError(f"the two models have different vocabularies: {p.shape[1]} and {q.shape[1]} tokens")
            kl, nll_p, nll_q = _compare(p, q, ids[1:])
            divergences[name].append(kl)
            means = (kl.mean(), top1_agreement(p, q).mean(), nll_p.mean(), nll_q.mean(), len(kl))
            rows[name].append(tuple(map(float, means)))
        done += len(ids)
        if progress:
            progress(done, len(token_ids))
    return {name: _agreement(rows[name], np.concatenate(divergences[name]), window) for name in candidates}


def _compare(p: F32, q: F32, targets: Sequence[int]) -> tuple[npt.NDArray[np.float64], ...]:
    """KL(p || q) and both negative log-likelihoods of every row, a few rows at a time so that they stay in cache."""
    out = np.empty((3, len(p)))
    for begin in range(0, len(p), COMPARED_ROWS):
        part = slice(begin, min(begin + COMPARED_ROWS, len(p)))
        log_p, log_q = log_softmax(p[part]), log_softmax(q[part])
        at = np.arange(len(log_p)), np.asarray(targets[part])
        out[1, part], out[2, part] = -log_p[at], -log_q[at]
        np.subtract(log_p, log_q, out=log_q)
        out[0, part] = np.einsum("ij,ij->i", np.exp(log_p, out=log_p), log_q)
    return np.maximum(out[0], 0.0), out[1], out[2]  # rounding may leave -1e-17


def _agreement(rows: list[tuple[float, ...]], kl: npt.NDArray[np.float64], window: int) -> AgreementResult:
    means, top1, nll_p, nll_q, sizes = np.array(rows).T
    tokens = int(sizes.sum())
    return AgreementResult(
        kl=bootstrap_mean(means, sizes),
        kl_median=percentile(kl, 50),
        kl_p99=percentile(kl, 99),
        top1=bootstrap_mean(top1, sizes),
        reference=PerplexityResult(bootstrap_mean(nll_p, sizes), tokens, window),
        candidate=PerplexityResult(bootstrap_mean(nll_q, sizes), tokens, window),
        tokens=tokens,
    )


@dataclass(frozen=True, slots=True)
class Question:
    """One labelled example: what is asked, what may be answered, and which of it is right."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def measure_choices(
    choose: Callable[[str, Sequence[str]], int],
    questions: Sequence[Question],
    *,
    progress: Progress | None = None,
) -> Interval:
    """Share of questions that `choose(prompt, choices) -> index` gets right, with its interval."""
    if not questions:
        raise InputError("the task holds no questions", param="task")
    right = []
    for index, question in enumerate(questions):
        right.append(float(choose(question.prompt, question.choices) == question.answer))
        if progress:
            progress(index + 1, len(questions))
    return bootstrap_mean(right)


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
