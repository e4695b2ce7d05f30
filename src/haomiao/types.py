"""The words that every room shares: points, requests, steps, receipts, and the protocols between rooms.

Knows nothing about models, kernels, text or the network. Imports only the standard library and numpy, so that
anything may import it. Times are monotonic nanoseconds (`time.monotonic_ns`) unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

F32: TypeAlias = npt.NDArray[np.float32]
F64: TypeAlias = npt.NDArray[np.float64]
I32: TypeAlias = npt.NDArray[np.int32]
U8: TypeAlias = npt.NDArray[np.uint8]
B8: TypeAlias = npt.NDArray[np.bool_]
U32: TypeAlias = npt.NDArray[np.uint32]

KV_BLOCK_TOKENS = 32
"""Tokens in one KV block: the unit of paging, of prefix hashing, and of one attention chunk."""

KV_SPLIT_TOKENS = 512
"""Positions in one split of the softmax (docs/ARCHITECTURE.md, section 6)."""

Planes: TypeAlias = Literal["full", "bf16", "hi", "hi+lo"]
KvType: TypeAlias = Literal["f32", "bf16", "int8"]
FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "content_filter"]
Outcome: TypeAlias = Literal["met", "met_lower_point", "met_single_prefill", "truncated", "missed", "refused"]


@dataclass(frozen=True, slots=True)
class Point:
    """One way to run a model. Points with the same `family` are switchable: they share weights and KV layout."""

    name: str
    planes: Planes
    activations: Literal["f32", "bf16", "int8"]
    head: Planes
    """Which planes the vocabulary head reads; it may be richer than the body."""
    default_kv: KvType
    tile_mask: str | None = None

    @property
    def family(self) -> str:
        """Name of the set of points that may follow each other inside one answer."""
        return "nested" if self.planes in ("hi", "hi+lo") else self.planes


POINTS: Mapping[str, Point] = {
    "full": Point("full", planes="full", activations="f32", head="full", default_kv="f32"),
    "bf16": Point("bf16", planes="bf16", activations="bf16", head="bf16", default_kv="bf16"),
    "int8": Point("int8", planes="hi+lo", activations="int8", head="hi+lo", default_kv="bf16"),
    "int4-w": Point("int4-w", planes="hi", activations="bf16", head="hi+lo", default_kv="bf16"),
    "int4": Point("int4", planes="hi", activations="int8", head="hi+lo", default_kv="bf16"),
}
"""The most accurate first. `int4-w` is int4 weights with 16-bit activations: the torch executor's."""


# ---- one step -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class RowDraws:
    """How rows of logits are drawn, in the meaning and order of `engine.draw`: one number each per row, [rows]."""

    temperature: F32
    """0: the row is not drawn, and its other numbers mean nothing."""
    top_k: I32
    """0 keeps all."""
    top_p: F64
    min_p: F32
    uniform: F64
    """In [0, 1): `engine.random.uniform` of the row's seed, position and sample."""


@dataclass(slots=True)
class StepBatch:
    """What one step computes. Tokens of several sequences lie one after the other; a sequence's tokens are a span.

    Token `i` of span `s` has position `past[s] + i` and writes its K and V there before it attends.
    """

    token_ids: I32  # [tokens]
    span_starts: I32  # [sequences + 1], span_starts[0] = 0, span_starts[-1] = tokens
    past: I32  # [sequences] tokens already held in KV
    block_tables: I32  # [sequences, max_blocks] KV block ids; unused entries are -1
    logit_rows: I32  # [rows] indexes into token_ids whose logits are wanted, ascending
    point: str
    greedy: B8 | None = None
    """[rows] True where only the argmax is wanted, so that the executor may screen the head; that row's logits are then
    unspecified. None: every row is wanted whole."""
    copies: I32 | None = None
    """[copies, 2] (index into token_ids, KV block), ascending by token: K and V of the token go into that block too, at
    the same place. So a span may go on from another of the same step with a copy of its last block. None: none."""
    hidden_rows: I32 | None = None
    """[hidden rows] indexes into token_ids whose final hidden states are wanted, ascending; they may be those of
    `logit_rows` or others. None: none."""
    draws: RowDraws | None = None
    """How rows are to be drawn of which nothing but the drawn token is wanted; only for executors whose attribute
    `draws` is True. None: no row is drawn."""

    @property
    def tokens(self) -> int:
        return int(self.token_ids.shape[0])


@dataclass(slots=True)
class StepResult:
    """What one step returns. `logits` may be a view that the next step overwrites: copy what must outlive it. Rows that
    were `greedy` or `drawn` may hold anything; the argmax of all rows is exact."""

    logits: F32  # [rows, vocab]
    argmax: I32  # [rows] the lowest token id among the greatest logits
    elapsed_ns: int
    hidden: F32 | None = None
    """[hidden rows, hidden_size] what the vocabulary head is multiplied with, after the final norm: of
    `hidden_rows`, in their order, depending on the token and what is before it alone; None if none were wanted."""
    drawn: I32 | None = None
    """[rows] the tokens of the rows that `StepBatch.draws` names. -1: the row was not to be drawn, or the executor left
    it open (also where logits are not finite), and its logits are there. None: the executor draws nothing."""


@runtime_checkable
class Executor(Protocol):
    """Runs a plan, one whole step per call. Everything above it is the same for every device.

    One with an attribute `draws` that is True takes `StepBatch.draws`; the others are never given any.
    """

    vocab_size: int
    hidden_size: int
    max_step_tokens: int
    kv_blocks: int
    kv_bytes_per_block: int
    kv_type: KvType
    points: tuple[str, ...]

    def step(self, batch: StepBatch) -> StepResult:
        """Compute one step. Raises `InputError` for a batch that contradicts itself; never aborts."""
        ...

    def copy_blocks(self, pairs: I32) -> None:
        """Copy KV blocks of every layer. `pairs` is int32 [n, 2]: (from, to)."""
        ...

    def close(self) -> None:
        """Release threads and memory; idempotent."""
        ...


@runtime_checkable
class SequenceState(Protocol):
    """What a sequence remembers between steps: paged KV today, sliding windows and recurrent states later.

    The scheduler, speculation, sessions and the prefix cache use only this.
    """

    length: int

    def append(self, tokens: int) -> None:
        """Make room for `tokens` more. Raises `KvExhaustedError` and changes nothing if it cannot."""
        ...

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on."""
        ...

    def fork(self) -> SequenceState:
        """A second state with the same past; storage is shared until one of them writes."""
        ...

    def snapshot(self) -> I32:
        """The block table that a step reads, int32 [blocks]."""
        ...

    def bytes(self) -> int:
        """Bytes held, shared storage counted once per holder."""
        ...

    def release(self) -> None:
        """Give everything back; idempotent."""
        ...


# ---- text-shaped things that the engine meets only through these --------------------------------------------------


@runtime_checkable
class TokenConstraint(Protocol):
    """A grammar over token ids. One object per sequence; implemented in `text`."""

    def mask(self) -> U32:
        """Allowed next tokens, uint32 [(vocab + 31) // 32], bit `id % 32` of word `id // 32`."""
        ...

    def accept(self, token_id: int) -> bool:
        """Advance. False (and no change) if the token is not allowed."""
        ...

    def rollback(self, tokens: int) -> None:
        """Take the last `tokens` accepted tokens back."""
        ...

    def tokens_to_close(self) -> Sequence[int]:
        """A shortest known continuation that completes the answer validly; empty if it may end here."""
        ...

    def is_complete(self) -> bool:
        """True if the answer may end here."""
        ...

    def fork(self) -> TokenConstraint:
        """An independent copy at the same position."""
        ...


@runtime_checkable
class StopMatcher(Protocol):
    """Turns token ids into text and finds stop strings in it. One object per sequence; implemented in `text`."""

    def push(self, token_id: int) -> str:
        """Text that is now certain: whole UTF-8 characters that cannot be the start of a stop string."""
        ...

    def flush(self) -> str:
        """What was held back, when the answer ends without a stop string."""
        ...

    @property
    def stopped(self) -> str | None:
        """The stop string that was found, or None."""
        ...


@runtime_checkable
class SentenceClose(Protocol):
    """Where an answer without a grammar may end early. Shared by all requests of a model; implemented in `text`."""

    def is_complete(self, token_ids: Sequence[int]) -> bool:
        """True if the last of `token_ids` (some dozens are enough) ends a sentence."""
        ...

    def mask(self) -> U32:
        """Tokens that end a sentence by themselves, uint32 [(vocab + 31) // 32]; as `TokenConstraint.mask`."""
        ...


# ---- requests and receipts ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Ranges are checked by `engine.sampler.validate`, which names the offending parameter."""

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """None draws a fresh seed; the receipt says which, so any answer can be repeated."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    """Number of alternatives reported per token; 0 reports the chosen token only; None reports nothing."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1


@dataclass(slots=True)
class TokenLogprob:
    """Natural-log probability of a token and of the likeliest alternatives, after penalties, at temperature 1."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(slots=True)
class ScheduleEntry:
    """A run of steps at one operating point. No steps: tokens that were reused, and had been computed at that point."""

    point: str
    steps: int
    tokens: int


@dataclass(slots=True)
class Receipt:
    """The account attached to every answer. Milliseconds are floats; None means 'not asked' or 'not measured'."""

    budget_ms: float | None = None
    predicted_ms: float | None = None
    """The bound on `total_ms` that was stated at admission, or what a refused request would have needed."""
    coverage: float | None = None
    """The share of such bounds that is promised to hold; None where none was stated."""
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    total_ms: float = 0.0
    ttft_ms: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    schedule: list[ScheduleEntry] = field(default_factory=list)
    estimated_error: float | None = None
    """Mean KL to `full`, nats per token, at the points run, as measured for the artifact; None if never measured."""
    step_kl: float | None = None
    """Mean KL of the steps that the monitor ran again at the most accurate point, over the same K/V, nats per token."""
    replay_kl: float | None = None
    """Mean KL of this answer when it was run again from its prompt at the most accurate point, nats per token."""
    drafted_tokens: int = 0
    """Tokens that speculation proposed, and below those of them that stood."""
    accepted_tokens: int = 0
    outcome: Outcome | None = None
    """None when no budget was given."""
    seed: int | None = None
    model: str = ""
    threads: int = 0
    isa: str = ""

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        from dataclasses import asdict

        return asdict(self)


@runtime_checkable
class Observer(Protocol):
    """Receives what happened; the engine knows nothing more about it (the monitor and the metrics are observers)."""

    def on_step(self, batch: StepBatch, result: StepResult) -> None:
        """A step was computed. `result.logits` of rows that are True in `batch.greedy`, or that `result.drawn` has a
        token of, may hold anything."""
        ...

    def on_finish(self, receipt: Receipt) -> None: ...
