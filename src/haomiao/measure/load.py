"""Offer a trace to a server and note what came back, when: open loop (nobody waits for an answer before asking), or
closed loop to find how much a server can do.

The clock is monotonic. How late a request was sent is measured: a run whose requests left late says nothing about the
server and is called void. Knows OpenAI's HTTP interface, and how a `Dialect` states a deadline on it; the arithmetic on
what came back is `measure.attainment`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from haomiao.errors import InputError
from haomiao.measure.mix import Mix, Offer, RequestClass
from haomiao.measure.wire import Client, Response

LONGEST_WAIT_S = 120.0


@dataclass(slots=True)
class Record:
    """One request: moments in milliseconds since the trace's start, and what came back."""

    offer: Offer
    sent_ms: float = 0.0
    """When its last byte was given to the kernel."""
    lag_ms: float = 0.0
    """How much later than due that was, without what a dialect held it back on purpose."""
    end_ms: float = 0.0
    status: int = 0
    error: str | None = None
    """Why there is no whole response: `gave up` if the client hung up."""
    code: str | None = None
    """The server's error code."""
    token_ms: list[float] = field(default_factory=list)
    """When each piece of text arrived; one moment for a response that was not streamed."""
    tokens: int = 0
    text: str = ""
    finish: str | None = None
    detail: str | None = None
    receipt: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return {
            name: msgspec.to_builtins(getattr(self, name)) if name == "offer" else getattr(self, name)
            for name in self.__dataclass_fields__
        }


@dataclass(slots=True)
class Run:
    """All records of one trace, in its order."""

    records: list[Record]
    elapsed_ms: float


class Dialect(Protocol):
    """How a server is asked, and told of a deadline."""

    async def ready(self, offer: Offer, kind: RequestClass, left_ms: Callable[[], float | None]) -> bool:
        """Wait until the request may be sent; False: it is not worth sending (a proxy's refusal). `left_ms` is what
        is left of its budget, None if it has none."""
        ...

    def body(self, offer: Offer, kind: RequestClass, left_ms: float | None) -> dict[str, Any]:
        """The request's body, but for the model's name."""
        ...

    def finished(self, kind: RequestClass, hung_up: bool = False) -> None:
        """A request that `ready` let pass has ended; `hung_up`: because the client did not wait for its end."""
        ...


class OpenAI:
    """Any OpenAI-compatible server: nothing is said about deadlines. `choices`: also how vLLM is asked for a choice."""

    def __init__(self, *, choices: bool = True) -> None:
        self._choices = choices

    async def ready(self, offer: Offer, kind: RequestClass, left_ms: Callable[[], float | None]) -> bool:
        """At once."""
        return True

    def body(self, offer: Offer, kind: RequestClass, left_ms: float | None) -> dict[str, Any]:
        """Prompt, length, temperature 0, stream."""
        body: dict[str, Any] = {"max_tokens": kind.max_tokens, "temperature": 0.0, "stream": not kind.options}
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        if kind.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": offer.prompt}]
        else:
            body["prompt"] = offer.prompt
        if kind.options and self._choices:
            body["structured_outputs"] = {"choice": list(kind.options)}
        return body | kind.body

    def finished(self, kind: RequestClass, hung_up: bool = False) -> None:
        """Nothing was held."""


class Haomiao(OpenAI):
    """Our own fields: the budget of the whole answer and of the first token."""

    def body(self, offer: Offer, kind: RequestClass, left_ms: float | None) -> dict[str, Any]:
        """As OpenAI's, and the budgets. The server counts from when it has the request, so what the trace is late is
        taken off."""
        body = super().body(offer, kind, left_ms)
        if kind.budget_ms is not None and left_ms is not None:
            body["budget_ms"] = max(left_ms, 0.001)
            if kind.ttft_ms is not None:
                body["ttft_ms"] = max(kind.ttft_ms - (kind.budget_ms - left_ms), 0.001)
        elif kind.ttft_ms is not None:
            body["ttft_ms"] = kind.ttft_ms
        return body


DIALECTS: dict[str, Callable[[], Dialect]] = {"haomiao": Haomiao, "openai": OpenAI}


class Load:
    """Offers traces of one mix to one server."""

    def __init__(
        self,
        client: Client,
        mix: Mix,
        dialect: Dialect,
        *,
        model: str = "",
        patience: float | None = 2.0,
        keep_text: bool = True,
    ) -> None:
        """`patience`: the client hangs up when that many budgets have passed; None: it waits for the end."""
        self._client = client
        self._kinds = {kind.name: kind for kind in mix.classes}
        self._dialect = dialect
        self._model = model
        self._patience = patience
        self._keep_text = keep_text

    async def open_loop(self, trace: Sequence[Offer], progress: Callable[[int, int], None] | None = None) -> Run:
        """Send every request when it is due, whatever became of the others."""
        start = time.monotonic_ns() + 50_000_000  # tasks are made before the first is due
        done = 0

        async def one(offer: Offer) -> Record:
            nonlocal done
            record = await self._send(offer, start)
            done += 1
            if progress:
                progress(done, len(trace))
            return record

        tasks = []
        loop = asyncio.get_running_loop()
        for offer in trace:
            due_s = (start + offer.due_ms * 1e6 - time.monotonic_ns()) / 1e9
            if due_s > 0:
                await asyncio.sleep(due_s)
            tasks.append(loop.create_task(one(offer)))
        records = await asyncio.gather(*tasks)
        return Run(list(records), (time.monotonic_ns() - start) / 1e6)

    async def closed_loop(self, trace: Sequence[Offer], clients: int) -> Run:
        """`clients` at a time, each asking again as soon as it is answered. Due is when it was asked."""
        start = time.monotonic_ns()
        waiting = iter(trace)
        records: list[Record] = []

        async def ask() -> None:
            for offer in waiting:
                now_ms = (time.monotonic_ns() - start) / 1e6
                records.append(await self._send(msgspec.structs.replace(offer, due_ms=now_ms), start))

        await asyncio.gather(*(ask() for _ in range(clients)))
        return Run(sorted(records, key=lambda record: record.offer.index), (time.monotonic_ns() - start) / 1e6)

    async def _send(self, offer: Offer, start_ns: int) -> Record:
        kind = self._kinds[offer.kind]
        due_ns = start_ns + int(offer.due_ms * 1e6)

        def left_ms() -> float | None:
            return None if kind.budget_ms is None else kind.budget_ms - (time.monotonic_ns() - due_ns) / 1e6

        asked_ns = time.monotonic_ns()
        record = Record(offer, lag_ms=(asked_ns - due_ns) / 1e6)
        if not await self._dialect.ready(offer, kind, left_ms):
            record.sent_ms = record.end_ms = (time.monotonic_ns() - start_ns) / 1e6
            record.status, record.code = 429, "proxy_refused"
            return record
        let_pass_ns = time.monotonic_ns()
        hung_up = True
        try:
            body = msgspec.json.encode({"model": self._model} | self._dialect.body(offer, kind, left_ms()))
            path = "/v1/chat/completions" if kind.endpoint == "chat" else "/v1/completions"
            wait_s = LONGEST_WAIT_S
            if kind.budget_ms is not None and self._patience is not None:
                wait_s = max(0.001, (self._patience * kind.budget_ms - kind.budget_ms + (left_ms() or 0.0)) / 1e3)
            response = await self._client.request("POST", path, body, timeout_s=wait_s)
            hung_up = response.error == "gave up"
        finally:
            self._dialect.finished(kind, hung_up)
        fill_record(record, response, start_ns)
        if response.sent_ns:
            record.lag_ms += (response.sent_ns - let_pass_ns) / 1e6
        if not self._keep_text:
            record.text = ""
        return record


def fill_record(record: Record, response: Response, start_ns: int) -> None:
    """Read a response: error code, text and its moments, finish reason, receipt."""

    def ms(moment_ns: int) -> float:
        return (moment_ns - start_ns) / 1e6

    record.sent_ms, record.end_ms = ms(response.sent_ns or response.end_ns), ms(response.end_ns)
    record.status, record.error = response.status, response.error
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        for moment, event in events_of(response):
            read_answer(record, event, ms(moment))
    elif response.error is None:
        try:
            read_answer(record, msgspec.json.decode(response.body), record.end_ms)
        except msgspec.DecodeError:
            record.error = "the body is not JSON"


def events_of(response: Response) -> list[tuple[int, Any]]:
    """The JSON events of a stream, each with the moment its last byte arrived. What is not JSON is left out."""
    found: list[tuple[int, Any]] = []
    buffer = b""
    for piece, moment in zip(response.pieces, response.moments_ns, strict=True):
        buffer += piece
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            line = line.strip()
            if not line.startswith(b"data:") or line == b"data: [DONE]":
                continue
            try:
                found.append((moment, msgspec.json.decode(line[5:])))
            except msgspec.DecodeError:
                continue
    return found


def read_answer(record: Record, event: Any, moment_ms: float) -> None:
    """Take over what one event (or one whole body) says."""
    if not isinstance(event, dict):
        return
    error = event.get("error")
    if isinstance(error, dict):
        record.code = str(error.get("code") or error.get("type") or "error")[:60]
    choices = event.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        message = choice.get("delta") or choice.get("message") or choice
        text = message.get("text") or message.get("content") if isinstance(message, dict) else None
        if isinstance(text, str) and text:
            record.text += text
            record.token_ms.append(moment_ms)
            record.tokens += 1
        record.finish = choice.get("finish_reason") or record.finish
    usage = event.get("usage")
    if isinstance(usage, dict) and type(usage.get("completion_tokens")) is int:
        record.tokens = max(record.tokens, usage["completion_tokens"])
    ours = event.get("haomiao")
    if isinstance(ours, dict):
        record.detail = ours.get("finish_detail") or record.detail
        receipt = ours.get("receipt")
        if isinstance(receipt, dict):
            record.receipt = receipt


async def model_of(client: Client) -> str:
    """The first model that the server says it has. Raises `InputError` if nobody answers there."""
    listed = await client.get_json("/v1/models")
    if listed is None:
        where = f"{client.address.host}:{client.address.port}"
        raise InputError(f"no server lists its models at {where}", code="no_server", param="server")
    try:
        return str(listed["data"][0]["id"])
    except (LookupError, TypeError) as error:
        raise InputError("the server lists no model; name one with --model", param="model") from error
