"""/v1/realtime: a WebSocket in the manner of OpenAI's Realtime API, for text.

Text is read by the model as it arrives, so that the first token after the last word costs one small step; corrections
compute what they change; text that arrives during an answer ends it (barge-in). Errors are events, and the connection
goes on; only a frame that is no JSON object ends it. Keys and origins were checked by `guard`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import msgspec
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from haomiao.errors import EngineError, HaomiaoError, InputError, OverloadError
from haomiao.serve import jsonbody, logs
from haomiao.serve import realtime_events as events
from haomiao.serve.conversation import Conversation, Item
from haomiao.serve.failures import error_body
from haomiao.serve.guard import refuse_websocket
from haomiao.serve.messages import Fed
from haomiao.serve.realtime_feeder import Feeder
from haomiao.serve.realtime_response import Response
from haomiao.serve.service import Service, new_name

_log = logging.getLogger("haomiao.serve")
PROTOCOL = "realtime"
GOING_AWAY, BAD_FRAME = 1001, 1007


async def realtime(websocket: WebSocket) -> None:
    """One connection."""
    service: Service = websocket.app.state.service
    try:
        name = service.check_model(websocket.query_params.get("model"))
        if service.sockets >= service.settings.limits.queue:
            raise OverloadError(f"{service.sockets} realtime connections are open already", code="too_many_sessions")
    except HaomiaoError as error:
        await refuse_websocket(error, websocket.send)
        return
    offered = websocket.scope.get("subprotocols") or ()
    await websocket.accept(subprotocol=PROTOCOL if PROTOCOL in offered else None)
    socket = Socket(websocket, service, name)
    service.sockets += 1
    try:
        await socket.run()
    finally:
        service.sockets -= 1
        await socket.end()


class Socket:
    """One connection: its session, its conversation, and the answer that is being given."""

    def __init__(self, websocket: WebSocket, service: Service, name: str) -> None:
        self.service = service
        self.name = name
        self.salt: bytes = websocket.scope["state"].get("salt", b"")
        self.fields = events.SessionFields(model=name)
        self.conversation = Conversation()
        self.id = new_name("sess_")
        self.conversation_id = new_name("conv_")
        self.response: Response | None = None
        self._websocket = websocket
        self._limits = service.settings.limits
        self._feeder = Feeder(self)
        self._tasks: set[asyncio.Task[None]] = set()
        self._started = time.monotonic()
        self._count = {"events": 0, "responses": 0, "errors": 0}

    @property
    def form(self) -> str:
        """How the prompt is made: as was asked, else through a template if the model has one of its own."""
        tokenizer = self.service.prompts.tokenizer
        own = tokenizer.chat_template or self.service.settings.chat_template
        return self.fields.prompt_format or ("chat" if own else "text")

    # ---- the connection -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until either side ends it."""
        self._task(self._feeder.run())
        await self.say("session.created", session=self.about())
        with contextlib.suppress(WebSocketDisconnect):
            async for frame in self._frames():
                self._count["events"] += 1
                if not await self._take(frame):
                    return

    async def _frames(self) -> AsyncIterator[bytes]:
        """Frames as they come. A connection on which nothing happens for long is closed; so is one that sends bytes
        which are no text."""
        while True:
            try:
                async with asyncio.timeout(self._limits.idle_seconds):
                    message = await self._websocket.receive()
            except TimeoutError:
                if self.response is not None:  # listening to an answer is not idleness
                    continue
                await self._close(GOING_AWAY, "nothing was said for too long")
                return
            if message["type"] == "websocket.disconnect":
                return
            data = message.get("bytes")
            yield data if data is not None else message["text"].encode("utf-8", "surrogatepass")

    async def _take(self, frame: bytes) -> bool:
        """Do what a frame asks for. False: the connection is closed."""
        arrival_ns = time.monotonic_ns()
        try:
            jsonbody.check(frame)
            if not frame.lstrip()[:1] == b"{":
                raise InputError("an event is a JSON object", code="invalid_json")
        except InputError as error:
            await self.fail(error)
            if error.code == "invalid_json" and not _is_object(frame):
                await self._close(BAD_FRAME, "a frame that is no JSON object")
                return False
            return True
        event_id: str | None = None
        try:
            event: Any = jsonbody.decode(frame, _CLIENT_EVENT)
            event_id = event.event_id
            await _HANDLERS[type(event)](self, event, arrival_ns)
        except HaomiaoError as error:
            await self.fail(error, event_id or _event_id(frame))
        return True

    async def say(self, kind: str, **fields: Any) -> None:
        """One event to the client. A client that does not read for too long is disconnected."""
        if self._websocket.application_state is not WebSocketState.CONNECTED:
            return
        data = jsonbody.dump({"type": kind, "event_id": new_name("event_"), **fields})
        try:
            async with asyncio.timeout(self._limits.stall_seconds):
                await self._websocket.send_text(data.decode())
        except (TimeoutError, RuntimeError, WebSocketDisconnect) as error:
            raise WebSocketDisconnect(1006) from error

    async def fail(self, error: HaomiaoError, event_id: str | None = None) -> None:
        """Say an error."""
        self._count["errors"] += 1
        await self.say("error", error={**error_body(error)["error"], "event_id": event_id})

    async def _close(self, code: int, reason: str) -> None:
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
            await self._websocket.close(code, reason)

    async def end(self) -> None:
        """Give everything back, whoever ended the connection."""
        if self.response is not None:
            self.response.cancel("client_cancelled")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._feeder.close()
        seconds = round(time.monotonic() - self._started, 3)
        logs.event("realtime", id=self._websocket.scope["state"].get("request_id"), seconds=seconds, **self._count)

    def _task(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, (HaomiaoError, WebSocketDisconnect)):
            _log.error("a realtime session failed", exc_info=error)

    # ---- session --------------------------------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """The session as the server shows it."""
        hello, fields = self.service.hello, self.fields
        shown = {name: value for name, value in msgspec.structs.asdict(fields).items() if value is not None}
        return {
            **shown,
            "id": self.id,
            "object": "realtime.session",
            "type": "realtime",
            "model": self.name,
            "output_modalities": ["text"],
            "max_output_tokens": fields.max_output_tokens or "inf",
            "instructions": fields.instructions or "",
            "prompt_format": self.form,
            "haomiao": {
                "points": list(self.service.settings.points or hello.points),
                "point": hello.point,
                "errors": hello.errors,
                "max_model_len": hello.max_request_tokens,
            },
        }

    async def _session_update(self, event: events.SessionUpdate, arrival_ns: int) -> None:
        check_fields(self.service, event.session)
        self.fields = events.merged(self.fields, event.session)
        await self.say("session.updated", session=self.about())
        self._feeder.poke()

    # ---- conversation ---------------------------------------------------------------------------------------------

    async def _item_create(self, event: events.ItemCreate, arrival_ns: int) -> None:
        given = event.item
        item = Item(given.id or new_name("item_"), given.role, "\n".join(texts_of(given)))
        await self.add(item, event.previous_item_id)
        self._feeder.poke()

    async def add(self, item: Item, after: str | None = None) -> None:
        """Put a message into the conversation and say so."""
        before = self.conversation.add(item, after)
        shown = events.message_item(item.id, item.role, item.text, item.status)
        await self.say("conversation.item.added", previous_item_id=before, item=shown)
        if item.status != "in_progress":
            await self.say("conversation.item.done", previous_item_id=before, item=shown)

    async def _item_delete(self, event: events.ItemDelete, arrival_ns: int) -> None:
        self.conversation.items.pop(self.conversation.place(event.item_id))
        await self.say("conversation.item.deleted", item_id=event.item_id)
        self._feeder.poke()

    async def _item_retrieve(self, event: events.ItemRetrieve, arrival_ns: int) -> None:
        item = self.conversation.items[self.conversation.place(event.item_id)]
        await self.say(
            "conversation.item.retrieved", item=events.message_item(item.id, item.role, item.text, item.status)
        )

    async def _append(self, event: events.BufferAppend, arrival_ns: int) -> None:
        await self._hear(self.conversation.buffer + event.text)

    async def _replace(self, event: events.BufferReplace, arrival_ns: int) -> None:
        if event.start > len(self.conversation.buffer):
            self.conversation.replace(event.start, event.text)  # raises
        await self._hear(self.conversation.buffer[: event.start] + event.text)

    async def _hear(self, text: str) -> None:
        """The user says something: whoever speaks interrupts."""
        self.service.prompts.check_size(len(text.encode()), "text")
        self.conversation.buffer = text
        if self.response is not None and self.fields.interrupt_response is not False:
            self.response.cancel("turn_detected")
        self._feeder.poke()

    async def _clear(self, event: events.BufferClear, arrival_ns: int) -> None:
        self.conversation.buffer = ""
        await self.say("input_text_buffer.cleared")
        self._feeder.poke()

    async def _commit(self, event: events.BufferCommit, arrival_ns: int) -> None:
        text = self.conversation.buffer
        if not text:
            raise InputError("the buffer is empty", code="input_text_buffer_commit_empty")
        item = Item(new_name("item_"), "user", text)
        last = self.conversation.items[-1].id if self.conversation.items else None
        await self.say("input_text_buffer.committed", previous_item_id=last, item_id=item.id)
        self.conversation.buffer = ""
        await self.add(item)

    def computed(self, fed: Fed) -> None:
        """The engine has read so far."""
        about = {"tokens": fed.tokens, "cached_tokens": fed.cached, "ms": fed.ms}
        self._task(self._quietly(lambda: self.say("input_text_buffer.computed", haomiao=about)))

    async def _quietly(self, work: Callable[[], Awaitable[None]]) -> None:
        with contextlib.suppress(WebSocketDisconnect, HaomiaoError):
            await work()

    # ---- answers --------------------------------------------------------------------------------------------------

    async def _response_create(self, event: events.ResponseCreate, arrival_ns: int) -> None:
        if self.response is not None:
            raise InputError(
                f"{self.response.id} is still being given; cancel it first",
                code="conversation_already_has_active_response",
            )
        if event.response is not None:
            check_fields(self.service, event.response)
        fields = events.merged(self.fields, event.response)
        if self.service.draining:
            raise OverloadError("the server is stopping", code="not_ready")
        if self.service.in_flight >= self._limits.queue:
            raise OverloadError(f"{self._limits.queue} requests are in flight already", code="queue_full")
        self.service.rates.check(self._websocket.scope)
        self.response = Response(self, self._feeder, fields, arrival_ns)
        self._count["responses"] += 1
        self.service.in_flight += 1
        answering = self._task(self._quietly(partial(self._answer, self.response)))
        answering.add_done_callback(lambda task: self.service.done())  # also of a task that ends before it begins

    async def _answer(self, response: Response) -> None:
        try:
            await response.run()
        except (HaomiaoError, WebSocketDisconnect):
            raise
        except Exception:  # a mistake of ours: the client learns that, the log where
            self.release(response)
            await self.fail(EngineError("internal error"))
            raise
        finally:
            self.release(response)
            self._feeder.poke()

    def release(self, response: Response) -> None:
        """Another answer may be asked for; before the client is told that this one is done."""
        if self.response is response:
            self.response = None

    async def _response_cancel(self, event: events.ResponseCancel, arrival_ns: int) -> None:
        response = self.response
        if response is None or event.response_id not in (None, response.id):
            raise InputError("no such answer is being given", code="response_cancel_not_active", param="response_id")
        response.cancel("client_cancelled")


_CLIENT_EVENT: Any = events.ClientEvent
Handler = Callable[[Socket, Any, int], Any]
_HANDLERS: dict[type, Handler] = {
    events.SessionUpdate: Socket._session_update,
    events.ItemCreate: Socket._item_create,
    events.ItemDelete: Socket._item_delete,
    events.ItemRetrieve: Socket._item_retrieve,
    events.BufferAppend: Socket._append,
    events.BufferReplace: Socket._replace,
    events.BufferClear: Socket._clear,
    events.BufferCommit: Socket._commit,
    events.ResponseCreate: Socket._response_create,
    events.ResponseCancel: Socket._response_cancel,
}


def check_fields(service: Service, fields: events.SessionFields) -> None:
    """Refuse what a session or response cannot be told. Raises `InputError`."""
    service.check_points(fields)
    if fields.model is not None:
        service.check_model(fields.model)
    if fields.n not in (None, 1):
        raise InputError("n must be 1: one answer is given at a time", param="n")
    for name in ("audio", "prompt", "tools"):
        if getattr(fields, name):
            raise InputError(f"{name}: not supported here", param=name, code="unsupported_parameter")


def texts_of(item: events.MessageItem) -> list[str]:
    """Texts of a message's parts. Raises `InputError` for parts that are none."""
    texts = []
    for number, part in enumerate(item.content):
        where = f"item.content[{number}]"
        if part.type not in ("input_text", "output_text", "text") or part.text is None:
            raise InputError(f"{where}: {part.type[:40]!r} is not supported: this model reads text", param=where)
        texts.append(part.text)
    return texts


def _is_object(frame: bytes) -> bool:
    """True if a frame is a JSON object, though perhaps one that goes beyond a limit."""
    try:
        return isinstance(msgspec.json.decode(frame), dict)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False


def _event_id(frame: bytes) -> str | None:
    """The id of an event that was refused, to name it in the error."""
    try:
        found = msgspec.json.decode(frame).get("event_id")
    except (msgspec.MsgspecError, UnicodeDecodeError, AttributeError):
        return None
    return found[:512] if isinstance(found, str) else None
