"""A client of /v1/realtime for tests: what it says and hears."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.serve.conftest import Running


class Client:
    """What a client says and hears."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.heard: list[dict[str, Any]] = []

    def say(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def hear(self, seconds: float = 30) -> dict[str, Any]:
        event: dict[str, Any] = json.loads(self.socket.recv(timeout=seconds))
        self.heard.append(event)
        return event

    def until(self, kind: str) -> dict[str, Any]:
        """The next event of a kind; those before it stay in `heard`."""
        while True:
            event = self.hear()
            if event["type"] == kind:
                return event
            if event["type"] == "error" and kind != "error":
                raise AssertionError(event)

    def computed(self, tokens: int | None = None) -> dict[str, Any]:
        """Wait until so many tokens were read ahead."""
        while True:
            about: dict[str, Any] = self.until("input_text_buffer.computed")["haomiao"]
            if tokens is None or about["tokens"] == tokens:
                return about

    def answer(self, **fields: Any) -> dict[str, Any]:
        """Ask, and return the whole response."""
        self.say("response.create", response=fields)
        response: dict[str, Any] = self.until("response.done")["response"]
        return response

    def ends(self) -> tuple[int, str]:
        """Wait for the connection to be closed: code and reason."""
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                self.hear(10)
        assert closed.value.rcvd is not None
        return closed.value.rcvd.code, closed.value.rcvd.reason


@contextmanager
def session(server: Running, path: str = "/v1/realtime", **options: Any) -> Iterator[Client]:
    options.setdefault("compression", None)
    with connect(server.url.replace("http", "ws", 1) + path, proxy=None, **options) as socket:
        yield Client(socket)


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


def whole(live: Running, prompt: str, tokens: int, **fields: Any) -> str:
    """The same prompt asked over the same interface, all at once."""
    with session(live) as other:
        other.hear()
        other.say("conversation.item.create", item=message("user", prompt))
        return text_of(other.answer(max_output_tokens=tokens, **fields))


def message(role: str, text: str, **more: Any) -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}], **more}
