"""/v1/realtime over real sockets: events, reading ahead, corrections, barge-in, and OpenAI's own client."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.conftest import Running
from tests.serve.realtime_client import Client, message, session, text_of, whole

STORY = "Once upon a time there was a little girl who lived in a house by the sea."


@pytest.fixture
def client(live: Running) -> Iterator[Client]:
    with session(live) as opened:
        assert opened.hear()["type"] == "session.created"
        yield opened


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
