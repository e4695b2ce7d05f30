"""What sessions remember between requests: the tokens of one sequence each, and its KV.

A request takes the KV over, cut to what its prompt has in common with those tokens, and leaves its own sequence behind.
KV that no request uses may be taken away when room is short; the session then computes it again. Knows no text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from haomiao.engine.state import PagedState
from haomiao.errors import InputError


@dataclass(slots=True)
class _Held:
    tokens: list[int] = field(default_factory=list)
    state: PagedState | None = None
    point: str = ""
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

    def take(self, session: int, job_id: int, point: str, tokens: Sequence[int], limit: int) -> PagedState | None:
        """Hand over KV for the common beginning of `tokens`, at most `limit` tokens of it; None if there is nothing.

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
        common = 0
        if held.point == point:
            for mine, theirs in zip(held.tokens[: state.length], tokens[:limit], strict=False):
                if mine != theirs:
                    break
                common += 1
        state.truncate(common)
        return state if common else None

    def give(self, session: int | None, job_id: int, point: str, tokens: Sequence[int], state: PagedState) -> bool:
        """Leave a computed sequence with the session of the request. False if that is gone: the caller keeps it."""
        held = self._of(session, job_id)
        if session is None or held is None:
            return False
        held.tokens, held.state, held.point = list(tokens[: state.length]), state, point
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
