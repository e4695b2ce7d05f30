"""/v1/completions: forms of prompts, echo, log-probabilities, several prompts and samples, streams."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.serve.conftest import Running
from tests.serve.test_chat import events


def ask(live: Running, **body: Any) -> dict[str, Any]:
    response = live.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_default_is_sixteen_tokens(live: Running) -> None:
    body = ask(live, prompt="The sea is", ignore_eos=True)
    assert body["object"] == "text_completion"
    assert body["usage"]["completion_tokens"] == 16


def test_text_and_ids_are_the_same_prompt(live: Running) -> None:
    ids = live.http.post("/tokenize", json={"prompt": "The sea is"}).json()["tokens"]
    text = ask(live, prompt="The sea is", max_tokens=8)
    by_ids = ask(live, prompt=ids, max_tokens=8)
    nested = ask(live, prompt=[ids, "The sea is"], max_tokens=8)
    assert by_ids["choices"][0]["text"] == text["choices"][0]["text"]
    assert [choice["text"] for choice in nested["choices"]] == [text["choices"][0]["text"]] * 2
    assert [choice["index"] for choice in nested["choices"]] == [0, 1]
    assert nested["usage"]["prompt_tokens"] == 2 * len(ids)


def test_echo_scores_the_prompt_as_lm_eval_asks(live: Running) -> None:
    ids = live.http.post("/tokenize", json={"prompt": "The old house stood"}).json()["tokens"]
    body = ask(live, prompt=[ids], max_tokens=1, echo=True, logprobs=1, temperature=0)
    (choice,) = body["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"].startswith("The old house stood")
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(ids) + 1
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    assert logprobs["text_offset"][0] == 0
    scored = ask(live, prompt=[ids], max_tokens=0, echo=True, logprobs=1)["choices"][0]
    assert scored["text"] == "The old house stood"
    assert scored["logprobs"]["token_logprobs"] == logprobs["token_logprobs"][:-1]


def test_prompt_logprobs_agree_with_generation(live: Running) -> None:
    """What the model chose, fed back as a prompt, scores the same."""
    first = ask(live, prompt="Once upon", max_tokens=6, logprobs=0)
    values = first["choices"][0]["logprobs"]["token_logprobs"]
    before = live.http.post("/tokenize", json={"prompt": "Once upon"}).json()["tokens"]
    whole = live.http.post("/tokenize", json={"prompt": "Once upon" + first["choices"][0]["text"]}).json()["tokens"]
    again = ask(live, prompt=whole, max_tokens=0, echo=True, logprobs=0)["choices"][0]["logprobs"]["token_logprobs"]
    if len(whole) == len(before) + 6:  # else the text is tokenized differently than it was generated
        assert again[len(before) :] == pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize("n", [1, 3])
def test_stream_equals_whole(live: Running, n: int) -> None:
    body = {"prompt": ["The sea", "A dog"], "max_tokens": 6, "n": n, "seed": 5, "temperature": 1.0}
    whole = ask(live, **body)
    response = live.http.post(
        "/v1/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}}
    )
    *chunks, end = events(response.text)
    assert end == "[DONE]"
    texts = [""] * (2 * n)
    for chunk in map(json.loads, chunks):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    usage = json.loads(chunks[-1])["usage"]
    assert usage["total_tokens"] == whole["usage"]["total_tokens"]


def test_choice_of_text(live: Running) -> None:
    body = ask(live, prompt="The capital of France is", structured_outputs={"choice": [" Paris", " Rome"]})
    assert body["choices"][0]["text"] in (" Paris", " Rome")
    assert body["usage"]["completion_tokens"] >= 1
    assert set(body["haomiao"]["scores"]) == {" Paris", " Rome"}


def test_constraints(live: Running) -> None:
    regex = ask(live, prompt="Number:", structured_outputs={"regex": "[0-9]{3}"}, max_tokens=8)
    assert regex["choices"][0]["text"].isdigit() and len(regex["choices"][0]["text"]) == 3
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    answer = ask(
        live,
        prompt="JSON:",
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        max_tokens=60,
    )
    assert json.loads(answer["choices"][0]["text"])["a"] in (1, 2)


def test_logit_bias_and_stop(live: Running) -> None:
    ids = live.http.post("/tokenize", json={"prompt": "The"}).json()["tokens"]
    body = ask(live, prompt="Hello", max_tokens=5, logit_bias={str(ids[-1]): 100})
    assert body["choices"][0]["text"] == "The" * 5
    body = ask(live, prompt="Hello", max_tokens=5, logit_bias={str(ids[-1]): 100}, stop="eThe")
    assert body["choices"][0]["text"] == "Th" and body["choices"][0]["finish_reason"] == "stop"


def test_seed_repeats(live: Running) -> None:
    first, again = (ask(live, prompt="The", max_tokens=8, temperature=1.0, seed=11) for _ in range(2))
    assert first["choices"] == again["choices"]


def test_tokenize_and_back(live: Running) -> None:
    text = "Hello, 世界! <|im_end|>"
    tokens = live.http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert live.http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"].strip() == text
    chat = live.http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]})
    assert chat.json()["count"] > 1


def test_a_repetition_penalty_that_no_logit_survives_is_refused(live: Running) -> None:
    for value in (1e-300, 1e-38, 0.0099):
        answer = live.http.post("/v1/completions", json={"prompt": "a b", "max_tokens": 2, "repetition_penalty": value})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "repetition_penalty"
    assert ask(live, prompt="a b", max_tokens=2, repetition_penalty=0.01)["usage"]["completion_tokens"] == 2


def test_names_of_other_servers_are_answered_with_ours(live: Running) -> None:
    for name, ours in (("guided_choice", "structured_outputs.choice"), ("n_predict", "max_tokens")):
        answer = live.http.post("/v1/completions", json={"prompt": "a", name: ["b"]})
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["code"] == "unknown_parameter" and error["param"] == name
        assert error["message"] == f"{name} is not a parameter; here it is {ours}"
    plain = live.http.post("/v1/completions", json={"prompt": "a", "frequency": 1}).json()["error"]
    assert plain["message"] == "frequency is not a parameter"
