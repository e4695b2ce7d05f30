"""Limits of /v1/realtime (FAULTS 41), and what an engine's end does to its sessions."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.websockets import WebSocketState
from websockets.exceptions import InvalidStatus

from haomiao.serve import realtime_events as events
from haomiao.serve.realtime import Socket
from haomiao.serve.service import Service
from haomiao.serve.settings import Settings
from tests.serve.conftest import Running
from tests.serve.realtime_client import Client, message, session, text_of

STORY = "Once upon a time there was a little girl who lived in a house by the sea."


@pytest.fixture
def client(live: Running) -> Iterator[Client]:
    with session(live) as opened:
        assert opened.hear()["type"] == "session.created"
        yield opened


# ---- limits (FAULTS 41) -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", ["{", "not JSON", "[1]", '"text"', b"\xff\xfe", '{"type": "x"} {"type": "y"}'])
def test_a_frame_that_is_no_json_object_ends_the_connection(live: Running, frame: str | bytes) -> None:
    with session(live) as client:
        client.hear()
        client.socket.send(frame)
        assert client.ends()[0] == 1007
    assert [event["type"] for event in client.heard] == ["session.created", "error"]


def test_text_that_is_not_utf8_ends_the_connection(live: Running) -> None:
    with session(live) as client:
        client.hear()
        client.socket.send(b"\xff\xfe\xfd", text=True)
        assert client.ends()[0] == 1007


def test_deep_and_doubled_json_are_refused(client: Client) -> None:
    for frame in ('{"type": "response.create", "type": "response.cancel"}', '{"a":' * 100 + "1" + "}" * 100):
        client.socket.send(frame)
        assert client.until("error")["error"]["code"] == "invalid_json"
    client.say("input_text_buffer.clear")
    assert client.until("input_text_buffer.cleared")


def test_a_frame_over_one_mebibyte_ends_the_connection(live: Running) -> None:
    with session(live) as client:
        client.hear()
        client.socket.send("x" * ((1 << 20) + 1))
        assert client.ends()[0] == 1009
    with session(live) as client:
        assert client.hear()["type"] == "session.created"


def test_an_idle_connection_is_closed(start: Callable[..., Running]) -> None:
    server = start(idle_seconds=0.2)
    with session(server) as client:
        client.hear()
        assert client.ends()[0] == 1001


def test_listening_is_not_idleness(start: Callable[..., Running]) -> None:
    server = start(idle_seconds=0.2, pause=0.05)
    with session(server) as client:
        client.hear()
        client.say("conversation.item.create", item=message("user", "x"))
        assert client.answer(max_output_tokens=12)["status"] == "incomplete"


def test_a_foreign_origin_is_refused(live: Running, start: Callable[..., Running]) -> None:
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{live.port}.evil.example"):
        with pytest.raises(InvalidStatus) as refused, session(live, origin=origin):
            pass
        assert refused.value.response.status_code == 403
    with session(live, origin=live.url) as client:
        assert client.hear()["type"] == "session.created"
    other = start(origins=("https://app.example",))
    with session(other, origin="https://app.example") as client:
        assert client.hear()["type"] == "session.created"


def test_a_key_is_needed_where_the_server_has_one(start: Callable[..., Running]) -> None:
    server = start(api_keys=("secret",))
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        with pytest.raises(InvalidStatus) as refused, session(server, additional_headers=headers):
            pass
        assert refused.value.response.status_code == 401
    with session(server, additional_headers={"Authorization": "Bearer secret"}) as client:
        assert client.hear()["type"] == "session.created"
    browser = ["realtime", "openai-insecure-api-key.secret"]
    with session(server, subprotocols=browser) as client:
        assert client.socket.subprotocol == "realtime"
        assert client.hear()["type"] == "session.created"


def test_an_unknown_model_is_refused_before_the_connection(live: Running) -> None:
    with pytest.raises(InvalidStatus) as refused, session(live, "/v1/realtime?model=another"):
        pass
    assert refused.value.response.status_code == 404
    assert json.loads(refused.value.response.body or b"{}")["error"]["code"] == "model_not_found"


def test_there_are_only_so_many_connections(start: Callable[..., Running]) -> None:
    server = start(queue=2)
    with session(server) as one, session(server) as two:
        one.hear(), two.hear()
        with pytest.raises(InvalidStatus) as refused, session(server):
            pass
        assert refused.value.response.status_code == 429
    until = time.monotonic() + 10
    while server.service.sockets and time.monotonic() < until:
        time.sleep(0.01)
    with session(server) as again:
        assert again.hear()["type"] == "session.created"


# ---- the engine ---------------------------------------------------------------------------------------------------


def test_answers_count_towards_the_rate_limit(start: Callable[..., Running]) -> None:
    """Six a minute is one in ten seconds, whatever it is asked through."""
    running = start(rate=6.0)
    with session(running) as client:
        client.say("conversation.item.create", item=message("user", "hello"))
        client.say("response.create", response={"max_output_tokens": 2})
        client.until("response.done")
        client.say("response.create", response={"max_output_tokens": 2})
        assert client.until("error")["error"]["code"] == "rate_limited"
    assert running.chat().status_code == 429


def test_the_session_outlives_a_crash_of_the_engine(start: Callable[..., Running]) -> None:
    server = start()
    with session(server) as client:
        client.hear()
        client.say("input_text_buffer.append", text="Hello there")
        client.computed()
        os.kill(server.service.supervisor.pid or 0, signal.SIGKILL)
        until = time.monotonic() + 30
        while not (server.service.supervisor.crashes and server.service.is_ready) and time.monotonic() < until:
            time.sleep(0.02)
        client.say("input_text_buffer.commit")
        assert text_of(client.answer(max_output_tokens=2)) == " w0 w1"


def test_an_engine_that_dies_fails_the_answer(start: Callable[..., Running]) -> None:
    server = start(options={"crash_at": 2})
    with session(server) as client:
        client.hear()
        client.say("conversation.item.create", item=message("user", "Hi"))
        response = client.answer(max_output_tokens=50, seed=666)
        assert response["status"] == "failed"
        assert response["status_details"]["error"]["code"] == "engine_error"


def test_sessions_leave_nothing_behind(live: Running) -> None:
    def used() -> tuple[int, int]:
        stats = live.service.supervisor.stats
        return stats.kv_blocks - stats.kv_free, stats.running

    def settled() -> tuple[int, int]:
        until = time.monotonic() + 20
        while used()[1] and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(1.1)  # two beats of the engine's pulse
        return used()

    before = settled()
    for kind in ("fed", "answering", "cancelled"):
        for _ in range(4):
            with session(live) as client:
                client.hear()
                client.say("input_text_buffer.append", text=STORY * 3)
                if kind == "fed":
                    client.computed()
                    continue
                client.say("input_text_buffer.commit")
                client.say("response.create", response={"max_output_tokens": 400, "ignore_eos": True})
                client.until("response.output_text.delta")
                if kind == "cancelled":
                    client.say("response.cancel")
                    client.until("response.done")
    after = settled()
    assert after[1] == before[1] == 0
    assert after[0] <= before[0]
    assert live.service.sockets == 0


def test_keys_and_sessions_do_not_share_prefixes(start: Callable[..., Running]) -> None:
    server = start(fake=False, api_keys=("one", "two"))
    cached = []
    for key in ("one", "two", "one"):
        with session(server, additional_headers={"Authorization": f"Bearer {key}"}) as client:
            client.hear()
            client.say("input_text_buffer.append", text=STORY * 4)
            client.until("input_text_buffer.computed")
            client.say("input_text_buffer.commit")
            client.answer(max_output_tokens=1)
            cached.append(next(e["haomiao"]["cached_tokens"] for e in client.heard if "computed" in e["type"]))
    assert cached[1] == 0
    assert cached[2] > 0


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_an_answer_whose_task_never_began_is_not_counted_for_ever(turns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection ends in the moment in which an answer was asked for: its task is cancelled before it begins."""

    monkeypatch.setattr(Service, "max_kl", None)  # it asks the model, of which there is none here

    async def ended_at_once() -> int:
        service = Service(Settings())
        websocket: Any = SimpleNamespace(scope={"state": {}}, application_state=WebSocketState.DISCONNECTED)
        socket = Socket(websocket, service, "m")
        await socket._response_create(events.ResponseCreate(), 0)
        assert service.in_flight == 1
        for _ in range(turns):
            await asyncio.sleep(0)
        await socket.end()
        service.prompts.close()
        return service.in_flight

    assert asyncio.run(ended_at_once()) == 0
