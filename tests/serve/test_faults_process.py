"""Faults 27, 34-40 and 42: engines that die or hang, servers that are stopped, machines that lack things, secrets."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from haomiao.serve.messages import Stats
from haomiao.serve.supervisor import Breaker, Watchdog
from tests.serve.census import eventually, unharmed
from tests.serve.conftest import CHAT, Command, Running
from tests.serve.test_chat import events
from tests.serve.test_faults_http import assert_refused

STREAM = {**CHAT, "max_tokens": 2000, "stream": True}


def engine_pid(running: Running) -> int:
    pid = running.service.supervisor.pid
    assert pid is not None
    return pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_34_engine_dies_while_it_answers(start: Any, number: int) -> None:
    """Answers in flight end with an error, and the next request is answered by another engine."""
    running = start(pause=0.02)
    with unharmed(running, restarted=True):
        whole: list[httpx.Response] = []
        other = threading.Thread(target=lambda: whole.append(running.chat(max_tokens=2000)))
        other.start()
        with running.http.stream("POST", "/v1/chat/completions", json=STREAM) as response:
            lines = response.iter_lines()
            next(lines)
            assert eventually(lambda: running.service.in_flight == 2)
            os.kill(engine_pid(running), number)
            rest = [line.removeprefix("data: ") for line in lines if line]
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["error"]["code"] == "engine_error"
        other.join(10)
        assert_refused(whole[0], 500, code="engine_error")


def test_34_the_real_engine_comes_back(start: Any) -> None:
    running = start(fake=False)
    before = running.chat(max_tokens=8).json()["choices"]
    os.kill(engine_pid(running), signal.SIGKILL)
    assert eventually(lambda: running.service.supervisor.state == "ready" and running.service.supervisor.crashes == 1)
    assert running.chat(max_tokens=8).json()["choices"] == before
    assert b"haomiao:engine_restarts 1.0" in running.http.get("/metrics").content


def test_34_breaker(start: Any) -> None:
    """Too many crashes within a while, and it is left alone for as long; the server lives on."""
    running = start(crashes=2, crash_seconds=4.0)
    for _ in range(2):
        assert eventually(lambda: running.service.supervisor.state == "ready")
        os.kill(engine_pid(running), signal.SIGKILL)
        assert eventually(lambda: running.service.supervisor.state != "ready")
    assert eventually(lambda: running.service.supervisor.state == "broken")
    response = running.chat()
    assert_refused(response, 503, code="not_ready")
    assert int(response.headers["retry-after"]) >= 1
    assert running.http.get("/health").status_code == 200
    assert running.http.get("/ready").json()["status"] == "broken"
    assert eventually(lambda: running.chat().status_code == 200)


def test_breaker_is_arithmetic() -> None:
    breaker = Breaker(3, 60.0)
    for now in (0.0, 10.0):
        breaker.crash(now)
        assert breaker.open_until(now) is None
    breaker.crash(20.0)
    assert breaker.open_until(20.0) == 80.0
    assert breaker.open_until(80.0) is None
    breaker.crash(85.0)  # the window has moved on
    assert breaker.open_until(85.0) is None


def test_35_engine_hangs(start: Any) -> None:
    """An engine that is busy and takes no step is killed; what it held ends with an error."""
    running = start(watchdog_seconds=0.4, options={"hang_at": 3})
    with unharmed(running, restarted=True):
        response = running.chat(max_tokens=50, seed=666, stream=True)
        *_, last, end = events(response.text)
        assert end == "[DONE]" and json.loads(last)["error"]["code"] == "engine_error"
    assert running.service.supervisor.crashes == 1


def test_35_engine_is_stopped(start: Any) -> None:
    """A process that says nothing at all hangs, too."""
    running = start(watchdog_seconds=0.4)
    os.kill(engine_pid(running), signal.SIGSTOP)
    assert eventually(lambda: running.service.supervisor.crashes == 1)
    assert eventually(lambda: running.chat().status_code == 200)


def test_watchdog_is_arithmetic() -> None:
    dog = Watchdog(5.0)
    assert not dog.hangs(1000.0)
    dog.pulse(0.0, Stats(steps=1, busy=True))
    dog.pulse(4.0, Stats(steps=1, busy=True))
    assert not dog.hangs(4.0)
    dog.pulse(8.0, Stats(steps=2, busy=True))
    dog.pulse(9.0, Stats(steps=2, busy=True))
    dog.pulse(14.5, Stats(steps=2, busy=True))
    assert dog.hangs(14.5)
    dog.pulse(15.0, Stats(steps=2, busy=False))
    assert not dog.hangs(15.0)
    assert dog.hangs(20.0)  # silence


def test_engine_ends_with_its_parent(command: Any) -> None:
    """Nothing of a server that was killed is left."""
    import psutil

    server: Command = command()
    server.url()
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert children
    server.process.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_36_drain(command: Any) -> None:
    """After SIGTERM: what runs is finished, nothing new begins, exit 0."""
    server: Command = command()
    url = server.url()
    body = {"prompt": "The sea", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", url + "/v1/completions", json=body, trust_env=False, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        statuses = []

        def refused() -> bool:
            statuses.append(httpx.get(url + "/ready", trust_env=False).status_code)
            return statuses[-1] == 503

        assert eventually(refused)
        assert httpx.get(url + "/health", trust_env=False).status_code == 200
        assert_refused(httpx.post(url + "/v1/chat/completions", json=CHAT, trust_env=False), 503, code="not_ready")
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2]
    assert server.process.wait(20) == 0


def test_36_second_signal(command: Any) -> None:
    server: Command = command()
    url = server.url()
    body = {"prompt": "The sea", "max_tokens": 1900, "ignore_eos": True, "n": 8, "stream": True}
    with httpx.stream("POST", url + "/v1/completions", json=body, trust_env=False, timeout=60) as response:
        lines = response.iter_lines()  # kept: it is closed with its iterator
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: httpx.get(url + "/ready", trust_env=False).status_code == 503)
        code, _ = server.end()
    assert code == 128 + signal.SIGTERM


def test_36_drain_has_an_end(start: Any) -> None:
    running = start(pause=0.1, drain_seconds=0.2)
    with running.http.stream("POST", "/v1/chat/completions", json=STREAM) as response:
        lines = response.iter_lines()
        next(lines)
        drained = asyncio.run_coroutine_threadsafe(running.service.drain(), running.loop).result(10)
        assert not drained


def test_37_port_in_use(command: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server: Command = command("--port", str(taken.getsockname()[1]))
        code, errors = server.process.wait(30), server.process.stderr.read()
    assert code == 7
    assert errors.count("\n") == 1 and "--port" in errors


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (("--host", "0.0.0.0"), 2, "--api-key"),
        (("--tls-cert", "missing.pem"), 2, "--tls-key"),
        (("--max-model-len", "x"), 2, "--max-model-len"),
        (("--executor", "cuda"), 2, "executor"),
        (("--chat-template", "missing.jinja"), 2, "--chat-template"),
        (("--rate-limit", "0"), 2, "--rate-limit"),
        (("no/such/model",), 2, "no/such/model"),
    ],
)
def test_37_38_one_line(command: Any, flags: tuple[str, ...], code: int, says: str) -> None:
    server: Command = command(*flags)
    assert server.process.stderr is not None
    assert server.process.wait(60) == code
    errors = server.process.stderr.read()
    assert errors.count("\n") == 1 and says in errors, errors


def test_37_home_that_cannot_be_written_and_portable_kernels(command: Any, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "file")
    Path(nowhere).write_text("not a directory")
    environment = {"HOME": nowhere, "HAOMIAO_CACHE": nowhere, "HAOMIAO_ISA": "scalar"}
    server: Command = command("--max-model-len", "1k", **environment)
    found = httpx.get(server.url() + "/v1/models", trust_env=False).json()["data"][0]
    assert found["haomiao"]["isa"] == "scalar" and found["max_model_len"] == 1024
    assert server.end()[0] == 0


def test_27_a_broken_model(command: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    server: Command = command(str(tmp_path))
    assert server.process.stderr is not None
    assert server.process.wait(60) == 2
    assert server.process.stderr.read().count("\n") == 1


def test_39_prefixes_of_another_key_are_not_used(start: Any) -> None:
    running = start(fake=False, api_keys=("one", "two"))
    prompt = "The old house stood at the end of the lane, and nobody had lived in it for years. " * 4

    def cached(key: str) -> int:
        body = {"prompt": prompt, "max_tokens": 1}
        response = running.http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
        found: int = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    assert cached("one") == 0
    assert cached("one") > 0
    assert cached("two") == 0


def test_40_logs_hold_no_secrets(command: Any) -> None:
    """Lines are JSON whatever is sent; prompts and keys are in none of them; labels are bounded."""
    server: Command = command("--api-key", "topsecret")
    url = server.url()
    headers = {"authorization": "Bearer topsecret"}
    nasty = 'x"\n{"event": "forged"}\r\n\x1b[31m'
    with httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=30) as http:
        assert (
            http.post("/v1/completions", json={"prompt": "my password is hunter2", "max_tokens": 1}).status_code == 200
        )
        http.post("/v1/chat/completions", json={"model": nasty, "messages": [{"role": "user", "content": nasty}]})
        for number in range(50):
            http.get(f"/nowhere/{number}")
        http.get("/v1/models/" + "y" * 3000)
        text = http.get("/metrics").text
    routes = {line.split('route="')[1].split('"')[0] for line in text.splitlines() if 'route="' in line}
    assert "other" in routes and not any("nowhere" in route or "yyy" in route for route in routes)
    code, errors = server.end()
    assert code == 0
    lines = [json.loads(line) for line in errors.splitlines()]
    assert any(line["event"] == "request" and line["status"] == 200 for line in lines)
    assert not any(line["event"] == "forged" for line in lines)
    assert not any(secret in errors for secret in ("hunter2", "topsecret", "\x1b"))


def test_42_the_clock_jumps(live: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines are of the monotonic clock: a wall clock that is set forward by a day changes nothing."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 86_400)
    response = live.chat(budget_ms=30_000, max_tokens=4)
    monkeypatch.undo()
    receipt = response.json()["haomiao"]["receipt"]
    assert receipt["outcome"] in ("met", "met_lower_point")
    assert 0 < receipt["total_ms"] < 30_000


def test_tls(start: Any, tmp_path: Path) -> None:
    """HTTPS with a certificate of our own."""
    import shutil
    import subprocess

    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
    names = ("-subj", "/CN=localhost", "-keyout", str(key), "-out", str(cert))
    subprocess.run(
        [openssl, "req", "-x509", *curve, "-nodes", "-days", "1", *names],
        check=True,
        capture_output=True,
    )
    running = start(tls_cert=str(cert), tls_key=str(key))
    assert running.url.startswith("https://")
    assert running.chat().status_code == 200
