"""Faults 19-26, 32 and 33: budgets, schemas, patterns, templates, media, memory: what is wrong with what is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.serve.census import census, eventually, unharmed
from tests.serve.conftest import Running
from tests.serve.test_faults_http import assert_refused


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


@pytest.mark.parametrize("value", [0, -1, -0.5, 1e308])
def test_19_budget_not_positive(live: Running, value: float) -> None:
    assert_refused(live.chat(budget_ms=value), 400, param="budget_ms")
    assert_refused(live.chat(ttft_ms=value), 400, param="ttft_ms")


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-budget-ms", "0"),
        ("x-budget-ms", "-5"),
        ("x-budget-ms", "nan"),
        ("x-budget-ms", "1_0"),
        ("x-budget-ms", "soon"),
        ("grpc-timeout", "0m"),
        ("grpc-timeout", "5"),
        ("grpc-timeout", "123456789m"),
        ("grpc-timeout", "-1S"),
    ],
)
def test_19_budget_in_headers(live: Running, header: str, value: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert_refused(live.http.post("/v1/chat/completions", json=body, headers={header: value}), 400)


def test_19_impossible_even_idle(live: Running) -> None:
    """A budget that is over before the body is read is refused, and retrying is forbidden."""
    with unharmed(live):
        for path, body in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/responses", {"input": "x"}),
        ):
            response = live.http.post(path, json={**body, "budget_ms": 0.001})
            assert response.status_code in (422, 504), response.text
            assert response.json()["error"]["code"] in ("budget_infeasible", "budget_exhausted")
            assert response.headers["x-should-retry"] == "false"
        assert_refused(live.chat(ttft_ms=0.0001), 422, code="budget_infeasible", param="ttft_ms")


def test_20_budget_ends_mid_stream(live: Running) -> None:
    """An answer that is cut short says so, in OpenAI's words and in ours."""
    with unharmed(live):
        body = {"max_tokens": 1900, "ignore_eos": True, "budget_ms": 400.0, "on_budget": "truncate"}
        response = live.chat(**body)
        if response.status_code == 200:
            found = response.json()
            assert found["choices"][0]["finish_reason"] == "length"
            assert found["haomiao"]["finish_detail"] in ("budget_exhausted", "max_tokens")
            assert found["haomiao"]["receipt"]["budget_ms"] == pytest.approx(400.0, abs=1.0)
        else:  # a machine so busy that not even the first tokens fit
            assert response.status_code in (422, 429, 504)
            assert response.headers["x-should-retry"] == "false"


def test_20_the_earliest_budget_counts(live: Running) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "budget_ms": 90_000}
    headers = {"x-budget-ms": "60000.5", "grpc-timeout": "70S"}
    found = live.http.post("/v1/chat/completions", json=body, headers=headers).json()
    assert found["haomiao"]["receipt"]["budget_ms"] == pytest.approx(60_000.5, abs=0.01)
    assert found["haomiao"]["receipt"]["outcome"] in ("met", "met_lower_point")


def test_21_schemas_without_bounds(live: Running) -> None:
    huge = {"enum": [f"value {number}" for number in range(5000)]}
    long = {"enum": ["x" * 70_000]}
    with unharmed(live):
        for wrong in (huge, long, {"$ref": "http://169.254.169.254/x"}, {"type": "nonsense"}):
            response = live.chat(**schema(wrong))
            assert_refused(response, 400)
        recursive = {
            "$ref": "#/$defs/a",
            "$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}}},
        }
        assert live.chat(**schema(recursive)).status_code in (200, 400)
        deep = json.dumps({"messages": [{"role": "user", "content": "x"}]})[:-1] + ', "response_format": '
        deep += '{"type": "json_schema", "json_schema": {"schema": ' + '{"items": ' * 100_000 + "{}" + "}" * 100_003
        headers = {"content-type": "application/json"}
        assert_refused(live.http.post("/v1/chat/completions", content=deep.encode(), headers=headers), 400)
        endless = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
        assert live.chat(**schema(endless)).status_code in (200, 400)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|aa)+b", "(x+x+)+y", r"(?=a)b", r"(?<!a)b", r"(a)\1", "((((a{1,500}){1,500}){1,500}){1,500})"],
)
def test_22_patterns(live: Running, pattern: str) -> None:
    with unharmed(live):
        response = live.chat(structured_outputs={"regex": pattern})
        assert response.status_code in (200, 400), response.text
        if pattern.startswith(("(?=", "(?<")) or "\\1" in pattern:
            assert_refused(response, 400)


def test_23_many_schemas(live: Running) -> None:
    """Compiled grammars are kept in a bounded cache: more of them than it holds leave nothing behind."""
    with unharmed(live):
        for number in range(140):
            asked = schema({"type": "object", "properties": {f"field{number}": {"type": "integer"}}})
            assert live.chat(**asked, max_tokens=1).status_code == 200


def test_24_templates_of_requests(live: Running, start: Any) -> None:
    with unharmed(live):
        assert_refused(live.chat(chat_template="{{ messages }}"), 400, param="chat_template")
        assert_refused(live.chat(chat_template_kwargs={"messages": []}), 400, param="chat_template_kwargs.messages")
        assert_refused(live.chat(chat_template_kwargs={"bos_token": "x"}), 400, param="chat_template_kwargs.bos_token")
        assert live.chat(chat_template_kwargs={"enable_thinking": False}).status_code == 200
    allowed = start(request_templates=True)
    assert allowed.chat(chat_template="{{ messages[0].content }}").status_code == 200


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{% import 'os' as os %}{{ os }}",
    "{{ messages.append(1) }}",
]


def test_25_templates_that_reach_out(start: Any) -> None:
    running = start(request_templates=True)
    with unharmed(running):
        for source in ESCAPES:
            response = running.chat(chat_template=source)
            assert response.status_code == 400 or "uid=" not in response.text
            if response.status_code == 400:
                assert_refused(response, 400, code="template_error")


def test_26_templates_that_do_not_end(start: Any) -> None:
    running = start(request_templates=True)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with unharmed(running):
        for source in (loops, "{{ 'x' * 1000000000 }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"):
            assert_refused(running.chat(chat_template=source), 400, code="template_error")


URLS = [
    "http://169.254.169.254/latest/meta-data",
    "http://localhost:1/redirect",
    "http://good.example\\@169.254.169.254/",
    "file:///etc/passwd",
    "data:image/png;base64,AAAA",
]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_32_media_are_not_fetched(live: Running, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with unharmed(live):
        for url in URLS:
            part = {"type": kind, kind: {"url": url}}
            response = live.chat(messages=[{"role": "user", "content": [part]}])
            assert_refused(response, 400, param="messages[0].content[0]")


def test_33_kv_is_short(start: Any) -> None:
    """A pool that holds one long answer at a time: all are served, one after the other; what cannot fit is refused."""
    running = start(fake=False, options={"kv_memory": 1 << 20})
    room = running.service.hello.max_request_tokens
    with unharmed(running):
        together = running.chat(n=3, max_tokens=room // 2, ignore_eos=True)
        assert together.status_code == 200, together.text
        assert all(choice["finish_reason"] == "length" for choice in together.json()["choices"])
        assert_refused(running.chat(max_tokens=room + 1), 400, code="context_length_exceeded")
        assert eventually(lambda: census(running).kv_held == 0)


def test_unsupported_fields_are_named(live: Running) -> None:
    for name, value in (("audio", {"voice": "x"}), ("functions", []), ("prediction", {}), ("web_search_options", {})):
        response = live.chat(**{name: value if value else {"x": 1}})
        assert_refused(response, 400, code="unsupported_parameter", param=name)
    assert_refused(live.http.post("/v1/completions", json={"prompt": "x", "suffix": "y"}), 400, param="suffix")
    assert_refused(live.http.post("/v1/responses", json={"input": "x", "previous_response_id": "r"}), 400)


def test_harmless_fields_are_accepted(live: Running) -> None:
    harmless = {
        "user": "someone",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "k",
        "parallel_tool_calls": True,
        "verbosity": "low",
        "modalities": ["text"],
        "logit_bias": None,
        "stop": None,
    }
    assert live.chat(**harmless).status_code == 200


def test_developer_and_parts(live: Running) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]},
    ]
    assert live.chat(messages=messages).status_code == 200


def test_tool_calls(live: Running) -> None:
    """A forced call is JSON of the tool's own schema, whole and streamed."""
    function = {
        "name": "light",
        "parameters": {
            "type": "object",
            "properties": {"room": {"enum": ["hall"]}},
            "required": ["room"],
            "additionalProperties": False,
        },
    }
    asked = {"tools": [{"type": "function", "function": function}], "tool_choice": "required", "max_tokens": 300}
    found = live.chat(**asked).json()["choices"][0]
    if found["finish_reason"] == "tool_calls":
        (call,) = found["message"]["tool_calls"]
        assert call["function"]["name"] == "light"
        assert json.loads(call["function"]["arguments"]) == {"room": "hall"}
    streamed = live.chat(**asked, stream=True).text
    assert ("tool_calls" in streamed) == (found["finish_reason"] == "tool_calls")
    assert_refused(live.chat(tool_choice="required"), 400, param="tool_choice")


def test_a_chat_template_from_a_file(start: Any, tmp_path: Path) -> None:
    running = start(chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    tokens = running.http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()["tokens"]
    assert running.http.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == "user: hi\n"
