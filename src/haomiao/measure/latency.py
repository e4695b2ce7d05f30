"""How fast a model answers on this machine: time to first token, inter-token latency, throughput, shares of ceilings.

Prompts are random token ids from a fixed seed, so that no tokenizer is needed and no prefix is shared; end-of-sequence
is ignored, so that every run produces the tokens asked for. Times are taken where a caller of `LLM.stream` would take
them. Knows nothing about how a step is computed: what a step reads is told by `measure.bytes`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from haomiao.errors import HaomiaoError, InputError
from haomiao.metrics.statistics import Summary, percentile, summarize


class Chunk(Protocol):
    """What `LLM.stream` yields; only the ids are looked at."""

    @property
    def token_ids(self) -> Sequence[int]: ...


class Streamer(Protocol):
    """The part of `LLM` that is measured. Several threads may stream at once; the engine batches them."""

    @property
    def vocab_size(self) -> int: ...

    def stream(self, prompt: Sequence[int], **options: Any) -> Iterator[Chunk]: ...


@dataclass(frozen=True, slots=True)
class Workload:
    """What one run does: `streams` requests at once, each with its own random prompt."""

    prompt_tokens: int = 512
    new_tokens: int = 64
    streams: int = 1
    repeat: int = 3
    warmup: int = 1
    seed: int = 0

    def check(self) -> None:
        """Raise `InputError` naming the first number out of range."""
        for name, least in (("prompt_tokens", 1), ("new_tokens", 1), ("streams", 1), ("repeat", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, not {getattr(self, name)}", param=name)


@dataclass(slots=True)
class Run:
    """Moments of one run in milliseconds since its start, per stream: one for each token."""

    moments: list[list[float]] = field(default_factory=list)

    @property
    def ttft_ms(self) -> list[float]:
        """Time to first token of every stream."""
        return [stream[0] for stream in self.moments]

    @property
    def prefill_ms(self) -> float:
        """Until every stream has its first token."""
        return max(self.ttft_ms)

    @property
    def gaps_ms(self) -> list[float]:
        """Inter-token latencies after every stream has begun, so that no prefill hides among them."""
        begun = self.prefill_ms
        return [later - earlier for stream in self.moments for earlier, later in pairwise(stream) if earlier >= begun]

    def decode_rate(self) -> float | None:
        """Tokens per second of all streams together after every stream has begun; None if nothing was decoded."""
        begun, end = self.prefill_ms, max(stream[-1] for stream in self.moments)
        tokens = sum(1 for stream in self.moments for moment in stream if moment > begun)
        return 1e3 * tokens / (end - begun) if tokens and end > begun else None


@dataclass(frozen=True, slots=True)
class LatencyResult:
    """Medians over the repeated runs with their spread; percentiles over all gaps of all runs."""

    workload: Workload
    prefill_tok_s: Summary
    decode_tok_s: Summary | None
    ttft_ms: Summary
    itl_p50_ms: float | None
    itl_p99_ms: float | None


def measure_latency(
    llm: Streamer, workload: Workload, *, progress: Callable[[int, int], None] | None = None
) -> LatencyResult:
    """Run the workload `warmup + repeat` times and summarize the repeats. `progress(runs done, runs in all)`."""
    workload.check()
    rng = np.random.default_rng(workload.seed)
    runs: list[Run] = []
    total = workload.warmup + workload.repeat
    for index in range(total):
        run = run_once(llm, _prompts(rng, llm.vocab_size, workload), workload.new_tokens)
        if index >= workload.warmup:
            runs.append(run)
        if progress:
            progress(index + 1, total)
    return summarize_runs(runs, workload)


def summarize_runs(runs: Sequence[Run], workload: Workload) -> LatencyResult:
    """The arithmetic of `measure_latency`, apart from the clock."""
    prompt_tokens = workload.prompt_tokens * workload.streams
    rates = [rate for rate in (run.decode_rate() for run in runs) if rate is not None]
    gaps = [gap for run in runs for gap in run.gaps_ms]
    return LatencyResult(
        workload=workload,
        prefill_tok_s=summarize([1e3 * prompt_tokens / max(run.prefill_ms, 1e-6) for run in runs]),
        decode_tok_s=summarize(rates) if rates else None,
        ttft_ms=summarize([ttft for run in runs for ttft in run.ttft_ms]),
        itl_p50_ms=percentile(gaps, 50) if gaps else None,
        itl_p99_ms=percentile(gaps, 99) if gaps else None,
    )


def run_once(llm: Streamer, prompts: Sequence[Sequence[int]], new_tokens: int) -> Run:
    """Stream every prompt at once, one thread each, and note the moment of every token.

    Raises the first error of any stream, and `InputError` if a stream ends before its tokens are out.
    """
    moments: list[list[float]] = [[] for _ in prompts]
    failures: list[BaseException] = []
    start = time.perf_counter_ns()

    def consume(index: int) -> None:
        try:
            stream = llm.stream(prompts[index], max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
            for chunk in stream:
                now = (time.perf_counter_ns() - start) / 1e6
                moments[index].extend([now] * len(chunk.token_ids))
        except BaseException as error:  # carried to the calling thread, where it is raised
            failures.append(error)

    if len(prompts) == 1:
        consume(0)
    else:
        threads = [threading.Thread(target=consume, args=(index,), daemon=True) for index in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    for stream_moments in moments:
        if len(stream_moments) != new_tokens:
            raise InputError(f"a stream ended after {len(stream_moments)} of {new_tokens} tokens")
    return Run(moments)


def _prompts(rng: np.random.Generator, vocab_size: int, workload: Workload) -> list[list[int]]:
    if vocab_size < 1:
        raise HaomiaoError(f"the model has a vocabulary of {vocab_size} tokens")
    drawn = rng.integers(0, vocab_size, size=(workload.streams, workload.prompt_tokens))
    return [[int(token) for token in row] for row in drawn]
