"""A server that says what it is told, over real sockets: what asks is tested apart from what answers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Reply = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]


def head(status: int, kind: str, *, length: int | None = None) -> bytes:
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return f"HTTP/1.1 {status} x\r\nContent-Type: {kind}\r\n{size}\r\n\r\n".encode()


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def whole(value: Any, status: int = 200) -> bytes:
    body = json.dumps(value).encode()
    return head(status, "application/json", length=len(body)) + body


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


@dataclass
class StandIn:
    """Answers POSTs with `reply`; keeps what was asked and how many connections were made."""

    reply: Reply
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    connections: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                top = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.headers.append(top)
                if top.startswith("GET"):
                    writer.write(whole({"data": [{"id": "stand-in"}]}))
                    continue
                length = int(top.lower().split("content-length: ")[1].split("\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                self.asked.append(body)
                await self.reply(body, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


async def stream_answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """A choice as one body, anything else as a stream of `max_tokens` tokens with a receipt."""
    receipt = {"total_ms": 1.0, "predicted_ms": 1.2, "outcome": "met", "schedule": [{"point": "int8", "tokens": 2}]}
    if not body["stream"]:
        option = body["structured_outputs"]["choice"][0]
        choice = {"text": option, "finish_reason": "stop"}
        writer.write(whole({"choices": [choice], "haomiao": {"receipt": receipt, "finish_detail": "done"}}))
        return
    writer.write(head(200, "text/event-stream"))
    count = body["max_tokens"]
    for index in range(count):
        finish = "length" if index == count - 1 else None
        data = event({"choices": [{"text": f"t{index} ", "finish_reason": finish}]})
        writer.write(chunk(data[:7]) + chunk(data[7:]))  # an event that is cut by the network is still one event
        await asyncio.sleep(0)
    usage = event({"choices": [], "usage": {"completion_tokens": count}, "haomiao": {"receipt": receipt}})
    writer.write(chunk(usage) + chunk(b"data: [DONE]\n\n") + chunk(b""))


@contextmanager
def running(reply: Reply) -> Iterator[StandIn]:
    """The server in a thread of its own, for clients that block."""
    server = StandIn(reply)
    loop = asyncio.new_event_loop()
    started = threading.Event()
    stop = asyncio.Event()

    async def main() -> None:
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        server.port = listening.sockets[0].getsockname()[1]
        started.set()
        await stop.wait()
        listening.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
