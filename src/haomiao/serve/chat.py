"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from haomiao.errors import HaomiaoError, InputError
from haomiao.serve import asking, tools
from haomiao.serve.answers import (
    Sample,
    account,
    account_failure,
    account_of,
    chat_logprobs,
    collect,
    haomiao_of,
    server_timing,
    usage_of,
)
from haomiao.serve.budgets import Budget
from haomiao.serve.client import Answer
from haomiao.serve.jsonbody import dump
from haomiao.serve.messages import Done, Submit
from haomiao.serve.schemas import ChatRequest
from haomiao.serve.service import Service, new_name
from haomiao.serve.sse import EventStream, cancelled_with_client, frame


@dataclass(slots=True)
class Chat:
    """One request while it is answered."""

    service: Service
    body: ChatRequest
    name: str
    budget: Budget
    facts: dict[str, Any]
    choices: list[str] | None = None
    """Options of a single-prefill choice."""
    choice_tokens: list[int] = field(default_factory=list)
    """Tokens of each option."""
    id: str = field(default_factory=lambda: new_name("chatcmpl-"))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def parses_tools(self) -> bool:
        """True if the answer may hold tool calls."""
        return bool(self.body.tools) and self.body.tool_choice != "none"

    @property
    def forced(self) -> bool:
        """True if the answer is a tool call and nothing else."""
        return self.body.tool_choice not in (None, "auto", "none")


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    body = await service.read(request, ChatRequest)
    budget = service.budget(request, body)
    chat = Chat(service, body, service.check_model(body.model), budget, request.scope["state"].setdefault("facts", {}))
    try:
        submit = await make_submit(chat, request.scope["state"].get("salt", b""))
        answer = service.submit(submit)
        if body.stream:
            return await _stream(chat, answer)
        async with cancelled_with_client(request, [answer]):
            samples = await collect(answer, submit.sampling.n)
    except HaomiaoError as error:
        account_failure(service, error, budget.given)
        raise
    return _whole(chat, samples)


async def make_submit(chat: Chat, salt: bytes) -> Submit:
    """What the engine is asked. Raises what is wrong with the body."""
    service, body = chat.service, chat.body
    service.check_points(body)
    hello = service.hello
    shown, forced = asking.tools_of(body)
    constraint = forced or asking.constraint_of(body.response_format, body.structured_outputs)
    if body.top_logprobs is not None and not body.logprobs:
        raise InputError("top_logprobs needs logprobs: true", param="top_logprobs")
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    choices = asking.choices_of(body) if not body.logprobs else None
    ids, options = await service.prompts.chat_choice(
        body.messages, choices or (), shown, variables, source=body.chat_template, salt=salt
    )
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise InputError("max_tokens is the old name of max_completion_tokens: give one", param="max_tokens")
    max_tokens = body.max_completion_tokens or body.max_tokens
    if choices is not None:
        chat.choices, chat.choice_tokens = choices, [len(option) for option in options]
        return asking.submit_of(
            service.new_id(), ids, chat.budget, point=body.point, salt=salt, work="choose", options=options
        )
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = asking.sampling_of(body, hello, len(ids), max_tokens=max_tokens, logprobs=logprobs)
    return asking.submit_of(
        service.new_id(), ids, chat.budget, sampling=sampling, constraint=constraint, point=body.point, salt=salt
    )


def best_of(done: Done) -> int:
    """The option with the greatest score."""
    scores = done.scores or [0.0]
    return max(range(len(scores)), key=scores.__getitem__)


def _choice_fields(chat: Chat, done: Done) -> tuple[str, int, dict[str, Any]]:
    """Text and tokens of the option that was chosen, and what is said about the others."""
    best = best_of(done)
    options = chat.choices or [""]
    scores = dict(zip(options, done.scores or [], strict=False))
    return options[best], chat.choice_tokens[best], {"scores": scores}


# ---- whole --------------------------------------------------------------------------------------------------------


def _whole(chat: Chat, samples: list[Sample]) -> Response:
    ends = [sample.end for sample in samples]
    for end in ends:
        account(chat.service, chat.facts, end)
    choices: list[dict[str, Any]] = []
    tokens: int | None = None
    more: dict[str, Any] = {}
    if chat.choices is not None:
        text, tokens, more = _choice_fields(chat, ends[0])
        samples[0].text = text
    for index, sample in enumerate(samples):
        message, reason = _message(chat, sample)
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": _logprobs(chat, sample),
                "finish_reason": reason,
            }
        )
    body = {
        "id": chat.id,
        "object": "chat.completion",
        "created": chat.created,
        "model": chat.name,
        "choices": choices,
        "usage": usage_of([end.receipt for end in ends], tokens),
        "haomiao": {**haomiao_of(ends), **more},
    }
    return Response(dump(body), 200, server_timing(ends[0].receipt), "application/json")


def _message(chat: Chat, sample: Sample) -> tuple[dict[str, Any], str]:
    message: dict[str, Any] = {"role": "assistant", "content": sample.text, "refusal": None}
    reason: str = sample.end.finish_reason
    if chat.parses_tools and chat.choices is None:
        content, calls = tools.parse(sample.text, chat.body.tools or [], whole=chat.forced)
        if calls:
            message["content"], message["tool_calls"] = content or None, [call.as_dict() for call in calls]
            reason = reason if reason == "length" else "tool_calls"
    return message, reason


def _logprobs(chat: Chat, sample: Sample) -> dict[str, Any] | None:
    if not chat.body.logprobs:
        return None
    return chat_logprobs(chat.service.prompts.tokenizer, sample.logprobs, chat.body.top_logprobs or 0)


# ---- stream -------------------------------------------------------------------------------------------------------


async def _stream(chat: Chat, answer: Answer) -> Response:
    """The stream begins with the first event, so that a refusal still has its status."""
    first = await answer.some()

    async def events() -> AsyncIterator[bytes]:
        try:
            async for data in _chunks(chat, answer, first):
                yield data
        except HaomiaoError as error:
            account_failure(chat.service, error, chat.budget.given)
            raise

    return EventStream(events(), [answer])


async def _chunks(chat: Chat, answer: Answer, first: list[Any]) -> AsyncIterator[bytes]:
    body, ends = chat.body, []
    parsers: dict[int, tools.StreamParser] = {}
    begun: set[int] = set()
    include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    tokens: int | None = None
    while first:
        out = b""
        for event in first:
            index = event.sample
            more: dict[str, Any] = {}
            if index not in begun:
                begun.add(index)
                out += frame(_chunk(chat, index, {"role": "assistant", "content": "", "refusal": None}))
                if chat.parses_tools and chat.choices is None:
                    parsers[index] = tools.StreamParser(body.tools or [], whole=chat.forced)
            if not isinstance(event, Done):
                for delta in _deltas(event.text, parsers.get(index)):
                    out += frame(_chunk(chat, index, delta, _event_logprobs(chat, event)))
                if not event.text and body.logprobs and event.logprobs:
                    out += frame(_chunk(chat, index, {"content": ""}, _event_logprobs(chat, event)))
                continue
            account(chat.service, chat.facts, event)
            ends.append(event)
            reason: str = event.finish_reason
            if chat.choices is not None:
                text, tokens, more = _choice_fields(chat, event)
                out += frame(_chunk(chat, index, {"content": text}))
            parser = parsers.get(index)
            if parser is not None:
                for delta in parser.finish():
                    out += frame(_chunk(chat, index, delta))
                if parser.called and reason != "length":
                    reason = "tool_calls"
            out += frame({**_chunk(chat, index, {}, reason=reason), "haomiao": {**account_of(event), **more}})
        yield out
        first = await answer.some()
    if include_usage and ends:
        usage = usage_of([end.receipt for end in ends], tokens)
        yield frame({**_chunk(chat), "usage": usage, "haomiao": haomiao_of(ends)})


def _deltas(text: str, parser: tools.StreamParser | None) -> list[dict[str, Any]]:
    if not text:
        return []
    return [{"content": text}] if parser is None else parser.push(text)


def _event_logprobs(chat: Chat, event: Any) -> dict[str, Any] | None:
    if not chat.body.logprobs or event.logprobs is None:
        return None
    return chat_logprobs(chat.service.prompts.tokenizer, event.logprobs, chat.body.top_logprobs or 0)


def _chunk(
    chat: Chat,
    index: int | None = None,
    delta: dict[str, Any] | None = None,
    logprobs: dict[str, Any] | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    """One chunk; without an index the one that carries only usage."""
    chunk = {"id": chat.id, "object": "chat.completion.chunk", "created": chat.created, "model": chat.name}
    if index is None:
        return {**chunk, "choices": []}
    return {**chunk, "choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}]}
