"""openai-python, as its users call it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import openai
import pytest

from haomiao.models.open import EMBEDDED as MODEL
from tests.serve.conftest import Running


@pytest.fixture(scope="module")
def client(live: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="unused", max_retries=0) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hello"}],
        max_completion_tokens=6,
        n=2,
        seed=1,
        temperature=1.0,
        logprobs=True,
        top_logprobs=2,
        extra_body={"budget_ms": 30_000, "on_budget": "degrade"},
    )
    assert len(answer.choices) == 2 and answer.usage is not None
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content is not None
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    assert answer.model_extra is not None
    assert answer.model_extra["haomiao"]["receipt"]["outcome"] in ("met", "met_lower_point", "truncated")


def test_chat_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=6,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].usage is not None and chunks[-1].choices == []
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")


def test_structured_output(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"], "additionalProperties": False}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hello"}],
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        max_tokens=200,
    )
    assert (answer.choices[0].message.content or "").lstrip().startswith("{")


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=3, echo=True, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.token_logprobs is not None
    streamed = client.completions.create(model=MODEL, prompt="a", max_tokens=3, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed)


def test_embeddings(client: openai.OpenAI) -> None:
    """The client asks for base64 unless told otherwise, and decodes it."""
    found = client.embeddings.create(model=MODEL, input=["hello there", "the sea"])
    assert [each.index for each in found.data] == [0, 1] and found.usage.total_tokens == found.usage.prompt_tokens > 2
    plain = client.embeddings.create(
        model=MODEL, input="the sea", encoding_format="float", extra_body={"budget_ms": 30_000}
    )
    assert plain.data[0].embedding == pytest.approx(found.data[1].embedding, abs=1e-7)
    assert sum(value * value for value in plain.data[0].embedding) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(openai.BadRequestError) as cut:
        client.embeddings.create(model=MODEL, input="x", dimensions=7)
    assert cut.value.param == "dimensions"


def test_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="hello", instructions="Be brief.", max_output_tokens=6)
    assert answer.output_text and answer.usage is not None
    kinds = [
        event.type for event in client.responses.create(model=MODEL, input="hello", max_output_tokens=4, stream=True)
    ]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert "response.output_text.delta" in kinds


def test_responses_with_history_and_tools(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model=MODEL,
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
            {"type": "function_call", "call_id": "c1", "name": "light", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "on"},
        ],
        tools=[{"type": "function", "name": "light", "parameters": {"type": "object"}, "strict": False}],
        max_output_tokens=4,
    )
    assert answer.status in ("completed", "incomplete")


def test_errors_have_their_classes(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-99", messages=messages)  # type: ignore[arg-type]
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=MODEL, messages=messages, n=17)  # type: ignore[arg-type]
    assert wrong.value.param == "n"


def test_a_spent_budget_is_not_retried(live: Running) -> None:
    """The client would try twice more by itself, if the answer did not forbid it."""
    answered = [live.service.metrics.http.labels("/v1/chat/completions", status)._value for status in ("422", "504")]
    before = sum(value.get() for value in answered)
    client = openai.OpenAI(base_url=live.url + "/v1", api_key="unused", max_retries=2)
    with client, pytest.raises(openai.APIStatusError):
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x"}], extra_body={"budget_ms": 0.001}
        )
    until = time.monotonic() + 10.0
    while sum(value.get() for value in answered) == before and time.monotonic() < until:
        time.sleep(0.01)  # an answer is counted after its last byte
    assert sum(value.get() for value in answered) == before + 1
