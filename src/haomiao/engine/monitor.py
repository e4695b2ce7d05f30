"""Watches the error in production: how far what is served is from the most accurate switchable point.

`step_kl`: a few steps, drawn by chance, are run again at the other point over the same K and V as served, while the
answer goes on. `replay_kl`: when nothing is asked, whole answers are run again from their prompt with K and V of their
own, at the points they were served at and at the most accurate one. Both are KL(most accurate || served), nats per
token, with top-1 agreement, by point. A limit on the live figure takes points away from the throttle.

Shadow work takes only time that no budget needs. It lives here and not among the observers of `measure` because the
engine's K and V are needed, and because `LLM` opens it. Knows executors, sequences and blocks; nothing about schedules.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from haomiao.engine.batch import Share
from haomiao.engine.generation import Generation
from haomiao.engine.random import uniform
from haomiao.engine.replay import Replay
from haomiao.engine.sequence import Sequence
from haomiao.engine.shadow import Shadow
from haomiao.engine.state import BlockPool, PagedState
from haomiao.errors import InputError
from haomiao.metrics.divergence import kl_divergence, top1_agreement
from haomiao.metrics.statistics import Interval, bootstrap_mean
from haomiao.types import F32, KV_BLOCK_TOKENS, POINTS, Executor, Receipt, StepBatch, StepResult

DEFAULT_RATE = 0.02
"""Share of steps that are looked at where a limit is set and no rate."""
WINDOW = 1024
"""Latest samples of a point that its figures are of."""
ENOUGH = 32
"""Samples before a limit is applied."""
MOST_REPLAYS = 8
"""Answers that wait to be replayed; older ones are forgotten."""
_Z = 1.96
_CAUTION = 2.0
"""A shadow run is allowed where this many times what it is expected to take can be spared."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one point: mean KL to the most accurate one, nats per token, and share of equal first choices."""

    kl: Interval
    top1: Interval
    samples: int
    """All of them, those that left the window included."""

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return {"kl": self.kl.as_dict(), "top1": self.top1.as_dict(), "samples": self.samples}


class Tally:
    """The latest samples of one point."""

    def __init__(self) -> None:
        self.samples = 0
        self._kl: deque[float] = deque(maxlen=WINDOW)
        self._same: deque[float] = deque(maxlen=WINDOW)

    def add(self, kl: float, same: float) -> None:
        """One sample: a step, or an answer."""
        self.samples += 1
        self._kl.append(kl)
        self._same.append(same)

    def bounds(self) -> tuple[float, float] | None:
        """A quick 95 % interval of the mean KL (normal), or None before there are enough samples."""
        count = len(self._kl)
        if count < ENOUGH:
            return None
        values = np.array(self._kl)
        half = _Z * float(values.std(ddof=1)) / math.sqrt(count)
        return float(values.mean()) - half, float(values.mean()) + half

    def means(self) -> tuple[float, float, int]:
        """Mean KL and share of equal first choices over the window, and all samples."""
        return sum(self._kl) / max(1, len(self._kl)), sum(self._same) / max(1, len(self._same)), self.samples

    def figures(self) -> Figures:
        """Mean and 95 % bootstrap interval over the window."""
        return Figures(bootstrap_mean(list(self._kl)), bootstrap_mean(list(self._same)), self.samples)


class Monitor:
    """The live error of one engine, which attaches it."""

    def __init__(
        self,
        rate: float = DEFAULT_RATE,
        *,
        limit: float | None = None,
        seed: int = 0,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`rate` is the share of steps and of answers that are looked at, `limit` the greatest mean KL of a point that
        the throttle may use. Raises `InputError` for numbers out of range."""
        for name, value, most in (("monitor_rate", rate, 1.0), ("max_kl", limit, math.inf)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 <= value <= most):
                raise InputError(f"{name} must be a number from 0 to {most:g}, not {value!r:.40}", param=name)
        self.rate = float(rate)
        self.limit = limit
        self.skipped = 0
        """Samples that were drawn and not taken, because a budget might have suffered or KV was short."""
        self.forbidden: frozenset[str] = frozenset()
        self._steps: dict[str, Tally] = {}
        self._replays: dict[str, Tally] = {}
        self._seed = seed
        self._clock = clock
        self._count = 0
        self._took_ns = 0.0  # what a shadow run takes, averaged
        self._waiting: deque[Replay] = deque(maxlen=MOST_REPLAYS)
        self._running: Replay | None = None
        self._points: tuple[str, ...] = ()
        self._forbid: Callable[[frozenset[str]], None] = lambda points: None
        self.on_waiting: Callable[[], None] = lambda: None
        """Called when there is something to do in idle time."""

    def attach(self, executor: Executor, pool: BlockPool, forbid: Callable[[frozenset[str]], None]) -> None:
        """Watch this engine. `forbid` is told the points that are over the limit, whenever they change."""
        self._executor, self._pool, self._forbid = executor, pool, forbid
        self._points = tuple(sorted(executor.points, key=list(POINTS).index))

    @property
    def reference(self) -> str:
        """The most accurate point of the engine."""
        return self._points[0]

    # ---- live -----------------------------------------------------------------------------------------------------

    def stepped(
        self, point: str, shares: list[Share], batch: StepBatch, result: StepResult, spare_ns: Callable[[], float]
    ) -> bool:
        """A step was computed and not consumed yet; perhaps look at one of its sequences, if that may take so long by
        `spare_ns`. True if time was taken."""
        other = self._other(point)
        self._count += 1
        if other is None or uniform(self._seed, self._count) >= self.rate:
            return False
        eligible = [
            index
            for index, share in enumerate(shares)
            if share.rows and share.tokens <= KV_BLOCK_TOKENS and isinstance(share.sequence, Generation)
        ]
        if not eligible:
            return False
        if spare_ns() < _CAUTION * max(self._took_ns, 4.0 * result.elapsed_ns):
            self.skipped += 1
            return False
        index = eligible[int(uniform(self._seed, self._count, 1) * len(eligible))]
        self._look(point, other, index, shares, batch, result)
        return True

    def _other(self, point: str) -> str | None:
        """With what a step at `point` is compared: the most accurate point, and at that one a point that is forbidden,
        which would never be seen again otherwise."""
        if point != self.reference:
            return self.reference
        return next(iter(sorted(self.forbidden)), None)

    def _look(
        self, point: str, other: str, index: int, shares: list[Share], batch: StepBatch, result: StepResult
    ) -> None:
        """Run one span again. A failure ends the watching, not the answer."""
        began = self._clock()
        result.logits = result.logits.copy()  # the next step overwrites it, and the sequences have not read it yet
        share, row = shares[index], sum(share.rows for share in shares[:index])
        start = int(batch.span_starts[index])
        first = int(batch.logit_rows[row]) - start  # of the span: the token whose successor is chosen
        span = [int(token) for token in batch.token_ids[start : start + first + 1]]
        past, blocks = int(batch.past[index]), share.sequence.kv.blocks
        try:
            found = self._last(other, span, past, blocks)
            chosen = batch.greedy is not None and bool(batch.greedy[row])
            if chosen or (result.drawn is not None and result.drawn[row] >= 0):  # nothing else of it is here
                served = self._last(point, span, past, blocks)
            else:
                served = result.logits[row : row + 1]
        except Exception:
            logging.getLogger(__name__).exception("a shadow run failed; the monitor is off from now on")
            self.rate = 0.0
            return
        if found is None or served is None:
            self.skipped += 1
            return
        self._took_ns += 0.3 * (self._clock() - began - self._took_ns)
        watched = other if point == self.reference else point
        accurate, less = (served, found) if point == self.reference else (found, served)
        if np.isfinite(accurate).all() and np.isfinite(less).all():
            kl = float(kl_divergence(accurate, less)[0])
            self._steps.setdefault(watched, Tally()).add(kl, float(top1_agreement(accurate, less)[0]))
            if watched == point:
                share.sequence.step_kls.append(kl)
            self._apply_limit()

    def _last(self, point: str, span: list[int], past: int, blocks: list[int]) -> F32 | None:
        """Logits [1, vocab] of the span's last token."""
        rows = Shadow(self._executor, self._pool).again(point, span, past, blocks, len(span))
        return None if rows is None else rows[-1:]

    def _apply_limit(self) -> None:
        """Forbid points that are over the limit beyond doubt; allow them again when they are below it beyond doubt."""
        if self.limit is None:
            return
        over = set(self.forbidden)
        for point, tally in self._steps.items():
            bounds = tally.bounds()
            if bounds is None:
                continue
            if bounds[0] > self.limit:
                over.add(point)
            elif bounds[1] < self.limit:
                over.discard(point)
        if over != self.forbidden:
            self.forbidden = frozenset(over)
            self._forbid(self.forbidden)

    # ---- in idle time ---------------------------------------------------------------------------------------------

    def ended(self, sequence: Sequence, receipt: Receipt) -> None:
        """An answer ended well; perhaps it is replayed when there is time. Its receipt gets `replay_kl` then."""
        if not isinstance(sequence, Generation) or all(entry.point == self.reference for entry in receipt.schedule):
            return
        self._count += 1
        if uniform(self._seed, self._count, 2) < self.rate:
            replay = Replay.of(sequence, receipt, self.reference)
            if replay is not None:
                self._waiting.append(replay)
                self.on_waiting()

    @property
    def waiting(self) -> bool:
        """True if there is something to do in idle time."""
        return self._running is not None or bool(self._waiting)

    def work(self) -> bool:
        """Do one step of a replay. False if there is nothing to do. Called while nothing is asked."""
        if self._running is None:
            if not self._waiting:
                return False
            self._running = self._waiting.popleft()
            self._running.open(self._pool)
        replay = self._running
        try:
            done = replay.advance(self._executor)
        except BaseException as error:
            self.give_way()
            if not isinstance(error, Exception):
                raise
            logging.getLogger(__name__).warning("a replay was given up: %s", error)
            return True
        if done:
            self._running = None
            replay.close()
            kl, same = replay.result()
            replay.receipt.replay_kl = kl
            self._replays.setdefault(replay.point, Tally()).add(kl, same)
        return True

    def give_way(self) -> bool:
        """Give up the replay that runs, so that its KV is free. False if there is none."""
        replay, self._running = self._running, None
        if replay is not None:
            replay.close()
        return replay is not None

    def states(self) -> Iterable[PagedState]:
        """The KV held here."""
        return self._running.states if self._running is not None else ()

    def close(self) -> None:
        """Give everything back; idempotent."""
        self._waiting.clear()
        self.give_way()

    # ---- what was found -------------------------------------------------------------------------------------------

    def means(self) -> dict[str, tuple[float, float, int]]:
        """Mean KL, share of equal first choices and number of samples, by `step_kl_` or `replay_kl_` and the point:
        quickly, for gauges."""
        kinds = (("step_kl", self._steps), ("replay_kl", self._replays))
        return {f"{kind}_{point}": tally.means() for kind, tallies in kinds for point, tally in tallies.items()}

    def step_figures(self) -> dict[str, Figures]:
        """Live figures by point: single steps over the K and V that were served."""
        return {point: tally.figures() for point, tally in self._steps.items() if tally.samples}

    def replay_figures(self) -> dict[str, Figures]:
        """Figures of whole answers by point ("mixed": more than one in an answer); each answer counts once."""
        return {point: tally.figures() for point, tally in self._replays.items() if tally.samples}

    def as_dict(self) -> dict[str, Any]:
        """Everything, JSON-ready: for metrics."""
        return {
            "reference": self._points[0] if self._points else None,
            "rate": self.rate,
            "max_kl": self.limit,
            "forbidden": sorted(self.forbidden),
            "skipped": self.skipped,
            "step_kl": {point: figures.as_dict() for point, figures in self.step_figures().items()},
            "replay_kl": {point: figures.as_dict() for point, figures in self.replay_figures().items()},
        }
