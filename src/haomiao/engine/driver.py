"""Lets several threads use one engine: whoever waits for an answer runs the next step, for all of them.

No thread of its own: between steps nothing runs beside the caller, and an idle engine costs nothing. Requests that wait
at the same time share steps. Knows nothing about text.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from haomiao.engine.engine import Engine
from haomiao.engine.request import DoneEvent, EngineRequest, Event
from haomiao.errors import EngineError, InputError

T = TypeVar("T")


class Ticket:
    """A request in flight, as its caller holds it."""

    def __init__(self, driver: Driver, request_id: int, samples: int) -> None:
        self._driver = driver
        self.request_id = request_id
        self.open = samples
        self.events: deque[Event] = deque()

    @property
    def done(self) -> bool:
        """True if every sample has ended and been told."""
        return not self.open and not self.events

    def wait(self) -> list[Event]:
        """The next events, running steps until there are some. An empty list: everything was told."""
        return self._driver.wait(self)

    def cancel(self) -> None:
        """End the request if it has not ended; idempotent, from any thread."""
        self._driver.cancel(self)


class Driver:
    """The engine's turns. `submit`, `wait`, `cancel` and `alone` may be called from any thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._turn = threading.Condition(threading.Lock())
        self._stepping = False
        self._closed = False
        self._tickets: dict[int, Ticket] = {}

    def submit(self, request: EngineRequest) -> Ticket:
        """Queue a request. Raises what `Engine.submit` does, and `InputError` after `close`."""
        samples = request.sampling.n if request.work == "generate" else 1
        with self._turn:
            self._check_open()
            request_id = self._engine.submit(request)
            ticket = self._tickets[request_id] = Ticket(self, request_id, samples)
            return ticket

    def wait(self, ticket: Ticket) -> list[Event]:
        """As `Ticket.wait`."""
        while True:
            with self._turn:
                while not ticket.events and ticket.open and self._stepping:
                    self._turn.wait()
                if ticket.events or not ticket.open:
                    events = list(ticket.events)
                    ticket.events.clear()
                    return events
                self._check_open()
                if not self._engine.busy:
                    raise EngineError(f"request {ticket.request_id} was lost")
                self._stepping = True
            self._step()

    def cancel(self, ticket: Ticket) -> None:
        """As `Ticket.cancel`. Never waits, so that a finalizer may call it at any moment."""
        if self._tickets.pop(ticket.request_id, None) is None:
            return
        ticket.open = 0
        self._engine.cancel(ticket.request_id)
        if self._turn.acquire(blocking=False):  # else whoever is inside comes to it with the next step
            try:
                if not self._stepping and not self._closed:
                    self._hand_out(self._engine.settle())
            finally:
                self._turn.release()

    def alone(self, action: Callable[[Engine], T]) -> T:
        """Do something with the engine while no step runs."""
        with self._between_steps():
            return action(self._engine)

    def close(self) -> None:
        """Close the engine once the running step has ended; idempotent. Requests in flight end with an error."""
        with self._between_steps(even_closed=True):
            if not self._closed:
                self._closed = True
                self._engine.close()

    @contextmanager
    def _between_steps(self, even_closed: bool = False) -> Iterator[None]:
        with self._turn:
            while self._stepping:
                self._turn.wait()
            if not even_closed:
                self._check_open()
            self._stepping = True
        try:
            yield
        finally:
            with self._turn:
                self._stepping = False
                self._turn.notify_all()

    def _step(self) -> None:
        events: list[Event] = []
        try:
            events = self._engine.step()
        finally:
            with self._turn:
                self._stepping = False
                self._hand_out(events)
                self._turn.notify_all()

    def _hand_out(self, events: Iterable[Event]) -> None:
        """Give every event to its ticket; those of cancelled requests are dropped."""
        for event in events:
            ticket = self._tickets.get(event.request_id)
            if ticket is None:
                continue
            ticket.events.append(event)
            if isinstance(event, DoneEvent):
                ticket.open = 0 if event.error is not None else ticket.open - 1
                if not ticket.open:
                    self._tickets.pop(event.request_id, None)

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("the model was closed", code="closed")
