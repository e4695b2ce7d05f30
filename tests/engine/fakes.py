"""A deterministic executor without a model, and small stand-ins for what `text` brings.

The fake's logits are drawn from a hash of everything a sequence can see, read back through the block tables: a block in
the wrong place, a stale one or one that somebody else wrote changes the answer or fails the step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from haomiao.engine.engine import Engine
from haomiao.engine.request import DoneEvent, EngineRequest, Event, TokenEvent
from haomiao.types import I32, KV_BLOCK_TOKENS, KvType, SamplingParams, StepBatch, StepResult

VOCAB = 61
EOS = 0


class FakeExecutor:
    """`types.Executor` over integers: one K/V entry is (token, position, point)."""

    kv_type: KvType = "f32"
    hidden_size = 5
    kv_bytes_per_block = 1000

    def __init__(
        self,
        *,
        vocab_size: int = VOCAB,
        max_step_tokens: int = 64,
        kv_blocks: int = 64,
        points: tuple[str, ...] = ("int8", "int4"),
        step_ns: int = 1_000_000,
        eos_bias: float = -4.0,
    ) -> None:
        self.vocab_size = vocab_size
        self.max_step_tokens = max_step_tokens
        self.kv_blocks = kv_blocks
        self.points = points
        self.step_ns = step_ns
        self.eos_bias = eos_bias
        self.kv = np.full((kv_blocks, KV_BLOCK_TOKENS, 3), -1, dtype=np.int64)
        self.batches: list[StepBatch] = []
        self.closed = False
        self.before_step: Callable[[StepBatch], None] | None = None

    def step(self, batch: StepBatch) -> StepResult:
        if self.before_step is not None:
            self.before_step(batch)
        self.batches.append(batch)
        assert 0 < batch.tokens <= self.max_step_tokens
        assert list(batch.logit_rows) == sorted(set(batch.logit_rows))
        written: set[tuple[int, int]] = set()
        histories: dict[int, np.ndarray] = {}
        for index in range(len(batch.past)):
            start, end = int(batch.span_starts[index]), int(batch.span_starts[index + 1])
            past, table = int(batch.past[index]), batch.block_tables[index]
            assert start < end
            for offset, token in enumerate(batch.token_ids[start:end]):
                position = past + offset
                place = (int(table[position // KV_BLOCK_TOKENS]), position % KV_BLOCK_TOKENS)
                assert place[0] >= 0 and place not in written, "two sequences write one place"
                written.add(place)
                self.kv[place] = (int(token), position, self.points.index(batch.point))
                for row, block in () if batch.copies is None else batch.copies:
                    if row == start + offset:
                        place = int(block), position % KV_BLOCK_TOKENS
                        assert place not in written, "a copy overwrites what somebody wrote"
                        written.add(place)
                        self.kv[place] = (int(token), position, self.points.index(batch.point))
            blocks = table[: -(-(past + end - start) // KV_BLOCK_TOKENS)]
            seen = self.kv[blocks].reshape(-1, 3)[: past + end - start]
            assert (seen[:, 1] == np.arange(len(seen))).all(), "K/V of another position"
            for row in range(start, end):
                histories[row] = seen[: past + row - start + 1, [0, 2]]
        logits = (
            np.stack([self.logits_of(histories[int(row)]) for row in batch.logit_rows])
            if len(batch.logit_rows)
            else np.zeros((0, self.vocab_size), np.float32)
        )
        argmax = logits.argmax(axis=1).astype(np.int32)
        if batch.greedy is not None:
            logits[batch.greedy] = np.nan  # nobody may look at them
        hidden = None
        if batch.hidden_rows is not None:
            hidden = np.stack([self.hidden_of(histories[int(row)]) for row in batch.hidden_rows])
        return StepResult(logits, argmax, self.step_ns, hidden)

    def hidden_of(self, history: np.ndarray) -> np.ndarray:
        """A final hidden state after a history, as `logits_of`."""
        return self.logits_of(history)[: self.hidden_size]

    def logits_of(self, history: np.ndarray) -> np.ndarray:
        """Logits [vocab] after a history int64 [tokens, 2] of (token, point)."""
        seed = hashlib.blake2b(np.ascontiguousarray(history).tobytes(), digest_size=8).digest()
        logits = np.random.default_rng(int.from_bytes(seed, "little")).standard_normal(self.vocab_size) * 2
        logits[EOS] += self.eos_bias
        return logits.astype(np.float32)

    def copy_blocks(self, pairs: I32) -> None:
        for source, target in pairs:
            self.kv[target] = self.kv[source]

    def close(self) -> None:
        self.closed = True


class Clock:
    """A clock that moves when told to, and by itself with every step of an engine that it was given to."""

    def __init__(self) -> None:
        self.now = 1_000_000_000

    def __call__(self) -> int:
        return self.now


class LetterMatcher:
    """`types.StopMatcher` for a vocabulary in which token `i` is one character."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stops = tuple(stops)
        self.held = ""
        self.stopped: str | None = None

    def push(self, token_id: int) -> str:
        self.held += letter(token_id)
        for stop in self.stops:
            if stop in self.held:
                self.stopped = stop
                out, self.held = self.held[: self.held.index(stop)], ""
                return out
        keep = max((n for s in self.stops for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        out, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return out

    def flush(self) -> str:
        out, self.held = self.held, ""
        return out


def letter(token_id: int) -> str:
    """The character of a token."""
    return chr(ord("0") + token_id)


class PatternConstraint:
    """`types.TokenConstraint`: one set of allowed tokens per position, and then the end."""

    def __init__(self, pattern: Sequence[Sequence[int]], *, fail_at: int | None = None) -> None:
        self.pattern = [tuple(allowed) for allowed in pattern]
        self.fail_at = fail_at
        self.taken: list[int] = []

    def mask(self) -> np.ndarray:
        mask = np.zeros((VOCAB + 31) // 32, dtype=np.uint32)
        if self.fail_at == len(self.taken):
            raise RuntimeError("the grammar broke")
        if not self.is_complete():
            for token_id in self.pattern[len(self.taken)]:
                mask[token_id // 32] |= np.uint32(1 << (token_id % 32))
        return mask

    def accept(self, token_id: int) -> bool:
        if self.is_complete() or token_id not in self.pattern[len(self.taken)]:
            return False
        self.taken.append(token_id)
        return True

    def rollback(self, tokens: int) -> None:
        del self.taken[len(self.taken) - tokens :]

    def tokens_to_close(self) -> Sequence[int]:
        return [allowed[0] for allowed in self.pattern[len(self.taken) :]]

    def is_complete(self) -> bool:
        return len(self.taken) == len(self.pattern)

    def fork(self) -> PatternConstraint:
        twin = PatternConstraint(self.pattern, fail_at=self.fail_at)
        twin.taken = list(self.taken)
        return twin


def make_engine(executor: FakeExecutor | None = None, **options: object) -> Engine:
    """An engine on a fake executor."""
    executor = executor or FakeExecutor()
    defaults: dict[str, object] = {"eos_ids": (EOS,), "max_context": 512, "model_key": "fake"}
    return Engine(executor, **{**defaults, **options})  # type: ignore[arg-type]


def ask(prompt: Sequence[int], **options: object) -> EngineRequest:
    """A request; sampling parameters and request fields mixed."""
    fields = set(EngineRequest.__dataclass_fields__)
    given = {name: options.pop(name) for name in list(options) if name in fields}
    return EngineRequest(list(prompt), sampling=SamplingParams(**options), **given)  # type: ignore[arg-type]


def tokens_of(events: Sequence[Event], request_id: int, sample: int = 0) -> list[int]:
    """All tokens of a sample."""
    return [
        token
        for event in events
        if isinstance(event, TokenEvent) and (event.request_id, event.sample) == (request_id, sample)
        for token in event.token_ids
    ]


def text_of(events: Sequence[Event], request_id: int, sample: int = 0) -> str:
    """All text of a sample."""
    return "".join(
        event.text
        for event in events
        if isinstance(event, TokenEvent) and (event.request_id, event.sample) == (request_id, sample)
    )


def done_of(events: Sequence[Event], request_id: int, sample: int = 0) -> DoneEvent:
    """The end of a sample; there must be exactly one."""
    (done,) = [
        event
        for event in events
        if isinstance(event, DoneEvent) and (event.request_id, event.sample) == (request_id, sample)
    ]
    return done


def prompt_of(length: int, seed: int = 0, vocab_size: int = VOCAB) -> list[int]:
    """A random prompt without the end-of-sequence token."""
    return [int(token) for token in np.random.default_rng(seed).integers(1, vocab_size, size=length)]


def alone(request: EngineRequest, **options: Any) -> tuple[list[int], list[float]]:
    """Tokens and logprobs of a request that has an engine to itself, without prefix reuse."""
    engine = make_engine(FakeExecutor(max_step_tokens=512), prefix_cache=False)
    return answer(engine, engine.submit(request))


def answer(engine: Engine, request_id: int, sample: int = 0) -> tuple[list[int], list[float]]:
    events = engine.run_until(request_id)
    return collected(events, request_id, sample)


def collected(events: list[Any], request_id: int, sample: int = 0) -> tuple[list[int], list[float]]:
    logprobs = [
        entry.logprob
        for event in events
        if not isinstance(event, DoneEvent) and (event.request_id, event.sample) == (request_id, sample)
        for entry in event.logprobs or ()
    ]
    return tokens_of(events, request_id, sample), logprobs


def score_options(
    engine: Engine,
    prompt: Sequence[int],
    options: Sequence[Sequence[int]],
    *,
    normalize: bool = False,
    point: str | None = None,
) -> list[float]:
    """Natural-log probability of each option, and of its end, after the prompt."""
    choice = EngineRequest(
        prompt, work="choose", options=tuple(tuple(each) for each in options), normalize=normalize, point=point
    )
    request_id = engine.submit(choice)
    done = done_of(engine.run_until(request_id), request_id)
    if done.error is not None:
        raise done.error
    return done.scores or []
