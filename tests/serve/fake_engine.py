"""An engine process that computes nothing: it answers with numbered words, and does what a test tells it to.

Options (`Settings.options`): `pause` seconds a token; `hang_at`, `crash_at` the token at which it stops or dies, in a
request whose seed is 666; `files` a directory with tokenizer files (default: the embedded model's); `hidden_size`. A
request whose seed is 777 is answered as by a single prefill.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from typing import Any

import numpy as np

from haomiao.models.open import ASSETS, EMBEDDED
from haomiao.serve import messages
from haomiao.serve.messages import Cancel, Close, Commit, Done, Fed, Feed, Hello, Open, Stats, Submit, Token
from haomiao.types import Receipt, ScheduleEntry

FILES = ASSETS / EMBEDDED


class FakeEngine:
    """One connection."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._lock = threading.Lock()
        self._cancelled: set[int] = set()
        self._busy = 0
        self._steps = 0
        self._hangs = False

    def send(self, *said: messages.Message) -> None:
        data = messages.encode(said)
        with self._lock:
            self._socket.sendall(data)

    def run(self) -> None:
        reader = messages.FrameReader(messages.ToEngine)
        while data := self._socket.recv(1 << 16):
            for message in reader.feed(data):
                self.take(message)
        os._exit(0)

    def take(self, message: Any) -> None:
        if isinstance(message, Open):
            self.options = message.options
            self.send(
                Hello(
                    model="fake",
                    points=["int8", "int4"],
                    point="int8",
                    vocab_size=4096,
                    max_context=100_000,
                    files=str(message.options.get("files", FILES)),
                    threads=1,
                    isa="none",
                    kv="bf16",
                    kv_blocks=100,
                    max_request_tokens=100_000,
                    hidden_size=message.options.get("hidden_size", 4),
                )
            )
            threading.Thread(target=self.pulse, daemon=True).start()
        elif isinstance(message, Submit):
            threading.Thread(target=self.answer, args=(message,), daemon=True).start()
        elif isinstance(message, Cancel):
            self._cancelled.add(message.id)
        elif isinstance(message, Feed):
            self.send(Fed(session=message.session, tokens=message.position + len(message.token_ids)))
        elif isinstance(message, Commit):
            threading.Thread(target=self.answer, args=(message.submit,), daemon=True).start()
        else:
            assert isinstance(message, Close)

    def pulse(self) -> None:
        while True:
            time.sleep(0.05)
            steps = self._steps
            self.send(Stats(steps=steps, busy=self._busy > 0, running=self._busy, kv_blocks=100, kv_free=100))

    def answer(self, submit: Submit) -> None:
        self._busy += 1
        start = time.monotonic_ns()
        wanted = submit.sampling.max_tokens if submit.work == "generate" else 0
        detail = "max_tokens" if submit.work == "generate" else "done"
        chosen = submit.sampling.seed == 777
        if chosen:
            wanted, detail = 1, "single_prefill"
        for number in range(wanted):
            if submit.id in self._cancelled:
                self._busy -= 1
                return
            if submit.sampling.seed == 666:
                self.misbehave(number)
            self._steps += 1
            for sample in range(submit.sampling.n):
                self.send(Token(id=submit.id, sample=sample, token_ids=[5], text=f" w{number}", point="int8"))
            time.sleep(self.options.get("pause", 0.0))
        total = (time.monotonic_ns() - start) / 1e6
        receipt = Receipt(
            total_ms=total,
            decode_ms=total,
            ttft_ms=0.1,
            prompt_tokens=len(submit.token_ids),
            completion_tokens=wanted,
            schedule=[ScheduleEntry("int8", wanted, wanted)],
            outcome="met_single_prefill" if chosen else None,
        )
        embedding = np.array([3.0, 4.0, 0.0, submit.token_ids[0]], "<f4").tobytes() if submit.token_ids else None
        scores = [-float(index) for index, _ in enumerate(submit.options)] or None
        for sample in range(submit.sampling.n if submit.work == "generate" else 1):
            self.send(
                Done(
                    id=submit.id,
                    sample=sample,
                    finish_reason="length" if wanted and not chosen else "stop",
                    finish_detail=detail,  # type: ignore[arg-type]
                    receipt=receipt,
                    scores=scores,
                    embedding=embedding if submit.work == "embed" else None,
                )
            )
        self._busy -= 1

    def misbehave(self, number: int) -> None:
        if number == self.options.get("crash_at"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if number == self.options.get("hang_at"):
            time.sleep(1000)


if __name__ == "__main__":
    FakeEngine(sys.argv[1]).run()
