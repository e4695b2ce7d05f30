"""/v1/embeddings: forms of input and answer, budgets, limits, and what a model without hidden states says."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from haomiao.models.open import EMBEDDED
from haomiao.serve.embeddings import AT_ONCE, MAX_INPUTS, together
from haomiao.types import Receipt, ScheduleEntry
from tests.serve.conftest import Running

TEXT = "the sea is blue"


def embed(running: Running, given: Any, **more: Any) -> httpx.Response:
    headers = more.pop("headers", {})
    return running.http.post("/v1/embeddings", json={"input": given, **more}, headers=headers)


def vectors(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [each["index"] for each in data] == list(range(len(data)))
    assert {each["object"] for each in data} == {"embedding"}
    return [each["embedding"] for each in data]


def test_every_form_of_input_and_answer_gives_the_same_vector(live: Running) -> None:
    (plain,) = vectors(embed(live, TEXT))
    assert np.square(plain).sum() == pytest.approx(1.0, abs=1e-5)
    ids = live.http.post("/tokenize", json={"prompt": TEXT}).json()["tokens"]
    assert vectors(embed(live, ids)) == [plain]
    assert vectors(embed(live, [TEXT, ids[:2], TEXT]))[::2] == [plain, plain]
    assert vectors(embed(live, [ids, ids])) == [plain, plain]
    (encoded,) = vectors(embed(live, TEXT, encoding_format="base64", dimensions=len(plain)))
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(encoded), "<f4"), np.array(plain, np.float32))


def test_the_account_is_that_of_all_inputs(live: Running) -> None:
    ids = live.http.post("/tokenize", json={"prompt": TEXT}).json()["tokens"]
    response = embed(live, [TEXT, TEXT], budget_ms=60_000, user="somebody")
    body = response.json()
    assert body["object"] == "list" and body["model"] == EMBEDDED
    assert body["usage"] == {"prompt_tokens": 2 * len(ids), "total_tokens": 2 * len(ids)}
    receipt = body["haomiao"]["receipt"]
    assert receipt["outcome"] in ("met", "met_lower_point") and receipt["completion_tokens"] == 0
    assert sum(entry["tokens"] for entry in receipt["schedule"]) == 2 * len(ids)
    assert "budget;dur=60000" in response.headers["server-timing"]


def test_receipts_are_added_up() -> None:
    one = Receipt(queue_ms=3.0, total_ms=5.0, prompt_tokens=4, schedule=[ScheduleEntry("int8", 1, 4)], outcome="met")
    two = Receipt(queue_ms=1.0, total_ms=9.0, prompt_tokens=2, outcome="met")
    two.schedule = [ScheduleEntry("int4", 1, 1), ScheduleEntry("int8", 2, 1)]
    whole = together([one, two], two)
    assert (whole.queue_ms, whole.total_ms, whole.prompt_tokens) == (1.0, 9.0, 6)
    assert whole.schedule == [ScheduleEntry("int8", 3, 5), ScheduleEntry("int4", 1, 1)]
    one.outcome = "met_lower_point"
    assert together([one, two], two).outcome == "met_lower_point"


def test_text_that_spells_a_control_token_is_text(live: Running) -> None:
    """In a completion's prompt it would be the token."""
    end = "<|im_end|>"
    text, token = (
        embed(live, given).json()["usage"]["prompt_tokens"]
        for given in (end, live.http.post("/tokenize", json={"prompt": end}).json()["tokens"])
    )
    assert text >= token


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({}, 400, "missing_parameter", "input"),
        ({"input": []}, 400, "invalid_value", "input"),
        ({"input": ""}, 400, "invalid_value", "input"),
        ({"input": ["a", ""]}, 400, "invalid_value", "input"),
        ({"input": ["a", 1]}, 400, "invalid_value", "input"),
        ({"input": [1, "a"]}, 400, "invalid_value", "input"),
        ({"input": [1, [2]]}, 400, "invalid_value", "input"),
        ({"input": [[]]}, 400, "invalid_value", "input"),
        ({"input": [1 << 40]}, 400, "invalid_value", "input"),
        ({"input": [-1]}, 400, "invalid_value", "input"),
        ({"input": [1.5]}, 400, "invalid_value", "input"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, 400, "invalid_value", "input"),
        ({"input": [1] * 20_000}, 400, "context_length_exceeded", "input"),
        ({"input": "sea " * 20_000}, 400, "context_length_exceeded", "input"),
        ({"input": "a", "dimensions": 5}, 400, "invalid_value", "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, 400, "invalid_value", "encoding_format"),
        ({"input": "a", "model": "other"}, 404, "model_not_found", "model"),
        ({"input": "a", "point": "full"}, 400, "invalid_value", "point"),
        ({"input": "a", "stream": True}, 400, "unknown_parameter", "stream"),
        ({"input": "a", "budget_ms": 0}, 400, "invalid_value", "budget_ms"),
    ],
)
def test_what_is_refused(live: Running, body: dict[str, Any], status: int, code: str, param: str) -> None:
    response = live.http.post("/v1/embeddings", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), error
    assert error["param"].startswith(param)
    assert embed(live, "next").status_code == 200


def test_a_budget_that_cannot_be_kept_is_refused(live: Running) -> None:
    response = embed(live, [TEXT] * 3, headers={"x-budget-ms": "0.01"})
    assert response.status_code in (422, 429, 504)  # the last where reading the body took as long
    assert embed(live, TEXT).status_code == 200


def test_many_inputs_keep_their_order(start: Callable[..., Running]) -> None:
    running = start()
    many = [[number] for number in range(3 * AT_ONCE)]
    found = np.array(vectors(embed(running, many)))
    expected = np.array([[3.0, 4.0, 0.0, number] for number in range(len(many))])
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)
    assert running.service.supervisor.connection().in_flight == 0


def test_a_model_without_hidden_states(start: Callable[..., Running]) -> None:
    running = start(options={"hidden_size": 0})
    response = embed(running, TEXT)
    assert (response.status_code, response.json()["error"]["code"]) == (501, "unavailable")
    assert response.json()["error"]["param"] == "model"


# ---- refused by size, before anything is encoded --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/embeddings", lambda text: {"input": ["a", text]}),
        ("/v1/completions", lambda text: {"prompt": text}),
        ("/v1/completions", lambda text: {"prompt": text, "structured_outputs": {"choice": ["x", "y"]}}),
        ("/v1/chat/completions", lambda text: {"messages": [{"role": "user", "content": text}]}),
        ("/v1/responses", lambda text: {"input": text}),
        ("/tokenize", lambda text: {"prompt": text}),
        ("/tokenize", lambda text: {"messages": [{"role": "user", "content": text}]}),
    ],
)
@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_a_prompt_that_cannot_fit_is_never_encoded(
    live: Running, monkeypatch: pytest.MonkeyPatch, route: str, body: Any, kind: str
) -> None:
    prompts = live.service.prompts
    most = live.service.hello.max_request_tokens
    text = (
        "a " * ((most + 1) * prompts._wordiest)
        if kind == "words"
        else "\u6d77" * ((most + 1) * prompts._longest // 3 + 1)
    )
    encoded: list[int] = []
    tokenizer = prompts.tokenizer
    for name in ("encode", "encode_part"):
        known = getattr(tokenizer, name)

        def counting(given: str, *rest: Any, known: Any = known) -> Any:
            encoded.append(len(given))
            return known(given, *rest)

        monkeypatch.setattr(tokenizer, name, counting)
    error = live.http.post(route, json=body(text)).json()["error"]
    assert error["code"] == "context_length_exceeded" and "at least" in error["message"]
    assert error["param"] in body("")
    assert max(encoded, default=0) <= 1
