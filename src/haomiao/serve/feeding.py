"""Streamed input beside the engine: what a session has read is computed while more of it arrives.

Runs on the stepping thread, between steps (`EngineLoop.on_feed`, `on_events`). A session is a list of tokens that the
HTTP process keeps up to date; what of it is not computed yet is prefilled when nothing more urgent waits. At a `Commit`
the prefill that still runs is ended: what it computed stays with the session, and the answer's own prefill computes the
rest. Knows token ids and no text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from haomiao.engine.request import DoneEvent, EngineRequest, Event
from haomiao.errors import EngineError, HaomiaoError
from haomiao.serve.messages import Close, Commit, Fed, Feed, Message, Refused

if TYPE_CHECKING:
    from haomiao.serve.engine_loop import EngineLoop


@dataclass(slots=True)
class _Fed:
    """One session."""

    session: int
    """The engine's id of it."""
    salt: bytes
    point: str | None
    tokens: list[int] = field(default_factory=list)
    prefill: int | None = None
    """The engine's id of the prefill that runs."""
    asked: int = 0
    """Tokens that it computes."""
    answers: set[int] = field(default_factory=set)
    """Requests that answer from the session."""
    commit: Commit | None = None
    """Waits for the answer before it to end."""
    stale: bool = False
    """True if tokens came that no prefill was asked for."""
    closed: bool = False


class Feeding:
    """The sessions of one engine."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop
        self._sessions: dict[int, _Fed] = {}
        self._jobs: dict[int, int] = {}  # prefills and answers, by the engine's id -> our session

    # ---- messages -------------------------------------------------------------------------------------------------

    def take(self, message: Message) -> None:
        """One `Feed`, `Commit` or `Close`."""
        if isinstance(message, Feed):
            self._feed(message)
        elif isinstance(message, Commit):
            self._commit(message)
        elif isinstance(message, Close):
            self._close(message.session)

    def _feed(self, message: Feed) -> None:
        fed = self._sessions.get(message.session)
        if fed is None:
            session = self._loop.engine.open_session()
            fed = self._sessions[message.session] = _Fed(session, message.salt, message.point)
        position = min(message.position, len(fed.tokens))
        fed.tokens[position:] = message.token_ids
        fed.point = message.point
        fed.stale = True
        if fed.prefill is not None and position < fed.asked:  # it computes what is no longer wanted
            self._end_prefill(fed)
        self._go_on(message.session, fed)

    def _commit(self, message: Commit) -> None:
        fed = self._sessions.get(message.session)
        if fed is None:
            self._loop.send(Refused.of(message.submit.id, EngineError(f"there is no session {message.session}")))
            return
        fed.tokens += message.submit.token_ids
        fed.commit = message
        fed.stale = False
        if fed.prefill is not None:
            self._end_prefill(fed)
        self._go_on(message.session, fed)

    def _close(self, session: int) -> None:
        fed = self._sessions.get(session)
        if fed is None:
            return
        fed.closed, fed.stale, fed.commit = True, False, None
        for job in [*fed.answers, *([] if fed.prefill is None else [fed.prefill])]:
            self._loop.engine.cancel(job)
        self._settle()
        self._go_on(session, fed)

    # ---- what the engine says -------------------------------------------------------------------------------------

    def see(self, events: list[Event]) -> list[Event]:
        """Take the ends of our own prefills out of the events, and go on where a session has become free."""
        told: list[Event] = []
        free: list[int] = []
        for event in events:
            session = self._jobs.get(event.request_id)
            fed = None if session is None else self._sessions.get(session)
            if session is None or fed is None:
                told.append(event)
                continue
            mine = event.request_id == fed.prefill
            if not mine:
                told.append(event)
            if isinstance(event, DoneEvent):  # an answer from a session has one sample
                del self._jobs[event.request_id]
                fed.answers.discard(event.request_id)
                if mine:
                    self._computed(session, fed, event)
                free.append(session)
        for session in free:
            fed = self._sessions.get(session)
            if fed is not None:
                self._go_on(session, fed)
        return told

    def _computed(self, session: int, fed: _Fed, event: DoneEvent) -> None:
        fed.prefill = None
        if event.error is None and not fed.closed:
            receipt = event.receipt
            self._loop.send(Fed(session=session, tokens=fed.asked, cached=receipt.cached_tokens, ms=receipt.total_ms))

    # ---- what is next ---------------------------------------------------------------------------------------------

    def _go_on(self, session: int, fed: _Fed) -> None:
        """Start what waits for the session to be free: an answer, else a prefill."""
        if fed.answers or fed.prefill is not None:
            return
        if fed.closed:
            if self._sessions.pop(session, None) is not None:
                self._loop.engine.close_session(fed.session)
        elif fed.commit is not None:
            commit, fed.commit = fed.commit, None
            job = self._loop.submit(commit.submit, session=fed.session, prompt=list(fed.tokens))
            if job is not None:
                fed.answers.add(job)
                self._jobs[job] = session
        elif fed.stale and fed.tokens:
            self._prefill(session, fed)

    def _prefill(self, session: int, fed: _Fed) -> None:
        fed.stale = False
        request = EngineRequest(list(fed.tokens), work="prefill", session=fed.session, salt=fed.salt, point=fed.point)
        try:
            job = self._loop.engine.submit(request)
        except HaomiaoError:  # too long, or no room: whoever commits is told
            return
        fed.prefill, fed.asked = job, len(fed.tokens)
        self._jobs[job] = session

    def _end_prefill(self, fed: _Fed) -> None:
        if fed.prefill is not None:
            self._loop.engine.cancel(fed.prefill)
            self._settle()

    def _settle(self) -> None:
        """Let cancellations take effect now; no step runs, since this is the thread that steps."""
        self._loop.tell(self._loop.engine.settle())


def attach(loop: EngineLoop) -> Feeding:
    """Give an engine loop its sessions."""
    feeding = Feeding(loop)
    loop.on_feed, loop.on_events = feeding.take, feeding.see
    return feeding
