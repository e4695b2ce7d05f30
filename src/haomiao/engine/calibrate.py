"""Measures how long steps take on this machine, by running real ones: what the cost model is fitted to.

A second engine runs made-up requests on the same executor, in KV blocks borrowed from the first, so that everything a
round costs is inside: planning, the step, sampling. Prompts of many lengths alone, with an answer and without, then
several answers beside each other, cheap ones first, again and again until the time is spent. Knows the executor only by
its protocol.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from haomiao.engine.cost import Cost, StepShape
from haomiao.engine.engine import Engine
from haomiao.engine.request import EngineRequest
from haomiao.engine.state import BlockPool, blocks_for
from haomiao.types import I32, KV_BLOCK_TOKENS, Executor, KvType, SamplingParams, StepBatch, StepResult

PROMPTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
STREAMS = (1, 2, 3, 4, 6, 8, 12, 16)
DECODED = 6
EXTENDED = (2, 8, 20, 40)
"""Tokens that are added to a prompt which is held already."""
PAST = 384
REHEARSED = 16
"""Tokens of the prompt of a rehearsal."""
SECONDS = 1.8
"""Spent on each point, unless one round of the cheap half takes longer."""

Progress = Callable[[str, int, int], None]


def calibrate(
    executor: Executor,
    pool: BlockPool,
    points: Sequence[str],
    *,
    max_context: int,
    seconds: float = SECONDS,
    progress: Progress | None = None,
) -> list[tuple[StepShape, float]]:
    """Steps and their nanoseconds, in the order in which they ran. `pool` is that of the engine that owns `executor`;
    no step of it may run meanwhile. Returns nothing where not even a short prompt finds room."""
    steps: list[tuple[StepShape, float]] = []
    wanted = min(pool.available, max(STREAMS) * 2, executor.kv_blocks)
    if not wanted:
        return steps
    borrowed = pool.allocate(wanted)
    try:
        for number, point in enumerate(points):
            guest = _Guest(executor, borrowed)
            steps += _measure(guest, point, max_context, seconds, _part_of(progress, number, len(points)))
    finally:
        pool.drop(borrowed)
    return steps


def rehearse(
    executor: Executor, pool: BlockPool, point: str, clock: Callable[[], int]
) -> list[tuple[StepShape, float]]:
    """Steps and their nanoseconds for one short prompt and its answer; none where they find no room. As with
    `calibrate`, no step of the engine may run meanwhile."""
    needed = blocks_for(REHEARSED + DECODED)
    if pool.available < needed:
        return []
    borrowed = pool.allocate(needed)
    recorder = _Recorder()
    try:
        guest = _Guest(executor, borrowed)
        size = REHEARSED + DECODED
        engine = Engine(guest, max_context=size, prefix_cache=False, point=point, cost=recorder, clock=clock)
        _run_together(engine, [[1] * REHEARSED])
    finally:
        pool.drop(borrowed)
    return recorder.steps


def _measure(
    guest: _Guest, point: str, max_context: int, seconds: float, progress: Callable[[float], None]
) -> list[tuple[StepShape, float]]:
    """Steps of one point. The first round warms up what is touched for the first time, and does not count."""
    recorder = _Recorder()
    engine = Engine(guest, max_context=max_context, prefix_cache=False, point=point, cost=recorder)
    random = np.random.default_rng(0)
    begun = time.monotonic()
    _run_together(engine, [[1] * 4] * 2)
    recorder.steps.clear()
    for round_number in itertools.count():
        for prompts in _settings(guest, max_context):
            spent = time.monotonic() - begun
            if spent >= seconds and (round_number or len(recorder.steps) >= 48):
                return recorder.steps
            progress(min(1.0, spent / seconds))
            size = sum(prompts)
            if size > 128 and round_number % (size // 128):
                continue  # long prompts cost much and vary little
            tokens = [random.integers(0, guest.vocab_size, size=n).tolist() for n in prompts]
            _run_together(engine, tokens)
            if len(tokens) == 1:
                engine.run_until(engine.submit(EngineRequest(tokens[0], work="prefill")))  # the same without the head
        if round_number % 2 == 0:
            _run_extended(engine, guest, random.integers(0, guest.vocab_size, size=PAST + sum(EXTENDED)).tolist())
    return recorder.steps


def _settings(guest: _Guest, max_context: int) -> Iterator[list[int]]:
    """Lengths of the prompts that run beside each other, cheap ones first."""
    longest = min(guest.max_step_tokens, max_context - DECODED, (guest.kv_blocks - 1) * KV_BLOCK_TOKENS - DECODED)
    settings = [[length] for length in PROMPTS if length <= longest]
    settings += [[length] * streams for streams in STREAMS for length in (2, 20)]
    for prompts in sorted(settings, key=sum):
        if sum(blocks_for(length + DECODED) for length in prompts) <= guest.kv_blocks:
            yield prompts


def _run_together(engine: Engine, prompts: Sequence[Sequence[int]]) -> None:
    sampling = SamplingParams(max_tokens=DECODED, ignore_eos=True)
    for prompt in prompts:
        engine.submit(EngineRequest(list(prompt), sampling=sampling))
    engine.run_until()


def _run_extended(engine: Engine, guest: _Guest, tokens: Sequence[int]) -> None:
    """A few tokens after a long past: what a cached prefix or a session leaves to do."""
    past = min(PAST, engine.limits.max_context // 2, (guest.kv_blocks - 3) * KV_BLOCK_TOKENS)
    if past < KV_BLOCK_TOKENS:
        return
    session = engine.open_session()
    for more in (0, *EXTENDED):
        past += more
        engine.run_until(engine.submit(EngineRequest(list(tokens[:past]), work="prefill", session=session)))
    engine.close_session(session)


def _part_of(progress: Progress | None, number: int, count: int) -> Callable[[float], None]:
    """Progress of one point as a part of the whole, in thousandths."""
    if progress is None:
        return lambda share: None
    return lambda share: progress("measuring this machine", round(1000 * (number + share) / count), 1000)


class _Recorder:
    """Implements what the engine asks of a cost model: knows nothing and keeps everything."""

    coverage = 0.99

    def __init__(self) -> None:
        self.steps: list[tuple[StepShape, float]] = []

    def observe(self, shape: StepShape, nanoseconds: float) -> None:
        self.steps.append((shape, nanoseconds))

    def predict(self, shape: StepShape) -> float | None:
        return None

    def bound(self, shape: StepShape) -> float | None:
        return None

    def margin(self, nanoseconds: float) -> float:
        return 1.0

    def idle(self) -> Cost:
        return self

    def rest(self, nanoseconds: float) -> None:
        """Nothing is learned, so nothing grows old."""


class _Guest:
    """Implements `types.Executor` on some KV blocks of another engine's executor."""

    def __init__(self, host: Executor, blocks: Sequence[int]) -> None:
        self._host = host
        self._blocks = np.array([*blocks, -1], dtype=np.int32)  # -1, an unused entry, stays -1
        self.vocab_size = host.vocab_size
        self.hidden_size = host.hidden_size
        self.max_step_tokens = host.max_step_tokens
        self.max_logit_rows = int(getattr(host, "max_logit_rows", host.max_step_tokens))
        self.max_sequences = int(getattr(host, "max_sequences", host.max_step_tokens))
        self.kv_blocks = len(blocks)
        self.kv_bytes_per_block = host.kv_bytes_per_block
        self.kv_type: KvType = host.kv_type
        self.points = host.points

    def step(self, batch: StepBatch) -> StepResult:
        batch.block_tables = self._blocks[batch.block_tables]
        if batch.copies is not None:
            batch.copies[:, 1] = self._blocks[batch.copies[:, 1]]
        return self._host.step(batch)

    def copy_blocks(self, pairs: I32) -> None:
        self._host.copy_blocks(self._blocks[pairs])

    def close(self) -> None:
        """The host stays open."""
