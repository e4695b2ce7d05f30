"""The engine as the HTTP process meets it: messages in, steps, messages out.

Knows text only as far as the engine needs it: constraints are compiled here, and tokens become text here. Knows nothing
about sockets and processes; `send` is given.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from haomiao.engine.engine import Engine
from haomiao.engine.request import DoneEvent, EngineRequest, Event, TokenEvent
from haomiao.errors import EngineError, HaomiaoError
from haomiao.serve import messages
from haomiao.serve.feeding import attach
from haomiao.serve.messages import (
    Cancel,
    Close,
    Commit,
    Done,
    Feed,
    Hello,
    Loading,
    Open,
    Refused,
    Stats,
    Submit,
    Token,
)
from haomiao.types import KV_BLOCK_TOKENS

WARM_UP_TOKENS = 64
GAUGE_SECONDS = 15.0
IDLE_SECONDS = 0.0005
"""A pause after a round in which nothing could be done although something waits."""


@dataclass(slots=True)
class _Told:
    """A request in flight: the id that the HTTP process knows it by, and its samples that are still open."""

    id: int
    open: int


class EngineLoop:
    """One model, and the requests of one HTTP process. `run` steps on the thread that calls it; `take` may be called
    from another one."""

    def __init__(self, opening: Open, send: Callable[..., None]) -> None:
        """Loads the model, telling `send` how far it is, and says `Hello`. Raises what loading raises."""
        from haomiao.api import LLM

        self.send = send
        self._told = 0.0
        self._llm = LLM(opening.model, progress=self._progress, **opening.options)
        self.engine: Engine = self._llm.engine
        self._wake = threading.Event()
        # what can wait is done by `run`, between requests
        self._llm.monitor.on_waiting = self.engine.on_waiting = self._wake.set
        self._gauges: dict[str, float] = {}
        self._gauged = 0.0
        self._later: deque[messages.Message] = deque()
        self._jobs: dict[int, _Told] = {}  # by the engine's id
        self._ids: dict[int, int] = {}  # id of the message -> engine's id
        self._lock = threading.Lock()
        self._steps = 0
        self._closed = False
        self.on_feed: Callable[[messages.Message], None] | None = None
        """Takes `Feed`, `Commit` and `Close` on the stepping thread."""
        self.on_events: Callable[[list[Event]], list[Event]] | None = None
        """Sees every event before it is told, and returns those that are still to be told."""
        attach(self)
        send(self._hello())

    # ---- from the other thread ------------------------------------------------------------------------------------

    def take(self, message: messages.Message) -> None:
        """One message of the HTTP process."""
        if isinstance(message, Submit):
            self.submit(message)
        elif isinstance(message, Cancel):
            with self._lock:
                job = self._ids.get(message.id)
            if job is not None:
                self.engine.cancel(job)
        elif isinstance(message, (Feed, Commit, Close)):
            self._later.append(message)
        else:
            raise EngineError(f"{type(message).__name__} is no message to an engine that has a model")
        self._wake.set()

    def submit(self, message: Submit, *, session: int | None = None, prompt: list[int] | None = None) -> int | None:
        """Queue a request; what is refused is told at once, without waiting for the running step. Returns the engine's
        id of it, None if it was refused. `session` and `prompt` are those of streamed input."""
        try:
            request = self._request(message, session, prompt)
            with self._lock:  # the step that ends it must find the id
                job = self.engine.submit(request)
                samples = message.sampling.n if message.work == "generate" else 1
                self._jobs[job], self._ids[message.id] = _Told(message.id, samples), job
                return job
        except HaomiaoError as error:
            self.send(Refused.of(message.id, error))
        except Exception as error:
            self.send(Refused.of(message.id, EngineError(f"{type(error).__name__}: {error}")))
        return None

    def stats(self) -> Stats:
        """Counters as they are now."""
        pool = self.engine.pool
        running, waiting = self.engine.load
        return Stats(
            steps=self._steps,
            busy=self.engine.busy,
            running=running,
            waiting=waiting,
            kv_blocks=pool.blocks,
            kv_free=pool.available,
            kv_cached=pool.cached,
            gauges=dict(self._gauges),
        )

    # ---- on the stepping thread -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Step while there is something to do, wait while there is not."""
        while not self._closed:
            self._wake.clear()
            while self._later:
                message = self._later.popleft()
                if self.on_feed is not None:
                    self.on_feed(message)
            self._look()
            if not self.engine.busy:
                if not self.engine.idle():
                    self._wake.wait()
                continue
            start = time.perf_counter()
            events = self.engine.step()
            self._steps += 1
            if events:
                self.tell(events)
            elif time.perf_counter() - start < IDLE_SECONDS:  # nothing ran: what waits cannot go on yet
                time.sleep(IDLE_SECONDS)

    def tell(self, events: list[Event]) -> None:
        """Say what happened, all of a step at once."""
        if self.on_events is not None:
            events = self.on_events(events)
        said: list[messages.Message] = []
        for event in events:
            with self._lock:
                told = self._jobs.get(event.request_id)
            if told is None:
                continue
            said.append(self._message(told.id, event))
            if isinstance(event, DoneEvent):
                told.open = 0 if event.error is not None else told.open - 1
                if not told.open:
                    with self._lock:
                        del self._jobs[event.request_id]
                        self._ids.pop(told.id, None)
        self.send(*said)

    def _look(self) -> None:
        """Figures for the gauges, now and then: coverage of predicted steps, the live error and what it forbids."""
        now = time.monotonic()
        if now - self._gauged < GAUGE_SECONDS:
            return
        counters = self._llm.cost.counters()
        found = {"predicted_steps": float(counters["steps"]), "predicted_steps_inside": float(counters["inside"])}
        found["stated_coverage"] = self._llm.cost.coverage
        monitor = self._llm.monitor
        found["monitor_skipped"] = float(monitor.skipped)
        for name, (kl, top1, samples) in monitor.means().items():
            found |= {f"live_{name}": kl, f"live_{name}_top1": top1, f"live_{name}_samples": float(samples)}
        if monitor.limit is not None:
            found["max_kl"] = monitor.limit
            found |= {f"point_forbidden_{point}": float(point in monitor.forbidden) for point in self._llm.points}
        self._gauges, self._gauged = found, time.monotonic()

    def close(self) -> None:
        """End `run` and give everything back."""
        self._closed = True
        self._wake.set()
        self._llm.close()

    # ---- forms ----------------------------------------------------------------------------------------------------

    def _message(self, request_id: int, event: Event) -> messages.Message:
        if isinstance(event, TokenEvent):
            return Token(
                id=request_id,
                sample=event.sample,
                token_ids=event.token_ids,
                text=event.text,
                logprobs=event.logprobs,
                point=event.point,
            )
        if event.error is not None or event.finish_reason is None or event.finish_detail is None:
            return Refused.of(request_id, event.error or EngineError("the request ended without a word"), event.receipt)
        return Done(
            id=request_id,
            sample=event.sample,
            finish_reason=event.finish_reason,
            finish_detail=event.finish_detail,
            receipt=event.receipt,
            scores=event.scores,
            prompt_logprobs=event.prompt_logprobs,
            embedding=None if event.embedding is None else event.embedding.astype("<f4").tobytes(),
        )

    def _request(self, message: Submit, session: int | None, prompt: list[int] | None) -> EngineRequest:
        ids = message.token_ids if prompt is None else prompt
        sampling = replace(message.sampling, logit_bias=dict(message.sampling.logit_bias))
        asked, constrained = message.constraint, {}
        if asked is not None:
            constrained = self._llm.requests.constrained(asked.kind, json.loads(asked.text))
        return EngineRequest(
            ids,
            sampling=sampling,
            work=message.work,
            options=tuple(tuple(option) for option in message.options),
            normalize=message.normalize,
            point=message.point,
            stop=self._llm.requests.matcher(sampling.stop, ids) if message.work == "generate" else None,
            prompt_logprobs=message.prompt_logprobs,
            arrival_ns=message.arrival_ns,
            deadline_ns=None if message.deadline_ns is None else message.deadline_ns - message.delivery_ns,
            ttft_deadline_ns=message.ttft_deadline_ns,
            delivery_ns=message.delivery_ns,
            on_budget=message.on_budget,
            min_point=message.min_point,
            max_kl=message.max_kl,
            salt=message.salt,
            session=session,
            **constrained,
        )

    def _hello(self) -> Hello:
        llm, pool = self._llm, self.engine.pool
        tokens, seconds = self._warm_up()
        per_step = self.engine.executor.max_step_tokens
        return Hello(
            model=llm.name,
            points=list(llm.points),
            point=llm.point,
            errors=llm.errors,
            vocab_size=llm.vocab_size,
            max_context=llm.max_context,
            files=str(Path(llm.files_dir).resolve()),
            threads=llm.threads,
            isa=llm.isa,
            kv=llm.kv,
            kv_blocks=pool.blocks,
            max_request_tokens=min(llm.max_context, pool.blocks * KV_BLOCK_TOKENS),
            hidden_size=self.engine.limits.hidden_size,
            step_seconds=seconds / tokens * per_step,
        )

    def _warm_up(self) -> tuple[int, float]:
        """Measure what steps cost here (read, if that was done before), since budgets stand on it; run every point
        once, so that no request pays for what happens the first time, and prepare constraints.
        Returns the tokens of the longest step and its seconds at the slowest point."""
        tokens = max(1, min(WARM_UP_TOKENS, self._llm.max_context - 1, self.engine.executor.max_step_tokens))
        slowest = 0.0
        self._llm.calibrate()
        for point in self._llm.points:
            request = EngineRequest([0] * tokens, work="prefill", point=point, salt=b"warm-up")
            start = time.perf_counter()
            self.engine.run_until(self.engine.submit(request))
            slowest = max(slowest, time.perf_counter() - start)
        self.engine.pool.drop_cached()
        if self._llm.tokenizer is not None:
            from haomiao.text.constraint import prepare

            with contextlib.suppress(HaomiaoError):  # said again, and better, to whoever asks for a constraint
                prepare(self._llm.tokenizer)
        return tokens, slowest

    def _progress(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._told >= 0.2 or done >= total:
            self._told = now
            self.send(Loading(what=what, done=done, total=total))
