"""What the routes share: settings, the engine's supervisor, prompts, metrics. No route knows more of the server."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request

from haomiao.errors import DeadlineError, HaomiaoError, InputError, ModelNotFoundError
from haomiao.serve import budgets, jsonbody
from haomiao.serve.client import Answer
from haomiao.serve.delivery import Delivery
from haomiao.serve.failures import HttpError
from haomiao.serve.guard import Keys, Rates
from haomiao.serve.messages import Hello, Submit
from haomiao.serve.metrics import Metrics
from haomiao.serve.prompts import Prompts
from haomiao.serve.schemas import ELSEWHERE, REFUSED, Body, Timed
from haomiao.serve.settings import Settings
from haomiao.serve.supervisor import Supervisor

INLINE_BYTES = 64 << 10
"""Bodies up to this size are parsed on the event loop: handing them to a thread would take longer."""


class Service:
    """One server's state."""

    def __init__(self, settings: Settings, engine_command: Sequence[str] | None = None) -> None:
        """`engine_command` starts another engine process than our own (tests)."""
        self.settings = settings
        self.keys = Keys(settings.api_keys)
        self.rates = Rates(settings.limits.rate)
        self.metrics = Metrics()
        self.delivery = Delivery()
        self.supervisor = Supervisor(settings, engine_command)
        self.supervisor.on_ready = self._greet
        self.prompts = Prompts(settings)
        self.in_flight = 0
        self.sockets = 0
        """Realtime connections that are open."""
        self.draining = False
        self.started = int(time.time())
        self._idle = asyncio.Event()
        self._loading: asyncio.Task[None] | None = None
        self.failure: HaomiaoError | None = None
        """Why the tokenizer or template cannot be used."""
        self._prepared = asyncio.Event()

    # ---- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to load the model; returns at once."""
        await self.supervisor.start()

    async def ready(self) -> Hello:
        """Wait until requests can be served. Raises why they never will be."""
        hello = await self.supervisor.ready()
        await self._prepared.wait()
        if self.failure is not None:
            raise self.failure
        return hello

    @property
    def is_ready(self) -> bool:
        """True if requests are served now."""
        return not self.draining and self.supervisor.state == "ready" and self._prepared.is_set() and not self.failure

    async def drain(self) -> bool:
        """Take nothing new and wait for what runs, as long as is allowed. False if something still ran."""
        self.draining = True
        self._idle.clear()
        if self.in_flight:
            try:
                await asyncio.wait_for(self._idle.wait(), self.settings.limits.drain_seconds)
            except TimeoutError:
                return False
        return True

    async def stop(self) -> None:
        """End the engine and the threads."""
        await self.supervisor.stop()
        self.prompts.close()

    def done(self) -> None:
        """A request that was counted has ended."""
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.set()

    def _greet(self, hello: Hello) -> None:
        """The engine said what it loaded: load the tokenizer, on a thread."""

        async def load() -> None:
            try:
                await self.prompts.run(lambda: self.prompts.load(hello))
            except HaomiaoError as error:
                self.failure = error
            self._prepared.set()

        self._loading = asyncio.get_running_loop().create_task(load())

    # ---- for routes -----------------------------------------------------------------------------------------------

    @property
    def hello(self) -> Hello:
        """What is served. Raises `NotReadyError` while it is loaded, restarted or given up."""
        self.supervisor.connection()
        _ = self.prompts.hello or self.prompts.tokenizer  # the latter says that the model is being loaded
        hello = self.supervisor.hello
        if hello is None or self.failure is not None:
            raise self.failure or HttpError(503, "the model is being loaded", code="not_ready")
        return hello

    @property
    def names(self) -> tuple[str, ...]:
        """Names that requests may call the model by; the first is what answers call it."""
        return self.settings.served_names or (self.hello.model,)

    def check_model(self, name: str | None) -> str:
        """The name to answer with. Raises `ModelNotFoundError`."""
        names = self.names
        if name is not None and name not in names and (self.settings.served_names or name != self.settings.model):
            raise ModelNotFoundError(f"the model {name[:200]!r} does not exist; {names[0]!r} does", param="model")
        return name or names[0]

    def check_points(self, body: Timed) -> None:
        """Raise `InputError` for a point that this server does not offer."""
        offered = self.settings.points or tuple(self.hello.points)
        for param, point in (("point", body.point), ("min_point", body.min_point)):
            if point is not None and point not in offered:
                raise InputError(f"{param} must be one of {', '.join(offered)}, not {point!r}", param=param)

    def budget(self, request: Request, body: Timed) -> budgets.Budget:
        """The budget of a request, counted from its headers. Raises `DeadlineError` if it is spent already."""
        state = request.scope["state"]
        found = budgets.budget_of(int(state["accepted_ns"]), body, request.headers, self.max_kl)
        state["budgeted"] = found.given
        if found.deadline_ns is None:
            return found
        now = time.monotonic_ns()
        if now >= found.deadline_ns:
            self.metrics.budgets.labels("missed").inc()
            raise DeadlineError("the budget was spent before the request was read")
        return replace(found, delivery_ns=self.delivery.set_aside(now, found.deadline_ns - found.arrival_ns))

    def sent(self, accepted_ns: int, facts: Mapping[str, Any]) -> None:
        """The last byte of an answer was handed to the socket."""
        if (engine_ms := facts.get("engine_ms")) is not None:
            now = time.monotonic_ns()
            self.delivery.note(now, now - accepted_ns - int(engine_ms * 1e6))

    @property
    def max_kl(self) -> float | None:
        """The server's own bound on the measured error of points. Where none was measured the monitor alone watches:
        it sees the live error, and forbids points to the throttle."""
        return self.settings.max_kl if self.hello.errors else None

    def new_id(self) -> int:
        """An id for a request to the engine. Raises `NotReadyError`."""
        return self.supervisor.connection().new_id()

    def submit(self, submit: Submit) -> Answer:
        """Hand a request to the engine."""
        return self.supervisor.connection().submit(submit)

    async def read(self, request: Request, kind: type[jsonbody.T]) -> jsonbody.T:
        """The body as `kind`. Raises `HttpError` for its size, type and time, `InputError` for what it says."""
        data = await read_body(request, self.settings.limits.body_bytes, self.settings.limits.receive_seconds)
        try:
            if len(data) <= INLINE_BYTES:
                body = jsonbody.decode(data, kind)
            else:
                body = await self.prompts.run(lambda: jsonbody.decode(data, kind))
        except InputError as error:
            known = ELSEWHERE.get(error.param or "") if error.code == "unknown_parameter" else None
            if known is None:
                raise
            raise InputError(f"{error}; here it is {known}", param=error.param, code=error.code) from error
        if isinstance(body, Body):
            refuse_unsupported(body)
        return body


def refuse_unsupported(body: Body) -> None:
    """Refuse by name what other servers know and this one cannot serve."""
    for name, why in REFUSED.items():
        value = getattr(body, name, None)
        if value not in (None, False) and not (name == "prompt" and isinstance(value, (str, list))):
            raise InputError(f"{name}: {why}", param=name, code="unsupported_parameter")


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """A JSON body of at most `limit` bytes. Memory is bounded whatever the headers say."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise HttpError(415, f"the body must be application/json, not {kind[:60]!r}")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HttpError(415, "compressed bodies are not accepted")
    length = request.headers.get("content-length", "0")
    if len(length) > 12 or int(length) > limit:
        raise HttpError(413, f"the body is larger than {limit} bytes")
    data = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await request.receive()
                if message["type"] != "http.request":
                    raise HttpError(400, "the client went away", code="client_closed")
                data += message.get("body", b"")
                if len(data) > limit:
                    raise HttpError(413, f"the body is larger than {limit} bytes")
                if not message.get("more_body", False):
                    return bytes(data)
    except TimeoutError:
        raise HttpError(408, f"the body did not arrive within {seconds:g} s") from None


def new_name(prefix: str) -> str:
    """An id for an answer."""
    return prefix + secrets.token_hex(12)
