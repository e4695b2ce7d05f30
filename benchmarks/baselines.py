"""The servers that benchmarks/deadlines.py compares, each started on a free port of loopback and told of deadlines as
well as it can be.

Haomiao states a budget. llama-server knows none, so a thin proxy stands before it, inside the client and therefore
without a hop of its own: earliest deadline first over as many requests as there are slots, what cannot be useful any
more is turned away; a choice is one token under a grammar. The client hangs up at the deadline, but llama-server
notices that only when it writes to a stream, or within a second: a slot that was hung up on counts as taken until
`/slots` says that it is free, else the proxy would send what then waits inside. (`t_max_predict_ms` would be the better
way, but it waits for a line's end.) vLLM is given its priority scheduler with the deadline as priority. All stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from haomiao.measure.load import Haomiao, OpenAI
from haomiao.measure.mix import Offer, RequestClass
from haomiao.measure.wire import Client

LOOK_S = 0.03
"""Between two looks at the slots of a server that was hung up on."""
NICENESS = os.getpriority(os.PRIO_PROCESS, 0)
"""With which this was started."""


class EdfProxy(OpenAI):
    """Earliest deadline first before a server that has `slots` of them."""

    def __init__(self, slots: int, expected_ms: dict[str, float], url: str | None = None) -> None:
        """`expected_ms`: what a request of a class takes unloaded. Of a choice's budget so much must be left, of a
        text's a quarter of it: a part of a text is worth something. `url`: of a server that tells of its slots."""
        super().__init__(choices=False)
        self._slots = slots
        self._expected = dict(expected_ms)
        self._url = url
        self._running = 0
        self._lost = 0  # of these, those that were hung up on
        self._watching: asyncio.Task[None] | None = None
        self._waiting: list[tuple[float, int, asyncio.Future[bool], Callable[[], bool]]] = []
        self._order = itertools.count()

    async def ready(self, offer: Offer, kind: RequestClass, left_ms: Callable[[], float | None]) -> bool:
        """Wait for a slot in the order of deadlines."""
        needed = self._expected.get(kind.name, 0.0) * (1.0 if kind.options else 0.25)

        def useful() -> bool:
            left = left_ms()
            return left is None or left > needed

        if not useful():
            return False
        left = left_ms()
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        deadline = time.monotonic() * 1e3 + (float("inf") if left is None else left)
        heapq.heappush(self._waiting, (deadline, next(self._order), future, useful))
        self._let_in()
        return await future

    def finished(self, kind: RequestClass, hung_up: bool = False) -> None:
        """A slot is free, unless the client hung up: then the server says when."""
        if not hung_up or self._url is None:
            self._running -= 1
            self._let_in()
            return
        self._lost += 1
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._watch(Client(self._url)))

    async def _watch(self, client: Client) -> None:
        """Give the slots back of those that were hung up on, as the server gets done with them."""
        try:
            while self._lost:
                await asyncio.sleep(LOOK_S)
                slots = await client.get_json("/slots", timeout_s=1.0)
                if not isinstance(slots, list):
                    continue
                working = sum(bool(slot.get("is_processing")) for slot in slots)
                still = max(0, min(self._lost, working - (self._running - self._lost)))
                self._running -= self._lost - still
                self._lost = still
                self._let_in()
        finally:
            self._watching = None
            client.close()

    def _let_in(self) -> None:
        while self._waiting and self._running < self._slots:
            _, _, future, useful = heapq.heappop(self._waiting)
            if useful():
                self._running += 1
                future.set_result(True)
            else:
                future.set_result(False)

    def body(self, offer: Offer, kind: RequestClass, left_ms: float | None) -> dict[str, Any]:
        """llama-server's own fields beside OpenAI's."""
        body = super().body(offer, kind, left_ms) | {"cache_prompt": True}
        if kind.options:
            body["grammar"] = "root ::= " + " | ".join(f'"{option}"' for option in kind.options)
        return body


class Stock(OpenAI):
    """llama-server as it comes: choices by grammar, nothing said of deadlines, no proxy."""

    def body(self, offer: Offer, kind: RequestClass, left_ms: float | None) -> dict[str, Any]:
        """As OpenAI's, the grammar aside."""
        body = OpenAI(choices=False).body(offer, kind, left_ms)
        if kind.options:
            body["grammar"] = "root ::= " + " | ".join(f'"{option}"' for option in kind.options)
        return body


class VllmPriority(OpenAI):
    """vLLM with --scheduling-policy priority: the absolute deadline is the priority, smaller first."""

    def body(self, offer: Offer, kind: RequestClass, left_ms: float | None) -> dict[str, Any]:
        """As OpenAI's, with a priority."""
        body = super().body(offer, kind, left_ms)
        if left_ms is not None:
            body["priority"] = int(time.monotonic() * 1e3 + left_ms) % (1 << 31)
        return body


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], port: int, log: Path, seconds: float = 240.0) -> Iterator[str]:
    """A server while it is needed: its address once `/health` and `/v1/models` answer."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, preexec_fn=_usual_niceness)
        url = f"http://127.0.0.1:{port}"
        try:
            until = time.monotonic() + seconds
            # llama-server lists its model before it is loaded, llama-cpp-python has no /health
            while not (_answers(f"{url}/health", 404) and _answers(f"{url}/v1/models")):
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"{command[0]} does not serve: {log.read_text(errors='replace')[-800:]}")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _usual_niceness() -> None:
    """In the server's process: the client's own niceness is not inherited."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)


def _answers(url: str, *others: int) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except urllib.error.HTTPError as error:
        return error.code in others
    except (urllib.error.URLError, OSError):
        return False


def haomiao_command(model: str, port: int, threads: int, context: int, points: str) -> list[str]:
    """Our server. Speculation is off: random weights run into loops, whose speed is nobody's."""
    command = [sys.executable, "-m", "haomiao", "serve", model, "--port", str(port), "--threads", str(threads)]
    return [*command, "--max-model-len", str(context), "--points", points, "--speculate", "off", "--log-level", "error"]


def llama_command(path: str, model: str, port: int, threads: int, context: int, slots: int) -> list[str]:
    """llama-server with so many slots, each of the whole context."""
    command = [path, "-m", model, "--host", "127.0.0.1", "--port", str(port), "-t", str(threads), "-tb", str(threads)]
    return [*command, "-np", str(slots), "-c", str(context * slots), "--no-webui", "--slots", "--log-disable"]


def llama_python_command(python: str, model: str, port: int, threads: int, context: int) -> list[str]:
    """The server of llama-cpp-python: one request at a time, and it knows no time limit."""
    command = [python, "-m", "llama_cpp.server", "--model", model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--n_ctx", str(context), "--n_threads", str(threads), "--n_threads_batch", str(threads)]
    return [*command, "--verbose", "false"]


def vllm_command(python: str, model: str, port: int, threads: int, context: int) -> list[str]:
    """vLLM on the CPU with its priority scheduler."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1"]
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    command += ["--gpu-memory-utilization", "0.4"]  # of the machine's memory: it wants that much free
    return [*command, "--port", str(port), "--max-model-len", str(context), "--scheduling-policy", "priority"]


__all__ = ["EdfProxy", "Haomiao", "Stock", "VllmPriority", "free_port", "running"]
