"""What sessions remember between requests: the tokens of one sequence each, and its KV.

A request takes the KV over, cut to what its prompt has in common with those tokens, and leaves its own sequence behind.
KV that no request uses may be taken away when room is short; the session then computes it again. Knows no text.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from haomiao.engine.origin import Origin
from haomiao.engine.state import PagedState
from haomiao.errors import InputError


@dataclass(slots=True)
class _Held:
    tokens: list[int] = field(default_factory=list)
    state: PagedState | None = None
    origin: Origin = field(default_factory=Origin)
    job_id: int | None = None  # the request that runs in the session now


class HeldSequences:
    """All sessions of an engine, by id; those used longest ago first."""

    def __init__(self) -> None:
        self._sessions: dict[int, _Held] = {}
        self._ids = itertools.count(1)

    def open(self) -> int:
        """A new, empty session."""
        session = next(self._ids)
        self._sessions[session] = _Held()
        return session

    def take(
        self, session: int, job_id: int, points: Collection[str], tokens: Sequence[int], limit: int
    ) -> tuple[PagedState, Origin] | None:
        """Hand over KV for the common beginning of `tokens`, at most `limit` tokens of it, as far as it was computed at
        one of `points`; None if there is nothing.

        Raises `InputError` if there is no such session, or a request runs in it.
        """
        held = self._sessions.get(session)
        if held is None:
            raise InputError(f"there is no session {session}", param="session")
        if held.job_id is not None:
            raise InputError("a session serves one request at a time", param="session")
        held.job_id = job_id
        state, held.state = held.state, None
        if state is None:
            return None
        origin, held.origin = held.origin, Origin()
        common = _common(held.tokens[: state.length], tokens[: min(limit, origin.within(points))])
        state.truncate(common)
        origin.cut(common)
        return (state, origin) if common else None

    def peek(self, session: int, points: Collection[str], tokens: Sequence[int], limit: int) -> int:
        """How many tokens `take` would hand over; 0 for a session that is not there."""
        held = self._sessions.get(session)
        if held is None or held.state is None:
            return 0
        return _common(held.tokens[: held.state.length], tokens[: min(limit, held.origin.within(points))])

    def give(self, session: int | None, job_id: int, tokens: Sequence[int], state: PagedState, origin: Origin) -> bool:
        """Leave a computed sequence with the session of the request. False if that is gone: the caller keeps it."""
        held = self._of(session, job_id)
        if session is None or held is None:
            return False
        origin.cut(state.length)
        held.tokens, held.state, held.origin = list(tokens[: state.length]), state, origin
        self._sessions[session] = self._sessions.pop(session)
        return True

    def leave(self, session: int | None, job_id: int) -> None:
        """The request ended: the session may serve another one."""
        held = self._of(session, job_id)
        if held is not None:
            held.job_id = None

    def drop_oldest(self) -> bool:
        """Give back the KV of the session that was used longest ago. False if none holds any."""
        for held in self._sessions.values():
            if held.state is not None:
                held.state.release()
                held.state = None
                return True
        return False

    def close(self, session: int) -> None:
        """Forget a session; unknown ones are ignored."""
        held = self._sessions.pop(session, None)
        if held is not None and held.state is not None:
            held.state.release()

    def close_all(self) -> None:
        """Forget every session."""
        for session in list(self._sessions):
            self.close(session)

    def states(self) -> Iterator[PagedState]:
        """The KV held here."""
        return (held.state for held in self._sessions.values() if held.state is not None)

    def _of(self, session: int | None, job_id: int) -> _Held | None:
        held = None if session is None else self._sessions.get(session)
        return held if held is not None and held.job_id == job_id else None


def _common(mine: Sequence[int], theirs: Sequence[int]) -> int:
    """Length of the common beginning."""
    for index, (left, right) in enumerate(zip(mine, theirs, strict=False)):
        if left != right:
            return index
    return min(len(mine), len(theirs))
