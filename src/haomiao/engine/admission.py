"""What is refused when it is submitted: requests that contradict themselves, the model or the size of the KV pool.

Every refusal is one line that names the numbers. Refusal by predicted time will stand here too. Knows no live request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from haomiao.engine.request import EngineRequest
from haomiao.engine.state import blocks_for
from haomiao.engine.validate import MAX_LOGPROBS, validate
from haomiao.errors import ContextLengthError, InputError, KvExhaustedError
from haomiao.types import KV_BLOCK_TOKENS

MAX_OPTIONS = 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must fit."""

    vocab_size: int
    max_context: int
    kv_blocks: int
    points: tuple[str, ...]


def check_request(request: EngineRequest, limits: Limits) -> None:
    """Raise unless an idle engine can serve the request: `InputError`, `ContextLengthError` or `KvExhaustedError`."""
    if request.work not in ("generate", "prefill", "choose", "logits"):
        raise InputError(f"work must be generate, prefill, choose or logits, not {request.work!r}", param="work")
    if request.point is not None and request.point not in limits.points:
        known = ", ".join(limits.points)
        raise InputError(f"this model has the points {known}, not {request.point!r}", param="point")
    if not isinstance(request.salt, bytes):
        raise InputError("salt must be bytes", param="salt")
    check_tokens("prompt", request.prompt_ids, limits.vocab_size)
    requested = 0
    if request.work == "generate":
        validate(request.sampling, limits.vocab_size, limits.max_context)
        requested = request.sampling.max_tokens
        if request.sampling.stop and request.stop is None:
            raise InputError("stop strings need a tokenizer, and this model has none", param="stop")
    if request.work == "choose":
        requested = _check_options(request, limits)
    if request.prompt_logprobs is not None and not 0 <= request.prompt_logprobs <= MAX_LOGPROBS:
        raise InputError(f"prompt_logprobs must be from 0 to {MAX_LOGPROBS}", param="prompt_logprobs")
    _check_room(len(request.prompt_ids), requested, limits)


def check_tokens(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise `InputError` unless `token_ids` are at least one id of the vocabulary, all of type int."""
    if not len(token_ids):
        raise InputError(f"the {name} is empty", param=name)
    for token_id in token_ids:
        if type(token_id) is not int:
            raise InputError(f"the {name} holds {token_id!r}, which is not a token id", param=name)
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise InputError(f"the {name} holds {wrong}; token ids are 0 to {vocab_size - 1}", param=name)


def _check_options(request: EngineRequest, limits: Limits) -> int:
    """Returns the tokens of the longest option."""
    if not 0 < len(request.options) <= MAX_OPTIONS:
        raise InputError(f"a choice needs 1 to {MAX_OPTIONS} options, not {len(request.options)}", param="options")
    for option in request.options:
        check_tokens("option", option, limits.vocab_size)
    return max(len(option) for option in request.options)


def _check_room(prompt: int, requested: int, limits: Limits) -> None:
    if prompt + requested > limits.max_context:
        asked = f" and {requested} more are requested" if requested else ""
        raise ContextLengthError(
            f"the prompt has {prompt} tokens{asked}, {prompt + requested} in all; "
            f"the context holds {limits.max_context}: shorten the prompt, lower max_tokens or raise max_context",
            param="prompt" if prompt >= limits.max_context else "max_tokens",
        )
    needed = blocks_for(prompt + requested)
    if needed > limits.kv_blocks:
        raise KvExhaustedError(
            f"the request needs KV for {prompt + requested} tokens; "
            f"there is KV for {limits.kv_blocks * KV_BLOCK_TOKENS}: raise kv_memory or ask for fewer tokens"
        )
