"""Faults 1-18 of the table: what is wrong with bytes, bodies, numbers, routes, keys, and clients that come and go."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import httpx
import pytest

from haomiao.models.open import EMBEDDED
from tests.serve.census import census, eventually, post, raw, status, unharmed
from tests.serve.conftest import CHAT, Running

PATH = "/v1/chat/completions"


def assert_refused(response: httpx.Response, expected: int, code: str | None = None, param: str | None = None) -> None:
    """An error object in OpenAI's form."""
    assert response.status_code == expected, response.text
    error = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"]
    if code is not None:
        assert error["code"] == code
    if param is not None:
        assert error["param"] == param, error


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"nonsense", b'{"messages": "\xff"}', b"{} {}", b"\xef\xbb\xbf{}", b'{"a": "\x01"}']
)
def test_01_invalid_json(live: Running, body: bytes) -> None:
    with unharmed(live):
        assert_refused(live.http.post(PATH, content=body, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("chunked", [False, True])
def test_02_large_bodies(live: Running, chunked: bool) -> None:
    large = b'{"messages": [{"role": "user", "content": "' + b"x" * (5 << 20) + b'"}]}'
    with unharmed(live):
        if not chunked:
            assert status(raw(live, post(PATH, large))) == 413
        else:
            chunks = b"".join(b"%x\r\n%s\r\n" % (1 << 16, b"x" * (1 << 16)) for _ in range(128)) + b"0\r\n\r\n"
            assert status(raw(live, post(PATH, b"", b"transfer-encoding: chunked") + chunks)) == 413
        announced = raw(live, post(PATH, b"", b"content-length: 99999999999999999999"))
        assert status(announced) in (400, 413)


def test_03_large_headers(live: Running) -> None:
    with unharmed(live):
        assert status(raw(live, post(PATH, b"{}", b"x-large: " + b"a" * 70_000))) == 431
        many = [b"x-%d: %s" % (number, b"a" * 1000) for number in range(70)]
        assert status(raw(live, post(PATH, b"{}", *many))) == 431
        endless = b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 300_000
        assert status(raw(live, endless)) == 431


def test_04_depth_and_duplicates(live: Running) -> None:
    deep = b'{"metadata": ' + b'{"a":' * 70 + b"1" + b"}" * 70 + b"}"
    bottomless = b'{"metadata": ' + b"[" * 100_000
    twice = b'{"messages": [], "n": 1, "n": 2}'
    nested = b'{"messages": [{"role": "user", "role": "system", "content": "x"}]}'
    with unharmed(live):
        for body in (deep, bottomless, twice, nested):
            assert_refused(live.http.post(PATH, content=body, headers={"content-type": "application/json"}), 400)


NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-1", "9223372036854775808", "true", '"1"', "1e400", "[1]"]


@pytest.mark.parametrize("field", ["max_tokens", "temperature", "n", "top_p", "budget_ms", "top_k"])
@pytest.mark.parametrize("value", NUMBERS)
def test_05_numbers(live: Running, field: str, value: str) -> None:
    if (field, value) == ("top_k", "-1"):
        value = "-2"  # -1 is vLLM's way to say that all are kept
    body = f'{{"messages": [{{"role": "user", "content": "x"}}], "{field}": {value}}}'
    response = live.http.post(PATH, content=body.encode(), headers={"content-type": "application/json"})
    if value in ("NaN", "Infinity", "-Infinity"):
        assert_refused(response, 400)  # not JSON at all
    else:
        assert_refused(response, 400, param=field)


def test_05_is_unharmed(live: Running) -> None:
    with unharmed(live):
        for value in NUMBERS:
            body = f'{{"messages": [{{"role": "user", "content": "x"}}], "max_tokens": 1, "seed": {value}0}}'
            response = live.http.post(PATH, content=body.encode(), headers={"content-type": "application/json"})
            assert response.status_code in (200, 400)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 17),
        ("top_logprobs", 21),
        ("stop", ["x"] * 17),
        ("stop", "x" * 1025),
        ("logit_bias", {str(number): 1 for number in range(1025)}),
    ],
)
def test_06_too_many(live: Running, field: str, value: Any) -> None:
    with unharmed(live):
        assert_refused(live.chat(**{field: value, "logprobs": True}), 400, param=field)


def test_06_logprobs_of_completions(live: Running) -> None:
    assert_refused(live.http.post("/v1/completions", json={"prompt": "x", "logprobs": 21}), 400, param="logprobs")


def test_07_max_tokens(live: Running) -> None:
    with unharmed(live):
        assert_refused(live.chat(max_tokens=0), 400, param="max_tokens")
        assert_refused(live.chat(max_tokens=-5), 400, param="max_tokens")
        assert_refused(live.chat(max_tokens=100_000), 400, code="context_length_exceeded", param="max_tokens")


def test_08_prompt_over_context(live: Running) -> None:
    with unharmed(live):
        for size in (3_000, 300_000):
            content = "word " * size
            assert_refused(
                live.chat(messages=[{"role": "user", "content": content}]), 400, code="context_length_exceeded"
            )
        assert_refused(
            live.http.post("/v1/completions", json={"prompt": [1] * 5000}), 400, code="context_length_exceeded"
        )


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{}],
        ["x"],
        [{"role": "user"}],
        [{"role": "wizard", "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"content": "x"}],
    ],
)
def test_09_messages(live: Running, messages: Any) -> None:
    with unharmed(live):
        assert_refused(live.chat(messages=messages), 400)


@pytest.mark.parametrize("prompt", [[], [[]], [""], [1, "x"], None, 5])
def test_09_prompts(live: Running, prompt: Any) -> None:
    with unharmed(live):
        response = live.http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1})
        if prompt == [""] and response.status_code == 200:
            assert live.service.prompts.tokenizer.prefix_ids  # the empty text has a BOS to go on from
        else:
            assert_refused(response, 400)


@pytest.mark.parametrize("token", [-1, 1 << 20, 1 << 31, 1 << 62])
def test_10_token_ids(live: Running, token: int) -> None:
    with unharmed(live):
        assert_refused(live.http.post("/v1/completions", json={"prompt": [1, token]}), 400)
        assert_refused(live.http.post("/detokenize", json={"tokens": [token]}), 400)
        assert_refused(live.chat(logit_bias={str(token): 1.0}), 400)
        assert_refused(live.chat(stop_token_ids=[token]), 400)


def test_11_surrogates_and_controls(live: Running) -> None:
    with unharmed(live):
        for text in ("\\ud800", "a\\udfff", "\\ud800\\ud800"):
            body = f'{{"messages": [{{"role": "user", "content": "{text}"}}], "max_tokens": 1}}'
            response = live.http.post(PATH, content=body.encode(), headers={"content-type": "application/json"})
            assert_refused(response, 400)
        assert live.chat(messages=[{"role": "user", "content": "a\x00b"}]).status_code in (200, 400)


def test_11_special_tokens_are_text(live: Running) -> None:
    """Content that spells a control token costs several tokens: it was not taken for one."""
    tokenizer = live.service.prompts.tokenizer
    special = next(text for text, id_ in tokenizer.added_tokens.items() if id_ in tokenizer.special_ids)
    ids = live.http.post("/tokenize", json={"messages": [{"role": "user", "content": special}]}).json()["tokens"]
    plain = live.http.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).json()["tokens"]
    assert [id_ for id_ in ids if id_ in tokenizer.special_ids] == [
        id_ for id_ in plain if id_ in tokenizer.special_ids
    ]


def test_12_unknown_model(live: Running) -> None:
    with unharmed(live):
        assert_refused(live.chat(model="gpt-99"), 404, code="model_not_found", param="model")
        assert_refused(live.http.get("/v1/models/gpt-99"), 404, code="model_not_found")
        assert live.http.get(f"/v1/models/{EMBEDDED}").json()["id"] == EMBEDDED


def test_13_routes_methods_types(live: Running) -> None:
    with unharmed(live):
        assert_refused(live.http.get("/v2/unknown"), 404)
        assert_refused(live.http.post("/v1/chat/completions/"), 404)
        assert_refused(live.http.get(PATH), 405)
        assert_refused(live.http.delete("/health"), 405)
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
            assert_refused(live.http.post(PATH, content=json.dumps(CHAT), headers={"content-type": kind}), 415)
        compressed = {"content-type": "application/json", "content-encoding": "gzip"}
        assert_refused(live.http.post(PATH, content=b"x", headers=compressed), 415)


def test_14_keys(start: Any) -> None:
    running = start(api_keys=("first-key", "second-key"))
    http = running.http
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "first-key"},
        {"authorization": "Basic x"},
    ):
        for path in ("/v1/models", "/metrics", "/openapi.json", "/no/such/route"):
            response = http.get(path, headers=headers)
            assert_refused(response, 401, code="invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        assert_refused(http.post(PATH, json=CHAT, headers=headers), 401)
    for key in ("first-key", "second-key"):
        assert http.post(PATH, json=CHAT, headers={"authorization": f"Bearer {key}"}).status_code == 200
    assert http.get("/health").status_code == 200 and http.get("/ready").status_code == 200


def test_14_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constant time: all keys are compared by `hmac.compare_digest`, whichever matches."""
    from haomiao.serve import guard

    compared = []
    real = guard.hmac.compare_digest
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda a, b: compared.append(1) or real(a, b))
    keys = guard.Keys(["a", "b", "c"])
    keys.check(b"Bearer a")
    keys.check(b"Bearer c")
    assert len(compared) == 6


def test_15_slow_clients(start: Any) -> None:
    running = start(receive_seconds=0.3)
    with unharmed(running):
        assert status(raw(running, b"POST /v1/chat/completions HTTP/1.1\r\nhost: loc")) == 408
        assert status(raw(running, post(PATH, b"{", b"content-length: 100"))) == 408
        assert raw(running, b"") == b""  # nothing was asked: the connection is closed


def test_16_a_client_that_does_not_read(start: Any) -> None:
    running = start(stall_seconds=0.4)
    with unharmed(running), socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", running.port))
        body = json.dumps({**CHAT, "max_tokens": 60_000, "n": 4, "stream": True}).encode()
        connection.sendall(post(PATH, body))
        assert eventually(lambda: running.service.in_flight == 1)
        assert eventually(lambda: running.service.in_flight == 0, 30)
        assert eventually(lambda: not running.service.supervisor.stats.busy, 30)


@pytest.mark.parametrize("kind", ["stream", "whole", "prefill"])
def test_17_disconnects(live: Running, kind: str) -> None:
    body = {"prompt": "The sea is", "max_tokens": 1800, "ignore_eos": True, "stream": kind == "stream"}
    if kind == "prefill":
        body = {"prompt": "The old house stood. " * 400, "max_tokens": 1}
        body["prompt"] = live.http.post("/tokenize", json={"prompt": body["prompt"]}).json()["tokens"][:2000]
    with unharmed(live):
        with socket.create_connection(("127.0.0.1", live.port)) as connection:
            connection.sendall(post("/v1/completions", json.dumps(body).encode()))
            if kind != "prefill":
                assert eventually(lambda: live.service.supervisor.stats.running > 0)
        assert eventually(lambda: live.service.in_flight == 0)
        assert eventually(lambda: census(live).kv_held == 0)


def test_18_queue_full(start: Any) -> None:
    running = start(queue=1, pause=0.02)
    body = {**CHAT, "max_tokens": 500, "stream": True}
    with unharmed(running), running.http.stream("POST", PATH, json=body) as first:
        assert first.status_code == 200
        response = httpx.post(running.url + PATH, json=CHAT, trust_env=False)
        assert_refused(response, 429, code="queue_full")
        assert int(response.headers["retry-after"]) >= 1


def test_18_rates(start: Any) -> None:
    running = start(rate=6.0)
    responses = [running.chat() for _ in range(3)]
    assert [response.status_code for response in responses] == [200, 429, 429]
    assert_refused(responses[1], 429, code="rate_limited")
    assert 1 <= int(responses[1].headers["retry-after"]) <= 10


def test_keep_alive_and_pipelining(live: Running) -> None:
    """Two requests in one packet get two answers, in order."""
    once = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    last = b"GET /version HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    answer = raw(live, once + last)
    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.index(b'"ok"') < answer.index(b'"version"')


def test_a_foreign_host_is_refused_without_a_key(live: Running) -> None:
    """A name in someone else's DNS that points here must not make a browser an accomplice."""
    assert_refused(live.http.get("/v1/models", headers={"host": "evil.example"}), 403)
    assert live.http.get("/v1/models", headers={"host": "localhost:8000"}).status_code == 200


def test_no_cors(live: Running) -> None:
    response = live.http.post(PATH, json=CHAT, headers={"origin": "https://evil.example"})
    assert not any(name.startswith("access-control") for name in response.headers)
    assert live.http.options(PATH, headers={"origin": "https://evil.example"}).status_code == 405


def test_slow_answer_is_no_reason_to_close(start: Any) -> None:
    """The limit for receiving ends with the body."""
    running = start(receive_seconds=0.2, pause=0.15)
    began = time.monotonic()
    assert running.chat(max_tokens=4).status_code == 200
    assert time.monotonic() - began > 0.3
