"""/v1/chat/completions: whole and streamed answers, their receipts, and what is refused."""

from __future__ import annotations

import json

from haomiao.models.open import EMBEDDED
from tests.serve.conftest import CHAT, Running


def events(text: str) -> list[str]:
    """The data of server-sent events, whose framing is checked on the way."""
    found = []
    assert text.endswith("\n\n")
    for block in text[:-2].split("\n\n"):
        (line,) = block.split("\n")
        assert line.startswith("data: ")
        found.append(line.removeprefix("data: "))
    return found


def test_answer(live: Running) -> None:
    response = live.chat()
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "chat.completion" and body["model"] == EMBEDDED
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] in ("stop", "length")
    assert body["usage"]["completion_tokens"] == body["haomiao"]["receipt"]["completion_tokens"] <= 4
    assert "total;dur=" in response.headers["server-timing"]


def test_stream_equals_whole(live: Running) -> None:
    whole = live.chat(max_tokens=12, seed=3, temperature=0.9).json()
    response = live.chat(max_tokens=12, seed=3, temperature=0.9, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, end = events(response.text)
    assert end == "[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks]
    text = "".join(c["delta"].get("content", "") for chunk in parsed for c in chunk["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert parsed[-1]["choices"] == [] and parsed[-1]["usage"] == whole["usage"]
    assert parsed[-1]["haomiao"]["receipt"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_receipt_is_the_last_event(live: Running) -> None:
    *_, last, end = events(live.chat(stream=True).text)
    assert end == "[DONE]"
    assert json.loads(last)["haomiao"]["receipt"]["prompt_tokens"] > 0
    assert json.loads(last)["choices"][0]["finish_reason"] in ("stop", "length")


def test_unknown_field_is_named(live: Running) -> None:
    response = live.chat(colour="red")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "colour"


def test_choice_takes_one_prefill(live: Running) -> None:
    body = live.chat(structured_outputs={"choice": ["yes", "no", "maybe"]}).json()
    assert body["choices"][0]["message"]["content"] in ("yes", "no", "maybe")
    scores = body["haomiao"]["scores"]
    assert set(scores) == {"yes", "no", "maybe"}
    assert max(scores, key=scores.__getitem__) == body["choices"][0]["message"]["content"]


def test_an_answer_that_was_chosen_instead_of_generated(start) -> None:  # type: ignore[no-untyped-def]
    """Its text comes as any other, and all that is said about it says so."""
    server = start()
    body = {**CHAT, "seed": 777, "structured_outputs": {"regex": "yes|no"}, "budget_ms": 50}
    whole = server.http.post("/v1/chat/completions", json=body).json()
    assert whole["choices"][0]["message"]["content"] == " w0" and whole["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["completion_tokens"] == 1
    assert whole["haomiao"]["finish_detail"] == "single_prefill" and "scores" not in whole["haomiao"]
    assert whole["haomiao"]["receipt"]["outcome"] == "met_single_prefill"
    streamed = server.http.post("/v1/chat/completions", json={**body, "stream": True}).text
    *chunks, last = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == " w0"
    assert last["choices"][0]["finish_reason"] == "stop" and last["haomiao"]["finish_detail"] == "single_prefill"
    answer = server.http.post("/v1/responses", json={"input": "hello", "seed": 777, "budget_ms": 50}).json()
    assert answer["status"] == "completed" and answer["output"][0]["content"][0]["text"] == " w0"
    assert 'outcome="met_single_prefill"} 3.0' in server.http.get("/metrics").text


def test_fake_engine_answers(start) -> None:  # type: ignore[no-untyped-def]
    body = start().http.post("/v1/chat/completions", json=CHAT).json()
    assert body["choices"][0]["message"]["content"] == " w0 w1 w2 w3"
