"""/v1/embeddings: texts or token ids as vectors, the mean of the hidden states that stand before the vocabulary head.

Each input is a request of its own to the engine, a few at a time; the account in the answer is that of all together.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from haomiao.errors import EngineError, HaomiaoError, InputError, UnavailableError
from haomiao.serve import asking
from haomiao.serve.answers import account, account_failure, account_of, collect, server_timing
from haomiao.serve.client import Answer
from haomiao.serve.jsonbody import dump
from haomiao.serve.messages import Done, Hello, Submit
from haomiao.serve.schemas import EmbeddingsRequest
from haomiao.serve.service import Service
from haomiao.serve.sse import cancelled_with_client
from haomiao.types import F32, Receipt, ScheduleEntry

MAX_INPUTS = 2048
"""OpenAI's."""
MAX_VALUES = 4 << 20
"""Numbers in one answer."""
AT_ONCE = 64
"""Inputs of one request that are in the engine's queue: it is there for everybody, and admission looks at all of it."""


async def embeddings(request: Request) -> Response:
    """Embed the inputs."""
    service: Service = request.app.state.service
    body = await service.read(request, EmbeddingsRequest)
    name, budget = service.check_model(body.model), service.budget(request, body)
    service.check_points(body)
    check_dimensions(body.dimensions, service.hello)
    state = request.scope["state"]
    try:
        submits = [
            asking.submit_of(service.new_id(), ids, budget, point=body.point, salt=state.get("salt", b""), work="embed")
            for ids in await _inputs(service, body.input)
        ]
        ends = await _ends(service, request, submits)
    except HaomiaoError as error:
        account_failure(service, error, budget.given)
        raise
    whole = _whole(ends)
    account(service, state.setdefault("facts", {}), whole)
    data = await service.prompts.run(lambda: _data(ends, body.encoding_format or "float"))
    tokens = whole.receipt.prompt_tokens
    answer = {
        "object": "list",
        "data": data,
        "model": name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "haomiao": account_of(whole),
    }
    return Response(
        await service.prompts.run(lambda: dump(answer)), 200, server_timing(whole.receipt), "application/json"
    )


def check_dimensions(wanted: int | None, hello: Hello) -> None:
    """Raise `UnavailableError` if the model gives no embeddings, `InputError` for another length than its own."""
    if not hello.hidden_size:
        raise UnavailableError("this model gives no embeddings: its executor returns no hidden states", param="model")
    if wanted is not None and wanted != hello.hidden_size:
        raise InputError(
            f"dimensions: this model's embeddings have {hello.hidden_size} dimensions, and were not trained to be cut",
            param="dimensions",
        )


async def _inputs(service: Service, given: Any) -> list[list[int]]:
    """Token ids of every input, which comes in any of four forms: text, ids, lists of either."""
    hello = service.hello
    forms: Sequence[Any] = [given] if isinstance(given, str) or type(given[0]) is int else given
    most = min(MAX_INPUTS, max(1, MAX_VALUES // hello.hidden_size))
    if len(forms) > most:
        raise InputError(f"{len(forms)} inputs; at most {most} are allowed in one request", param="input")
    for index, form in enumerate(forms):
        if isinstance(form, int):
            raise InputError("input mixes token ids with others", param="input")
        if not form:
            raise InputError(f"input {index} is empty", param="input")
    found = []
    for form in forms:
        if isinstance(form, str):
            ids = await service.prompts.text(form, "input", special=False)
        else:
            ids = asking.check_tokens(form, hello.vocab_size, "input")
        service.prompts.check_length(len(ids), "input")
        found.append(ids)
    return found


async def _ends(service: Service, request: Request, submits: Sequence[Submit]) -> list[Done]:
    """The ends of all, in their order. If one fails, or the client leaves, none goes on."""
    answers: list[Answer] = []
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(submit: Submit) -> Done:
        async with gate:
            answer = service.submit(submit)
            answers.append(answer)
            (sample,) = await collect(answer, 1)
            return sample.end

    async with cancelled_with_client(request, answers):
        tasks = [asyncio.ensure_future(one(submit)) for submit in submits]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()


def _whole(ends: Sequence[Done]) -> Done:
    """The end of the request: that of the input which ended last, with the tokens of all."""
    last = max(ends, key=lambda end: end.receipt.total_ms)
    return Done(id=last.id, finish_detail="done", receipt=together([end.receipt for end in ends], last.receipt))


def together(receipts: Sequence[Receipt], last: Receipt) -> Receipt:
    """One account of several inputs, of which `last` ended last."""
    schedule: dict[str, ScheduleEntry] = {}
    for entry in (entry for receipt in receipts for entry in receipt.schedule):
        known = schedule.setdefault(entry.point, ScheduleEntry(entry.point, 0, 0))
        known.steps += entry.steps
        known.tokens += entry.tokens
    outcomes = {receipt.outcome for receipt in receipts}
    return replace(
        last,
        outcome="met_lower_point" if "met_lower_point" in outcomes and last.outcome == "met" else last.outcome,
        queue_ms=min(receipt.queue_ms for receipt in receipts),
        prompt_tokens=sum(receipt.prompt_tokens for receipt in receipts),
        schedule=list(schedule.values()),
    )


def _data(ends: Sequence[Done], form: str) -> list[dict[str, Any]]:
    """`data` of the answer: vectors of length 1, as numbers or as base64 of little-endian float32."""
    from haomiao.api.answers import unit

    data = []
    for index, end in enumerate(ends):
        if end.embedding is None:
            raise EngineError("the engine returned no embedding")
        vector: F32 = unit(np.frombuffer(end.embedding, "<f4"))
        shown = vector.tolist() if form == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": shown})
    return data
