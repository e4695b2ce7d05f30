"""What the HTTP process and the engine process say to each other (docs/ARCHITECTURE.md, section 10).

A frame is a u32 length, little-endian, and that many bytes of MessagePack: one tagged map. Fields at their defaults are
left out and unknown ones skipped, so that a minor version may add fields. Knows nothing about sockets.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import msgspec

from haomiao import errors
from haomiao.engine.request import FinishDetail, OnBudget, Work
from haomiao.errors import EngineError, HaomiaoError
from haomiao.types import FinishReason, Receipt, SamplingParams, TokenLogprob

PROTOCOL = 1
"""Another version ends the connection."""
MAX_MESSAGE_BYTES = 16 << 20
_LENGTH = struct.Struct("<I")


class Message(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Base of all messages."""


# ---- HTTP process -> engine ---------------------------------------------------------------------------------------


class Open(Message, tag="open", kw_only=True):
    """The first message: what to load. `options` are the keyword arguments of `LLM`."""

    protocol: int = PROTOCOL
    model: str | None = None
    options: dict[str, Any] = {}


class Constraint(Message, kw_only=True):
    """What the answer must look like: arguments of `text.constraint.compile_constraint`, the value as JSON text."""

    kind: str
    text: str = "null"


class Submit(Message, tag="submit", kw_only=True):
    """A request; answered by `Token`s and a `Done` per sample, or one `Refused`. Times are CLOCK_MONOTONIC ns."""

    id: int
    token_ids: list[int]
    sampling: SamplingParams = SamplingParams()
    work: Work = "generate"
    options: list[list[int]] = []
    normalize: bool = False
    constraint: Constraint | None = None
    point: str | None = None
    prompt_logprobs: int | None = None
    arrival_ns: int
    deadline_ns: int | None = None
    ttft_deadline_ns: int | None = None
    delivery_ns: int = 0
    on_budget: OnBudget = "degrade"
    min_point: str | None = None
    max_kl: float | None = None
    salt: bytes = b""


class Feed(Message, tag="feed", kw_only=True):
    """Streamed input: from token `position` on, the session reads `token_ids`. The first one opens the session."""

    session: int
    position: int
    token_ids: list[int]
    salt: bytes = b""
    point: str | None = None
    """At which the answer will run, so that what is computed ahead can be used."""


class Commit(Message, tag="commit", kw_only=True):
    """Answer what the session holds; `submit.token_ids` are the tail after what was fed, and part of it from now on."""

    session: int
    submit: Submit


class Close(Message, tag="close", kw_only=True):
    """Forget a session."""

    session: int


class Cancel(Message, tag="cancel", kw_only=True):
    """End a request; unknown ids are ignored."""

    id: int


# ---- engine -> HTTP process ---------------------------------------------------------------------------------------


class Loading(Message, tag="loading", kw_only=True):
    """Progress while the model is converted or loaded."""

    what: str
    done: int = 0
    total: int = 0


class Hello(Message, tag="hello", kw_only=True):
    """The model is loaded, and this is what it is."""

    protocol: int = PROTOCOL
    model: str
    points: list[str]
    point: str
    errors: dict[str, float] = {}
    """Mean KL to `full` by point, as measured for the artifact."""
    vocab_size: int
    max_context: int
    files: str
    """Directory with the tokenizer's files."""
    threads: int
    isa: str
    kv: str
    kv_blocks: int
    max_request_tokens: int
    """Tokens of the longest prompt and answer that the KV pool can hold."""
    hidden_size: int = 0
    """Width of embeddings; 0 where there are none."""
    step_seconds: float = 0.0
    """About what the longest step takes: the watchdog must not fire before."""


class Token(Message, tag="token", kw_only=True):
    """Tokens of one sample, and the text that became certain with them."""

    id: int
    sample: int = 0
    token_ids: list[int] = []
    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    point: str = ""


class Done(Message, tag="done", kw_only=True):
    """The end of a sample (of the request, for work other than `generate`)."""

    id: int
    sample: int = 0
    finish_reason: FinishReason = "stop"
    finish_detail: FinishDetail = "done"
    receipt: Receipt
    scores: list[float] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    embedding: bytes | None = None
    """Little-endian float32 [hidden], not normalized."""


class Refused(Message, tag="refused", kw_only=True):
    """A request (id 0: the model) that failed: an error of `haomiao.errors` by the name of its class."""

    id: int
    error: str
    message: str
    code: str
    param: str | None = None
    predicted_ms: float | None = None
    retry_after_ms: float | None = None
    receipt: Receipt | None = None

    @classmethod
    def of(cls, request_id: int, error: HaomiaoError, receipt: Receipt | None = None) -> Refused:
        """What is said of an error."""
        return cls(
            id=request_id,
            error=type(error).__name__,
            message=str(error),
            code=error.code,
            param=error.param,
            predicted_ms=error.predicted_ms,
            retry_after_ms=error.retry_after_ms,
            receipt=receipt,
        )

    def exception(self) -> HaomiaoError:
        """The error again; one that is not known here is an `EngineError`."""
        kind = getattr(errors, self.error, None)
        if not (isinstance(kind, type) and issubclass(kind, HaomiaoError)):
            kind = EngineError
        error: HaomiaoError = kind(self.message, code=self.code, param=self.param)
        error.predicted_ms, error.retry_after_ms = self.predicted_ms, self.retry_after_ms
        return error


class Fed(Message, tag="fed", kw_only=True):
    """So many tokens of a session are computed now."""

    session: int
    tokens: int
    cached: int = 0
    ms: float = 0.0


class Stats(Message, tag="stats", kw_only=True):
    """The engine's pulse, twice a second: counters for /metrics, and what the watchdog looks at."""

    steps: int
    busy: bool
    running: int = 0
    waiting: int = 0
    kv_blocks: int = 0
    kv_free: int = 0
    kv_cached: int = 0
    gauges: dict[str, float] = {}
    """Further figures by metric name, such as the monitor's live error."""


ToEngine: TypeAlias = Open | Submit | Feed | Commit | Close | Cancel
FromEngine: TypeAlias = Loading | Hello | Token | Done | Refused | Fed | Stats

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


def encode(messages: Iterable[Message]) -> bytes:
    """Frames, one after the other. Raises `EngineError` for a message that is too long."""
    out = bytearray()
    for message in messages:
        body = _encoder.encode(message)
        if len(body) > MAX_MESSAGE_BYTES:
            raise EngineError(f"a message of {len(body)} bytes between the processes; {MAX_MESSAGE_BYTES} are allowed")
        out += _LENGTH.pack(len(body))
        out += body
    return bytes(out)


class FrameReader:
    """Messages out of bytes as they arrive. `kind` is `ToEngine` or `FromEngine`."""

    def __init__(self, kind: Any) -> None:
        if kind not in _decoders:
            _decoders[kind] = msgspec.msgpack.Decoder(kind)
        self._decode = _decoders[kind].decode
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """Whole messages so far. Raises `EngineError` for what is no message of this version."""
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= 4:
                (size,) = _LENGTH.unpack_from(self._buffer, start)
                if size > MAX_MESSAGE_BYTES:
                    raise EngineError(f"a message of {size} bytes was announced; {MAX_MESSAGE_BYTES} are allowed")
                if len(self._buffer) - start - 4 < size:
                    break
                body = bytes(self._buffer[start + 4 : start + 4 + size])
                start += 4 + size
                try:
                    yield self._decode(body)
                except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                    raise EngineError(f"a message that is none of protocol {PROTOCOL}: {error}") from error
        finally:
            del self._buffer[:start]
