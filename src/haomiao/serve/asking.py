"""From bodies to what the engine is asked: sampling parameters, constraints, tools, and the `Submit` itself.

Used by every generating route, and by the WebSocket, so that the same field means the same everywhere. Pure: knows the
engine's greeting and no connection.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from haomiao.engine.validate import validate
from haomiao.errors import ContextLengthError, InputError
from haomiao.serve.budgets import Budget
from haomiao.serve.messages import Constraint, Hello, Submit
from haomiao.serve.schemas import ChatRequest, NamedTool, ResponseFormat, Sampled, StructuredOutputs, Tool
from haomiao.types import SamplingParams

MAX_SCHEMA_BYTES = 64 << 10


def sampling_of(
    body: Sampled, hello: Hello, prompt_tokens: int, *, max_tokens: int | None, logprobs: int | None = None
) -> SamplingParams:
    """Sampling parameters of a body. `max_tokens` None: what the context leaves. Raises `InputError` with `param`."""
    room = hello.max_request_tokens - prompt_tokens
    if room < 1 or (max_tokens is not None and max_tokens > room):
        asked = "" if max_tokens is None else f" and {max_tokens} more are requested"
        raise ContextLengthError(
            f"the prompt has {prompt_tokens} tokens{asked}; the context holds {hello.max_request_tokens}: "
            "shorten the prompt or lower max_tokens",
            param="messages" if isinstance(body, ChatRequest) and room < 1 else "prompt" if room < 1 else "max_tokens",
        )
    stop = body.stop if body.stop is not None else []
    wanted = max_tokens if max_tokens is not None else room
    sampling = SamplingParams(
        max_tokens=wanted,
        min_tokens=body.min_tokens or 0,
        temperature=body.temperature if body.temperature is not None else 0.0,
        top_k=max(0, body.top_k or 0),
        top_p=body.top_p if body.top_p is not None else 1.0,
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty if body.repetition_penalty is not None else 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        seed=body.seed,
        logit_bias=_biases(body.logit_bias or {}),
        logprobs=logprobs,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        n=body.n or 1,
    )
    validate(sampling, hello.vocab_size, hello.max_context)
    return sampling


def _biases(given: dict[str, float]) -> dict[int, float]:
    """OpenAI writes token ids as the keys of an object, which are strings."""
    biases: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InputError(f"logit_bias: {key[:40]!r} is not a token id", param="logit_bias")
        biases[int(key)] = value
    return biases


def submit_of(
    request_id: int,
    token_ids: list[int],
    budget: Budget,
    *,
    sampling: SamplingParams | None = None,
    constraint: Constraint | None = None,
    point: str | None = None,
    salt: bytes = b"",
    **more: Any,
) -> Submit:
    """The message to the engine."""
    return Submit(
        id=request_id,
        token_ids=token_ids,
        sampling=sampling or SamplingParams(),
        constraint=constraint,
        point=point,
        arrival_ns=budget.arrival_ns,
        deadline_ns=budget.deadline_ns,
        ttft_deadline_ns=budget.ttft_deadline_ns,
        delivery_ns=budget.delivery_ns,
        on_budget=budget.on_budget,
        min_point=budget.min_point,
        max_kl=budget.max_kl,
        salt=salt,
        **more,
    )


def check_tokens(token_ids: Sequence[Any], vocab_size: int, param: str = "prompt") -> list[int]:
    """A prompt of token ids. Raises `InputError` for what is outside the vocabulary."""
    if not token_ids:
        raise InputError(f"{param} is empty", param=param)
    for each in token_ids:
        if type(each) is not int or not 0 <= each < vocab_size:
            raise InputError(f"{param} holds {str(each)[:40]}; token ids are 0 to {vocab_size - 1}", param=param)
    return list(token_ids)


# ---- constraints --------------------------------------------------------------------------------------------------


def constraint_of(response_format: ResponseFormat | None, structured: StructuredOutputs | None) -> Constraint | None:
    """What the answer must look like. Raises `InputError` if two things are asked for."""
    found: list[tuple[str, Constraint]] = []
    if response_format is not None and response_format.type == "json_object":
        found.append(("response_format", Constraint(kind="json_object")))
    elif response_format is not None and response_format.type == "json_schema":
        asked = response_format.json_schema
        if asked is None or asked.schema is None:
            raise InputError("response_format.json_schema.schema is missing", param="response_format.json_schema")
        found.append(("response_format", _constraint("json_schema", asked.schema)))
    if structured is not None:
        for name, kind in (("json", "json_schema"), ("regex", "regex"), ("choice", "choice"), ("grammar", "grammar")):
            value = getattr(structured, name)
            if value is not None:
                found.append((f"structured_outputs.{name}", _constraint(kind, value)))
        if structured.json_object:
            found.append(("structured_outputs.json_object", Constraint(kind="json_object")))
    if len(found) > 1:
        raise InputError(f"only one of {found[0][0]} and {found[1][0]} can be asked for", param=found[1][0])
    return found[0][1] if found else None


def _constraint(kind: str, value: Any) -> Constraint:
    """A constraint whose source is not too long to be looked at."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text.encode("utf-8", "surrogatepass")) > MAX_SCHEMA_BYTES + 2:
        from haomiao.errors import ConstraintError

        raise ConstraintError(f"the {kind} is longer than {MAX_SCHEMA_BYTES} bytes", param="response_format")
    return Constraint(kind=kind, text=text)


def choices_of(body: Sampled) -> list[str] | None:
    """Options that a single prefill can decide between: `structured_outputs.choice` alone, for one answer."""
    asked = body.structured_outputs
    if asked is None or asked.choice is None or (body.n or 1) > 1:
        return None
    constraint_of(body.response_format, asked)  # nothing else may be asked for
    return list(dict.fromkeys(asked.choice))


# ---- tools --------------------------------------------------------------------------------------------------------


def tools_of(body: ChatRequest) -> tuple[list[Tool], Constraint | None]:
    """The tools that the template shows, and the constraint that a forced call puts on the answer."""
    tools, choice = body.tools or [], body.tool_choice
    if choice is None or choice == "auto":
        return tools, None
    if choice == "none":
        return [], None
    if not tools:
        raise InputError("tool_choice needs tools", param="tool_choice")
    allowed = tools
    if isinstance(choice, NamedTool):
        allowed = [tool for tool in tools if tool.function.name == choice.function.name]
        if not allowed:
            raise InputError(f"tool_choice: there is no tool {choice.function.name[:60]!r}", param="tool_choice")
    if body.structured_outputs is not None or (body.response_format and body.response_format.type != "text"):
        raise InputError("a forced tool call and a response format exclude each other", param="tool_choice")
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in allowed
    ]
    return tools, _constraint("json_schema", calls[0] if len(calls) == 1 else {"anyOf": calls})
