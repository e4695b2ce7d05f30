"""/v1/realtime over real sockets: events, reading ahead, corrections, barge-in, limits, and OpenAI's own client."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.serve.conftest import Running

STORY = "Once upon a time there was a little girl who lived in a house by the sea."


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


@pytest.fixture
def client(live: Running) -> Iterator[Client]:
    with session(live) as opened:
        assert opened.hear()["type"] == "session.created"
        yield opened


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


# ---- reading ahead ------------------------------------------------------------------------------------------------


def test_what_is_said_is_read_while_it_arrives(live: Running, client: Client) -> None:
    for word in STORY.split(" "):
        client.say("input_text_buffer.append", text=word if word == "Once" else " " + word)
        client.computed()
    client.say("input_text_buffer.commit")
    response = client.answer(max_output_tokens=8)
    receipt = response["haomiao"]["receipt"]
    assert receipt["cached_tokens"] >= receipt["prompt_tokens"] - 1  # the last token's logits are always computed
    assert text_of(response) == whole(live, STORY, 8)
    assert response["status"] == "incomplete"
    assert response["usage"]["output_tokens"] == 8
    assert response["usage"]["input_tokens"] == receipt["prompt_tokens"]


def test_the_order_of_events_is_openais(client: Client) -> None:
    client.say("input_text_buffer.append", text="Once upon")
    client.say("input_text_buffer.commit")
    client.answer(max_output_tokens=2)
    kinds = [event["type"] for event in client.heard if event["type"] != "input_text_buffer.computed"]
    assert kinds == [
        "session.created",
        "input_text_buffer.committed",
        "conversation.item.added",
        "conversation.item.done",
        "response.created",
        "response.output_item.added",
        "conversation.item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "conversation.item.done",
        "response.done",
    ]
    assert len({event["event_id"] for event in client.heard}) == len(client.heard)
    deltas = [event for event in client.heard if event["type"] == "response.output_text.delta"]
    assert {event["haomiao"]["point"] for event in deltas} <= {"int8", "int4"}


def test_a_correction_computes_what_it_changes(live: Running, client: Client) -> None:
    client.say("input_text_buffer.append", text=STORY)
    before = client.computed()["tokens"]
    start = STORY.index("sea.")
    client.say("input_text_buffer.replace", start=start, text="river.")
    about = client.computed()
    assert before - 4 <= about["cached_tokens"] < about["tokens"]  # all but the tail was kept
    client.say("input_text_buffer.commit")
    assert text_of(client.answer(max_output_tokens=6)) == whole(live, STORY[:start] + "river.", 6)


@settings(max_examples=8)
@given(
    st.lists(
        st.tuples(st.sampled_from(["append", "replace"]), st.integers(0, 60), st.text(" abcdéß毫秒🚀\n", max_size=6)),
        min_size=1,
        max_size=7,
    )
)
def test_any_way_of_saying_it_gives_the_same_answer(live: Running, edits: list[tuple[str, int, str]]) -> None:
    said = ""
    with session(live) as client:
        client.hear()
        for kind, place, text in [("append", 0, "The cat sat on"), *edits]:
            start = min(place, len(said))
            if kind == "append":
                said += text
                client.say("input_text_buffer.append", text=text)
            else:
                said = said[:start] + text
                client.say("input_text_buffer.replace", start=start, text=text)
        if not said:
            return
        client.say("input_text_buffer.commit")
        answer = text_of(client.answer(max_output_tokens=5))
    assert answer == whole(live, said, 5)


def test_a_conversation_goes_on_from_its_answers(client: Client) -> None:
    client.say("conversation.item.create", item=message("user", STORY))
    first = client.answer(max_output_tokens=12)["haomiao"]["receipt"]
    client.say("input_text_buffer.append", text=" And then")
    while client.computed()["tokens"] <= first["prompt_tokens"] + first["completion_tokens"]:
        pass  # the answer itself is read first
    client.say("input_text_buffer.commit")
    second = client.answer(max_output_tokens=4)["haomiao"]["receipt"]
    assert second["prompt_tokens"] > first["prompt_tokens"] + 8
    assert second["cached_tokens"] >= second["prompt_tokens"] - 1


def test_text_during_an_answer_ends_it(start: Callable[..., Running]) -> None:
    server = start(pause=0.01)
    with session(server) as client:
        client.hear()
        client.say("conversation.item.create", item=message("user", "Tell me a story."))
        client.say("response.create", response={"max_output_tokens": 10_000})
        client.until("response.output_text.delta")
        client.say("input_text_buffer.append", text="No,")
        response = client.until("response.done")["response"]
        assert response["status"] == "cancelled"
        assert response["status_details"] == {"type": "cancelled", "reason": "turn_detected"}
        assert text_of(response).startswith(" w0")
        client.say("session.update", session={"interrupt_response": False})
        client.until("session.updated")
        client.say("response.create", response={"max_output_tokens": 20})
        client.until("response.output_text.delta")
        client.say("input_text_buffer.append", text=" and")
        assert client.until("response.done")["response"]["status"] == "incomplete"


def test_an_answer_can_be_cancelled(start: Callable[..., Running]) -> None:
    server = start(pause=0.01)
    with session(server) as client:
        client.hear()
        client.say("conversation.item.create", item=message("user", "Hi"))
        client.say("response.create", response={"max_output_tokens": 10_000})
        response = client.until("response.created")["response"]
        client.until("response.output_text.delta")
        client.say("response.create")
        assert client.until("error")["error"]["code"] == "conversation_already_has_active_response"
        client.say("response.cancel", response_id="another")
        assert client.until("error")["error"]["code"] == "response_cancel_not_active"
        client.say("response.cancel", response_id=response["id"])
        done = client.until("response.done")["response"]
        assert done["status_details"]["reason"] == "client_cancelled"
        assert client.answer(max_output_tokens=2)["status"] == "incomplete"
    until = time.monotonic() + 10
    while server.service.in_flight and time.monotonic() < until:
        time.sleep(0.01)
    assert server.service.in_flight == 0


# ---- session and conversation -------------------------------------------------------------------------------------


def test_fields_of_the_session_and_of_one_response(client: Client) -> None:
    client.say("session.update", session={"type": "realtime", "max_output_tokens": 3, "temperature": 0.8, "seed": 5})
    updated = client.until("session.updated")["session"]
    assert (updated["max_output_tokens"], updated["seed"]) == (3, 5)
    client.say("conversation.item.create", item=message("user", "Once"))
    one = client.answer(conversation="none")
    assert one["usage"]["output_tokens"] == 3
    assert one["conversation_id"] is None
    same = client.answer(conversation="none")
    assert text_of(one) == text_of(same)  # nothing was added, and the seed is kept
    assert client.answer(max_output_tokens=1)["usage"]["output_tokens"] == 1


def test_a_budget_is_kept_and_accounted_for(client: Client) -> None:
    client.say("conversation.item.create", item=message("user", "Once upon a time"))
    response = client.answer(max_output_tokens=4, budget_ms=30_000)
    receipt = response["haomiao"]["receipt"]
    assert receipt["budget_ms"] == 30_000
    assert receipt["outcome"] in ("met", "met_lower_point")
    assert receipt["total_ms"] <= 30_000


def test_a_budget_that_cannot_be_kept_fails_the_response_alone(client: Client) -> None:
    client.say("conversation.item.create", item=message("user", STORY * 20))
    response = client.answer(max_output_tokens=500, budget_ms=0.001)
    assert response["status"] in ("failed", "incomplete")
    if response["status"] == "failed":
        assert response["status_details"]["error"]["type"] in ("budget_error", "deadline_error", "overloaded_error")
    assert client.answer(max_output_tokens=1)["usage"]["output_tokens"] == 1


def test_a_choice_is_one_of_its_options(client: Client) -> None:
    client.say("conversation.item.create", item=message("user", "The sky is"))
    response = client.answer(structured_outputs={"choice": [" blue", " green"]})
    assert text_of(response) in (" blue", " green")
    assert set(response["haomiao"]["scores"]) == {" blue", " green"}
    client.say("response.create", response={"structured_outputs": {"regex": "[0-9]{3}"}})
    assert text_of(client.until("response.done")["response"]).isdigit()


def test_items_come_and_go(client: Client) -> None:
    client.say("conversation.item.create", item=message("user", "b", id="two"))
    client.say("conversation.item.create", item=message("user", "a", id="one"), previous_item_id="root")
    client.say("conversation.item.create", item=message("assistant", "c", id="three"), previous_item_id="two")
    added = [client.until("conversation.item.added") for _ in range(3)]
    assert [each["previous_item_id"] for each in added] == [None, None, "two"]
    client.say("conversation.item.retrieve", item_id="three")
    assert client.until("conversation.item.retrieved")["item"]["content"] == [{"type": "output_text", "text": "c"}]
    client.say("conversation.item.delete", item_id="one")
    assert client.until("conversation.item.deleted")["item_id"] == "one"
    for event, code in (
        ({"type": "conversation.item.delete", "item_id": "one"}, "item_not_found"),
        ({"type": "conversation.item.create", "item": message("user", "x", id="two")}, "item_exists"),
        ({"type": "input_text_buffer.commit"}, "input_text_buffer_commit_empty"),
    ):
        client.say(**{("kind" if name == "type" else name): value for name, value in event.items()})
        assert client.until("error")["error"]["code"] == code


@pytest.mark.parametrize(
    ("event", "param"),
    [
        ({"type": "nothing"}, "type"),
        ({"event_id": "e1"}, "type"),
        ({"type": "input_text_buffer.append"}, "text"),
        ({"type": "input_text_buffer.append", "text": 5}, "text"),
        ({"type": "input_text_buffer.append", "text": "a", "more": 1}, "more"),
        ({"type": "input_text_buffer.replace", "start": -1, "text": ""}, "start"),
        ({"type": "input_text_buffer.replace", "start": 9, "text": ""}, "start"),
        ({"type": "session.update", "session": {"temperature": 1e9}}, "session.temperature"),
        ({"type": "session.update", "session": {"output_modalities": ["audio"]}}, "session.output_modalities[0]"),
        ({"type": "session.update", "session": {"tools": [{}]}}, "tools"),
        ({"type": "session.update", "session": {"audio": {"output": {}}}}, "audio"),
        ({"type": "session.update", "session": {"n": 2}}, "n"),
        ({"type": "session.update", "session": {"model": "another"}}, "model"),
        ({"type": "session.update", "session": {"min_point": "full"}}, "min_point"),
        ({"type": "response.create", "response": {"budget_ms": 0}}, "response.budget_ms"),
        ({"type": "response.create", "response": {"budget_ms": True}}, "response.budget_ms"),
        ({"type": "conversation.item.create", "item": {"type": "function_call"}}, "item.type"),
        (
            {
                "type": "conversation.item.create",
                "item": {"role": "user", "content": [{"type": "input_image", "image_url": "http://169.254.169.254/"}]},
            },
            "item.content[0]",
        ),
    ],
)
def test_what_is_wrong_is_an_event_and_the_connection_goes_on(
    client: Client, event: dict[str, Any], param: str
) -> None:
    client.socket.send(json.dumps({"event_id": "mine", **event}))
    error = client.until("error")["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["event_id"] == event.get("event_id", "mine")
    client.say("input_text_buffer.append", text="Once")
    assert client.computed()["tokens"] > 0


def test_an_empty_conversation_has_no_answer(client: Client) -> None:
    response = client.answer()
    assert response["status"] in ("failed", "completed", "incomplete")  # a model with BOS may begin from nothing


def test_text_over_the_context_is_refused_by_its_size(client: Client) -> None:
    client.say("input_text_buffer.append", text="word " * 190_000)
    assert client.until("error")["error"]["code"] == "context_length_exceeded"
    client.say("input_text_buffer.append", text="word " * 3000)  # fits in bytes, not in tokens
    client.say("input_text_buffer.commit")
    response = client.answer(max_output_tokens=1)
    assert response["status_details"]["error"]["code"] == "context_length_exceeded"
    assert client.heard[-1]["type"] == "response.done"


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


# ---- OpenAI's own client ------------------------------------------------------------------------------------------


def test_openais_client_speaks_to_it(live: Running) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused")
    if not hasattr(client, "realtime"):
        pytest.skip("this version of openai has no realtime client")
    text, usage = "", None
    with client.realtime.connect(model=live.service.names[0]) as connection:
        connection.session.update(session={"type": "realtime", "output_modalities": ["text"], "max_output_tokens": 4})
        connection.conversation.item.create(item=message("user", "Once upon a time"))
        connection.response.create()
        for event in connection:
            if event.type == "response.output_text.delta":
                text += event.delta
            elif event.type == "response.done":
                usage = event.response.usage
                assert event.response.status == "incomplete"
                assert event.response.output[0].content[0].text == text
                break
    assert usage.output_tokens == 4
    assert text
