"""When the work at hand will be done: the scheduler's policy played forward on the cost model.

A pure function of the time, the work and the cost. It plays stretches of equal steps at once: everything that decodes
goes along in every step, prefill fills the rest in order of urgency, works at different points take turns. What it
returns are bounds: elapsed expectation times the margin of a run of that length. Knows no sequences and no KV.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from haomiao.engine.cost import Cost, StepShape
from haomiao.engine.scheduler import PATIENCE_NS

MAX_STRETCHES = 512
"""Stretches that are played; what is not done by then counts as never."""
NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class Work:
    """What one sequence still needs."""

    key: int
    prefill: int
    """Tokens before its first, or next, token comes; 0: it decodes."""
    decode: int
    """Steps after that, as far as is expected."""
    least: int
    """Steps after that without which the answer is not worth having; at most `decode`."""
    length: int = 0
    """Tokens in KV."""
    width: int = 1
    """Tokens in each step of decoding: samples, or sequences beside the prompt's own for a choice."""
    rows: int = 1
    """Rows of logits in the step that ends its prefill."""
    top: int = 0
    """Index in the ladder of the most accurate point it may run at."""
    bottom: int = 0
    """Index of the cheapest one."""
    arrival_ns: int = 0
    deadline_ns: int | None = None
    first_ns: int | None = None
    """Deadline of the first token, while there is none."""
    delivery_ns: int = 0
    """By how much `deadline_ns` is before the end of its budget."""

    @property
    def guest(self) -> bool:
        """It has no budget."""
        return self.deadline_ns is None and self.first_ns is None

    @property
    def due_ns(self) -> int:
        """Its next deadline."""
        return min(self.deadline_ns or NEVER, self.first_ns or NEVER)

    def at(self, level: int) -> int:
        """The point it runs at when the throttle stands at `level`, as an index in the ladder."""
        return min(max(level, self.top), self.bottom)

    def after(self, tokens: int) -> Work:
        """What is left once `tokens` of its tokens were computed."""
        if self.prefill:
            return replace(self, prefill=max(0, self.prefill - tokens), length=self.length + tokens)
        return replace(self, decode=max(0, self.decode - 1), least=max(0, self.least - 1), length=self.length + tokens)


@dataclass(frozen=True, slots=True)
class Finish:
    """Bounds on the first token and on the end, nanoseconds of the clock that `now` is of."""

    first_ns: int
    end_ns: int

    def keeps(self, work: Work) -> bool:
        """True if the work's deadlines hold."""
        late = work.deadline_ns is not None and self.end_ns > work.deadline_ns
        return not late and (work.first_ns is None or self.first_ns <= work.first_ns)

    def sooner(self, now: int, share: float) -> Finish:
        """The same if the end comes after that share of the time from `now` on; a share above 1 changes nothing."""
        if share >= 1.0 or self.end_ns >= NEVER:
            return self
        return Finish(self.first_ns, now + int((self.end_ns - now) * share))


@dataclass(frozen=True, slots=True)
class Machine:
    """What runs the work: points from the most accurate to the cheapest, and the size of a step."""

    ladder: tuple[str, ...]
    max_step_tokens: int
    chunk_tokens: int
    """Prefill tokens in one step, at most."""
    tightest_ns: int = 0
    """What is due no later than that from now is not cut."""


def forecast(
    now: int,
    works: Iterable[Work],
    machine: Machine,
    cost: Cost,
    level: int,
    *,
    least: bool = False,
    floor_ns: int = 0,
) -> dict[int, Finish] | None:
    """When each work is done if everything runs at `level` where it may. `floor_ns` is a step that others, who are not
    among `works`, get once in `PATIENCE_NS`. None if the cost of a point is not known."""
    every = sorted(works, key=lambda work: (work.due_ns, work.arrival_ns, work.key))
    waiting = [_Going(work, level, least) for work in every if work.prefill]
    running = [_Going(work, level, least) for work in every if not work.prefill]
    done: dict[int, Finish] = {}
    elapsed = 0.0
    running = _settle(running, done, now, now)
    for _ in range(MAX_STRETCHES):
        if not waiting and not running:
            return done
        parts = _Parts(machine)
        for going in running:
            parts.add(going, going.work.width, rows=going.work.width)
        chunks = parts.fill(waiting, now + int(elapsed) + machine.tightest_ns)
        count = _stretch(running, waiting, chunks)
        nanoseconds = parts.price(cost, count)
        if nanoseconds is None:
            return None
        elapsed += count * nanoseconds
        reached = now + int(elapsed * cost.margin(elapsed) * (1 + floor_ns / PATIENCE_NS)) + floor_ns
        for going in running:
            going.decode -= count
            going.length += count * going.work.width
        for going, tokens in chunks:
            going.prefill -= tokens * count
            going.length += tokens * count
            if going.prefill <= 0:
                going.first_ns = reached
                running.append(going)
        if chunks:
            waiting = [going for going in waiting if going.prefill > 0]
        running = _settle(running, done, reached, now)
    for going in (*waiting, *running):
        done[going.work.key] = Finish(going.first_ns or NEVER, NEVER)
    return done


class _Going:
    """A work on its way."""

    __slots__ = ("decode", "first_ns", "length", "point", "prefill", "work")

    def __init__(self, work: Work, level: int, least: bool) -> None:
        self.work = work
        self.prefill = work.prefill
        self.decode = work.least if least else work.decode
        self.length = work.length
        self.point = work.at(level)
        self.first_ns: int | None = None


def _settle(running: list[_Going], done: dict[int, Finish], reached: int, now: int) -> list[_Going]:
    """Note those that are done; returns the others."""
    left: list[_Going] = []
    for going in running:
        if going.decode > 0:
            left.append(going)
        else:
            done[going.work.key] = Finish(going.first_ns if going.first_ns is not None else now, reached)
    return left


def _stretch(running: Sequence[_Going], waiting: Sequence[_Going], chunks: Sequence[tuple[_Going, int]]) -> int:
    """Steps until something changes."""
    count = min((going.decode for going in running), default=NEVER)
    if waiting:
        whole = len(chunks) == 1 and chunks[0][0].prefill > chunks[0][1]
        count = min(count, chunks[0][0].prefill // chunks[0][1] if whole else 1)
    return max(1, count)


class _Parts:
    """One step's tokens by point; more tokens than a step holds make it longer in proportion."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._left = machine.max_step_tokens
        self.shapes: dict[int, list[int]] = {}  # point -> tokens, rows, context, sequences, growth a step

    def add(self, going: _Going, tokens: int, rows: int) -> None:
        """Book tokens of one work."""
        shape = self.shapes.setdefault(going.point, [0, 0, 0, 0, 0])
        shape[0] += tokens
        shape[1] += rows
        shape[2] += tokens * going.length + tokens * (tokens + 1) // 2
        shape[3] += max(1, going.work.width) if rows else 1
        shape[4] += tokens * tokens
        self._left -= tokens

    def fill(self, waiting: Sequence[_Going], before_all: int) -> list[tuple[_Going, int]]:
        """Give the rest of the step to prefill, the most urgent first; somebody always gets a token. Who is due until
        `before_all` goes before anybody who may still come, and is not cut for them."""
        room, chunk = max(1, self._left), self._machine.chunk_tokens
        chunks: list[tuple[_Going, int]] = []
        for going in waiting:
            tokens = min(going.prefill, room if going.work.due_ns <= before_all else min(room, chunk))
            if tokens <= 0:
                break
            chunks.append((going, tokens))
            self.add(going, tokens, rows=going.work.rows if tokens == going.prefill else 0)
            room -= tokens
            chunk = max(0, chunk - tokens)
        return chunks

    def price(self, cost: Cost, count: int) -> float | None:
        """Expected nanoseconds of one step, averaged over `count` such steps while contexts grow."""
        total = 0.0
        for point, (tokens, rows, context, sequences, growth) in self.shapes.items():
            ahead = context + growth * (count - 1) // 2
            expected = cost.predict(StepShape(self._machine.ladder[point], tokens, 0, ahead, rows, sequences))
            if expected is None:
                return None
            total += expected * max(1.0, tokens / self._machine.max_step_tokens)
        return total
