"""Checks of sampling parameters; every refusal names the parameter. Knows nothing about how tokens are chosen."""

from __future__ import annotations

from collections.abc import Mapping

from haomiao.errors import ContextLengthError, InputError
from haomiao.types import SamplingParams

MAX_SAMPLES = 16
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_BIASES = 1024


def validate(params: SamplingParams, vocab_size: int, max_context: int) -> None:
    """Raise `InputError` (its `param` names the field) unless every field is of its type and in its range."""
    _integer("max_tokens", params.max_tokens, 1)
    _integer("min_tokens", params.min_tokens, 0)
    if params.min_tokens > params.max_tokens:
        raise InputError(
            f"min_tokens is {params.min_tokens}, more than max_tokens, which is {params.max_tokens}", param="min_tokens"
        )
    _number("temperature", params.temperature, 0.0, 100.0)
    _integer("top_k", params.top_k, 0)
    _number("top_p", params.top_p, 0.0, 1.0)
    if params.top_p == 0.0:
        raise InputError("top_p must be more than 0 (temperature 0 is greedy)", param="top_p")
    _number("min_p", params.min_p, 0.0, 1.0)
    _number("repetition_penalty", params.repetition_penalty, 0.01, 100.0)  # logits over less are no longer finite
    _number("presence_penalty", params.presence_penalty, -2.0, 2.0)
    _number("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    if params.seed is not None:
        _integer("seed", params.seed, -(1 << 63), (1 << 64) - 1)
    if params.logprobs is not None:
        _integer("logprobs", params.logprobs, 0, MAX_LOGPROBS)
    _integer("n", params.n, 1, MAX_SAMPLES)
    if not isinstance(params.ignore_eos, bool):
        raise InputError("ignore_eos must be true or false", param="ignore_eos")
    _stops(params, vocab_size)
    _biases(params.logit_bias, vocab_size)
    if params.max_tokens > max_context:
        raise ContextLengthError(
            f"max_tokens is {_shown(params.max_tokens)}; the context holds {max_context} tokens", param="max_tokens"
        )


def _stops(params: SamplingParams, vocab_size: int) -> None:
    if isinstance(params.stop, str) or not isinstance(params.stop, (tuple, list)):
        raise InputError("stop must be a sequence of strings", param="stop")
    if len(params.stop) > MAX_STOPS or len(params.stop_token_ids) > MAX_STOPS:
        raise InputError(f"at most {MAX_STOPS} stops are allowed", param="stop")
    for text in params.stop:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARACTERS:
            raise InputError(f"a stop must be a string of 1 to {MAX_STOP_CHARACTERS} characters", param="stop")
    for token_id in params.stop_token_ids:
        _token("stop_token_ids", token_id, vocab_size)


def _biases(bias: Mapping[int, float], vocab_size: int) -> None:
    if not isinstance(bias, Mapping):
        raise InputError("logit_bias must map token ids to numbers", param="logit_bias")
    if len(bias) > MAX_BIASES:
        raise InputError(f"logit_bias holds {len(bias)} tokens; at most {MAX_BIASES} are allowed", param="logit_bias")
    for token_id, value in bias.items():
        _token("logit_bias", token_id, vocab_size)
        _number("logit_bias", value, -100.0, 100.0)


def _token(name: str, token_id: object, vocab_size: int) -> None:
    if type(token_id) is not int or not 0 <= token_id < vocab_size:
        raise InputError(f"{name}: {token_id!r} is not a token id of a vocabulary of {vocab_size}", param=name)


def _integer(name: str, value: object, least: int, most: int | None = None) -> None:
    if type(value) is not int or value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} must be a whole number {bounds}, not {_shown(value)}", param=name)


def _number(name: str, value: object, least: float, most: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:  # NaN fails too
        raise InputError(f"{name} must be a number from {least:g} to {most:g}, not {_shown(value)}", param=name)


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 80 else "a huge number"
    return text if len(text) <= 40 else text[:37] + "..."
