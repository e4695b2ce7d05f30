"""What the engine is asked and what it answers: `EngineRequest` in, `TokenEvent` and `DoneEvent` out.

Token ids only: text reaches the engine through the protocols `TokenConstraint` and `StopMatcher`. Times are monotonic
nanoseconds of the engine's clock. Knows nothing about how a request is served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from haomiao.errors import HaomiaoError
from haomiao.types import (
    F32,
    FinishReason,
    Receipt,
    SamplingParams,
    SentenceClose,
    StopMatcher,
    TokenConstraint,
    TokenLogprob,
)

Work: TypeAlias = Literal["generate", "prefill", "choose", "logits", "embed"]
WORKS: tuple[str, ...] = get_args(Work)
FinishDetail: TypeAlias = Literal[
    "eos",
    "stop_token",
    "stop_string",
    "max_tokens",
    "constraint_complete",
    "single_prefill",
    "budget_exhausted",
    "done",
]
"""Why exactly an answer ended; `done` is that of work that generates nothing, `single_prefill` that of an answer that
was chosen instead of generated."""
OnBudget: TypeAlias = Literal["degrade", "truncate", "refuse"]

FINISH_REASONS: dict[FinishDetail, FinishReason] = {
    "eos": "stop",
    "stop_token": "stop",
    "stop_string": "stop",
    "constraint_complete": "stop",
    "single_prefill": "stop",
    "done": "stop",
    "max_tokens": "length",
    "budget_exhausted": "length",
}


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request. Defaults are a plain greedy answer without a budget."""

    prompt_ids: Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    work: Work = "generate"
    """`prefill` computes K/V only (for a session); `choose` scores `options`; `logits` returns every row; `embed` the
    mean of the final hidden states."""
    options: tuple[tuple[int, ...], ...] = ()
    """Token ids of the options of `choose`."""
    normalize: bool = False
    """Divide an option's score by its number of tokens, its end included."""
    point: str | None = None
    """Operating point; None is the engine's own."""
    constraint: TokenConstraint | None = None
    """Forked for every sample; the object itself is not advanced."""
    all_answers: Callable[[], Sequence[Sequence[int]]] | None = None
    """Gives every answer that `constraint` allows, as token ids, where they are few, else none. Asked only when a
    budget that may be degraded cannot be kept by generating: the likeliest answer is then told after one prefill."""
    stop: Callable[[], StopMatcher] | None = None
    """Makes one matcher per sample; without it events carry no text."""
    prompt_logprobs: int | None = None
    """As `SamplingParams.logprobs`, for the tokens of the prompt; the prefix cache is then not read."""
    arrival_ns: int | None = None
    """When the request came in (None: when it is submitted); budgets count from here."""
    deadline_ns: int | None = None
    ttft_deadline_ns: int | None = None
    delivery_ns: int = 0
    """By how much `deadline_ns` is before the end of the budget, for the way of the answer to whoever asked."""
    itl_ns: int | None = None
    """Inter-token budget: it bounds the prefill chunks of others."""
    on_budget: OnBudget = "degrade"
    """What may be given up to keep the budget: `degrade` the point, then tokens, then generation (`all_answers`);
    `truncate` tokens only; `refuse` nothing, so that a request which cannot be kept whole is turned away."""
    min_point: str | None = None
    """The least accurate point that this request may run at; None leaves it to the engine."""
    max_kl: float | None = None
    """Greatest mean KL to `full`, nats per token, of a point that this request may run at."""
    close: SentenceClose | None = None
    """Where an answer without a grammar may end when its time runs out; None cuts it anywhere."""
    salt: bytes = b""
    """Prefixes are shared only between requests with the same salt."""
    speculate: str | None = None
    """How tokens are drafted: "off", "auto", or a proposer that the engine has ("suffix", "self", "draft"); None leaves
    it to the engine. What is answered does not depend on it."""
    session: int | None = None
    """Continue from what this session remembers, and leave the sequence there."""


@dataclass(slots=True)
class TokenEvent:
    """Tokens of one sample that came out of a step, and the text that became certain with them."""

    request_id: int
    sample: int
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprob] | None
    point: str


@dataclass(slots=True)
class DoneEvent:
    """The end of one sample (of the request, for work other than `generate`). Nothing follows it."""

    request_id: int
    sample: int
    receipt: Receipt
    finish_reason: FinishReason | None = None
    finish_detail: FinishDetail | None = None
    error: HaomiaoError | None = None
    """Set if the request failed; `finish_reason` is then None."""
    scores: list[float] | None = None
    """One per option: natural-log probability of the option and its end."""
    logits: F32 | None = None
    """[tokens, vocab]"""
    embedding: F32 | None = None
    """[hidden] the mean of the prompt's final hidden states, not normalized."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """For the prompt's tokens from the second on."""


Event: TypeAlias = TokenEvent | DoneEvent
