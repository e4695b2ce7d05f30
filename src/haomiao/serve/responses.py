"""/v1/responses: OpenAI's newer form of the same thing, without stored conversations.

The body is put into the form of a chat completion and answered as one; what differs is how it is said.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from haomiao.errors import HaomiaoError, InputError
from haomiao.serve import tools
from haomiao.serve.answers import (
    Sample,
    account,
    account_failure,
    account_of,
    chat_logprobs,
    collect,
    server_timing,
)
from haomiao.serve.chat import Chat, best_of, make_submit
from haomiao.serve.client import Answer
from haomiao.serve.failures import error_body
from haomiao.serve.jsonbody import dump
from haomiao.serve.messages import Done
from haomiao.serve.schemas import ChatRequest, ResponsesRequest
from haomiao.serve.service import Service, new_name
from haomiao.serve.sse import EventStream, cancelled_with_client, frame

PASSED_ON = (
    "model",
    "budget_ms",
    "ttft_ms",
    "on_budget",
    "point",
    "min_point",
    "max_kl",
    "temperature",
    "top_p",
    "seed",
)


@dataclass(slots=True)
class Asked:
    """One request while it is answered."""

    body: ResponsesRequest
    chat: Chat
    id: str = field(default_factory=lambda: new_name("resp_"))
    message_id: str = field(default_factory=lambda: new_name("msg_"))
    created: int = field(default_factory=lambda: int(time.time()))


async def responses(request: Request) -> Response:
    """Answer an input."""
    service: Service = request.app.state.service
    body = await service.read(request, ResponsesRequest)
    if body.store and body.previous_response_id is not None:
        raise InputError("responses are not stored", param="previous_response_id")
    chat_body = as_chat(body)
    budget = service.budget(request, chat_body)
    state = request.scope["state"]
    chat = Chat(service, chat_body, service.check_model(body.model), budget, state.setdefault("facts", {}))
    asked = Asked(body, chat)
    try:
        answer = service.submit(await make_submit(chat, state.get("salt", b"")))
        if body.stream:
            first = await answer.some()
            return EventStream(
                _events(asked, answer, first),
                [answer],
                last=b"",
                failed=lambda error: _failed(asked, error),
            )
        async with cancelled_with_client(request, [answer]):
            (sample,) = await collect(answer, 1)
    except HaomiaoError as error:
        error.param = own_name(error.param)
        account_failure(service, error, budget.given)
        raise
    account(service, chat.facts, sample.end)
    about = {**_response(asked, _output(asked, sample), sample.end), "haomiao": account_of(sample.end)}
    return Response(dump(about), 200, server_timing(sample.end.receipt), "application/json")


def own_name(param: str | None) -> str | None:
    """The field of this API that a refusal of the chat completion means."""
    names = {"messages": "input", "max_tokens": "max_output_tokens", "max_completion_tokens": "max_output_tokens"}
    head, bracket, rest = (param or "").partition("[")
    return names.get(head, head) + bracket + rest if param else param


# ---- body ---------------------------------------------------------------------------------------------------------


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """The same request as a chat completion. Raises `InputError` with the field's own name."""
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
    else:
        for index, item in enumerate(body.input):
            messages.append(_message(item, f"input[{index}]"))
    fields: dict[str, Any] = {name: value for name in PASSED_ON if (value := getattr(body, name)) is not None}
    fields["messages"] = messages
    if body.max_output_tokens is not None:
        fields["max_completion_tokens"] = body.max_output_tokens
    if body.reasoning is not None and body.reasoning.effort is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    if body.top_logprobs is not None or "message.output_text.logprobs" in (body.include or ()):
        fields["logprobs"], fields["top_logprobs"] = True, body.top_logprobs or 0
    form = None if body.text is None else body.text.format
    if form is not None:
        fields["response_format"] = _format(form)
    if body.tools:
        fields["tools"] = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools)]
    choice = body.tool_choice
    if isinstance(choice, dict):
        choice = {"type": "function", "function": {"name": choice.get("name", "")}}
    if choice is not None:
        fields["tool_choice"] = choice
    try:
        return msgspec.convert(fields, ChatRequest)
    except msgspec.ValidationError as error:
        where = str(error).replace("$.messages", "$.input").replace("max_completion_tokens", "max_output_tokens")
        raise InputError(where, param="input") from error


def _message(item: dict[str, Any], where: str) -> dict[str, Any]:
    kind = item.get("type", "message")
    if kind == "message":
        return {"role": item.get("role", ""), "content": _content(item.get("content"), where)}
    if kind == "function_call":
        call = {"name": item.get("name", ""), "arguments": item.get("arguments", "")}
        return {"role": "assistant", "tool_calls": [{"id": item.get("call_id"), "function": call}]}
    if kind == "function_call_output":
        output = item.get("output", "")
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}
    raise InputError(f"{where}: items of type {str(kind)[:40]!r} are not supported", param=where)


def _content(content: Any, where: str) -> Any:
    """Parts without the fields that only answers have."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) for part in content):
        raise InputError(f"{where}.content must hold objects", param=f"{where}.content")
    return [{key: value for key, value in part.items() if key in PART_FIELDS} for part in content]


PART_FIELDS = frozenset(["type", "text", "refusal", "image_url", "input_audio", "file"])


def _format(form: dict[str, Any]) -> dict[str, Any]:
    """`text.format` as `response_format`, whose schema stands one level deeper."""
    if form.get("type") != "json_schema":
        return form
    inner = {key: value for key, value in form.items() if key != "type"}
    return {"type": "json_schema", "json_schema": inner}


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        kind = str(tool.get("type"))[:40]
        raise InputError(f"{where}: tools of type {kind!r} are not supported; functions are", param=where)
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


# ---- answer -------------------------------------------------------------------------------------------------------


def _output(asked: Asked, sample: Sample) -> list[dict[str, Any]]:
    """Output items of a whole answer."""
    chat, text = asked.chat, sample.text
    calls: list[tools.Call] = []
    if chat.choices is not None:
        text = chat.choices[best_of(sample.end)]
    elif chat.parses_tools:
        text, calls = tools.parse(text, chat.body.tools or [], whole=chat.forced)
    items = [] if calls and not text else [_text_item(asked, text, sample, "completed")]
    return [*items, *(_call_item(call) for call in calls)]


def _text_item(asked: Asked, text: str, sample: Sample | None, status: str) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    if asked.chat.body.logprobs and sample is not None:
        tokenizer = asked.chat.service.prompts.known_tokenizer
        part["logprobs"] = chat_logprobs(tokenizer, sample.logprobs, asked.chat.body.top_logprobs or 0)["content"]
    content = [part] if sample is not None else []
    return {"id": asked.message_id, "type": "message", "status": status, "role": "assistant", "content": content}


def _call_item(call: tools.Call) -> dict[str, Any]:
    item_id = "fc_" + call.id.removeprefix("call_")
    return {
        "id": item_id,
        "type": "function_call",
        "status": "completed",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
    }


def _response(
    asked: Asked, output: list[dict[str, Any]], end: Done | None, status: str | None = None
) -> dict[str, Any]:
    """The response object; without an end it is still in progress."""
    body, receipt = asked.body, None if end is None else end.receipt
    cut = end is not None and end.finish_reason == "length"
    usage = None
    if receipt is not None:
        usage = {
            "input_tokens": receipt.prompt_tokens,
            "input_tokens_details": {"cached_tokens": receipt.cached_tokens},
            "output_tokens": receipt.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": receipt.prompt_tokens + receipt.completion_tokens,
        }
    return {
        "id": asked.id,
        "object": "response",
        "created_at": asked.created,
        "status": status or ("in_progress" if end is None else "incomplete" if cut else "completed"),
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": asked.chat.name,
        "output": output,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "temperature": body.temperature if body.temperature is not None else 0.0,
        "text": {"format": (body.text.format if body.text and body.text.format else {"type": "text"})},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_p": body.top_p if body.top_p is not None else 1.0,
        "truncation": "disabled",
        "usage": usage,
        "metadata": body.metadata or {},
    }


# ---- stream -------------------------------------------------------------------------------------------------------


def _failed(asked: Asked, error: HaomiaoError) -> bytes:
    response = _response(asked, [], None, "failed")
    response["error"] = {"code": error.code, "message": str(error)}
    return frame({"type": "response.failed", "response": response, **error_body(error)}, "response.failed")


async def _events(asked: Asked, answer: Answer, first: list[Any]) -> AsyncIterator[bytes]:
    """OpenAI's sequence of typed events."""
    number = 0

    def say(kind: str, **about: Any) -> bytes:
        nonlocal number
        number += 1
        return frame({"type": kind, "sequence_number": number - 1, **about}, kind)

    chat = asked.chat
    where = {"item_id": asked.message_id, "output_index": 0, "content_index": 0}
    started = _response(asked, [], None)
    yield say("response.created", response=started) + say("response.in_progress", response=started)
    sample = Sample()
    parser = tools.StreamParser(chat.body.tools or [], whole=chat.forced) if chat.parses_tools else None
    written = ""
    opened = False

    def write(text: str) -> bytes:
        """More of the text; opens the message before the first of it."""
        nonlocal opened, written
        out = b""
        if not opened:
            opened = True
            empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = _text_item(asked, "", None, "in_progress")
            out += say("response.output_item.added", output_index=0, item=item)
            out += say("response.content_part.added", **where, part=empty)
        written += text
        return out + say("response.output_text.delta", **where, delta=text, logprobs=[])

    while first:
        out = b""
        for event in first:
            if isinstance(event, Done):
                sample.done = event
                continue
            sample.text += event.text
            sample.logprobs += event.logprobs or ()
            deltas = [{"content": event.text}] if parser is None else parser.push(event.text)
            for delta in deltas:
                if delta.get("content"):
                    out += write(delta["content"])
        if out:
            yield out
        first = await answer.some()
    end = sample.end
    account(chat.service, chat.facts, end)
    if chat.choices is not None:
        yield write(chat.choices[best_of(end)])
    calls: list[tools.Call] = []
    if parser is not None:
        for delta in parser.finish():
            if delta.get("content"):
                yield write(delta["content"])
        calls = parser.calls
    output: list[dict[str, Any]] = []
    if opened or not calls:
        if not opened:
            yield write("")
        item = _text_item(asked, written, sample, "completed")
        output.append(item)
        yield say("response.output_text.done", **where, text=written, logprobs=item["content"][0]["logprobs"])
        yield say("response.content_part.done", **where, part=item["content"][0])
        yield say("response.output_item.done", output_index=0, item=item)
    for call in calls:
        item, index = _call_item(call), len(output)
        output.append(item)
        place = {"item_id": item["id"], "output_index": index}
        yield say("response.output_item.added", output_index=index, item={**item, "arguments": ""})
        yield say("response.function_call_arguments.delta", **place, delta=call.arguments)
        yield say("response.function_call_arguments.done", **place, arguments=call.arguments, name=call.name)
        yield say("response.output_item.done", output_index=index, item=item)
    final = {**_response(asked, output, end), "haomiao": account_of(end)}
    kind = "response.incomplete" if final["status"] == "incomplete" else "response.completed"
    yield say(kind, response=final)
