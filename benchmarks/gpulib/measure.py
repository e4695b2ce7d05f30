"""Decode latency, prefill, time to first token and jitter of the engine, and decode of the baselines."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from gpulib import baselines, shapes
from haomiao.engine.executors.torch.executor import TorchExecutor
from haomiao.types import RowDraws, StepBatch

CONTEXT = 512
BATCHES = (1, 8, 64)
PREFILL = 2048
TTFT = 512
SECONDS = 0.6
"""Of timed steps, for a row; at least `LEAST` of them and at most `MOST`."""
LEAST, MOST = 150, 1000
POINTS_OF = {"bf16": ("bf16",), "planes": ("int4-w", "int8", "int4")}
"""Points by how weights are stored; one model on the device serves them all."""


def decode_batch(point: str, batch: int, context: int) -> StepBatch:
    """One token of each sequence; every sequence has blocks of its own."""
    width = -(-(context + 1) // 32)
    return StepBatch(
        np.arange(batch, dtype=np.int32), np.arange(batch + 1, dtype=np.int32), np.full(batch, context, np.int32),
        np.arange(batch * width, dtype=np.int32).reshape(batch, width), np.arange(batch, dtype=np.int32), point,
        np.ones(batch, np.bool_),
    )  # fmt: skip


def drawn_batch(point: str, batch: int, context: int, top_k: int = 50) -> StepBatch:
    """The same, every row drawn; top-k of 0 leaves the walk to the whole row, which random weights make nearly flat."""
    given, ones = decode_batch(point, batch, context), np.ones(batch)
    given.greedy = None
    given.draws = RowDraws(
        ones.astype(np.float32), np.full(batch, top_k, np.int32), ones, 0 * ones.astype(np.float32), 0.5 * ones
    )
    return given


def prefill_batch(point: str, tokens: int) -> StepBatch:
    """A prompt; the last row alone is wanted."""
    table = np.arange(-(-tokens // 32), dtype=np.int32)[None]
    return StepBatch(
        np.arange(tokens, dtype=np.int32) % 1000, np.array([0, tokens], np.int32), np.zeros(1, np.int32), table,
        np.array([tokens - 1], np.int32), point, np.ones(1, np.bool_),
    )  # fmt: skip


def timed(step: Callable[[], Any], count: int, warm: int = 5) -> list[float]:
    """Milliseconds of each step, from its call to its tokens on the host; `step` itself waits for them."""
    for _ in range(warm):
        step()
    torch.cuda.synchronize()
    found = []
    for _ in range(count):
        began = time.perf_counter()
        step()
        found.append(1e3 * (time.perf_counter() - began))
    return found


def on_device(step: Callable[[], Any], count: int = 20, rounds: int = 5) -> float:
    """Milliseconds of a step as the device has it: steps back to back between two events, the median of some rounds."""
    step()
    found = []
    for _ in range(rounds):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        for _ in range(count):
            step()
        ended.record()
        ended.synchronize()
        found.append(began.elapsed_time(ended) / count)
    return float(np.median(found))


def spread(times: list[float]) -> dict[str, float]:
    """Median, p99, their ratio, the longest, and the number of samples."""
    p50, p99 = (float(np.percentile(times, q)) for q in (50, 99))
    return {
        "ms_p50": round(p50, 4), "ms_p99": round(p99, 4), "p99_over_p50": round(p99 / p50, 3),
        "ms_max": round(max(times), 4), "steps": len(times),
    }  # fmt: skip


def ceilings(device: torch.device) -> dict[str, float]:
    """GB/s of a sum (4 GB read) and of a copy (2 GB read and written), and the greater; TFLOP/s of an 8192-cubed bf16
    product."""
    big = torch.ones(1 << 30, dtype=torch.int32, device=device)
    half, other = big[: 1 << 29], torch.empty(1 << 29, dtype=torch.int32, device=device)
    read = 4.0 * big.numel() / on_device(lambda: big.sum(dtype=torch.int32), 4) / 1e6
    copied = 8.0 * half.numel() / on_device(lambda: other.copy_(half), 4) / 1e6
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    rate = 2 * 8192**3 / on_device(lambda: a @ a, 4) / 1e9
    found = {"gb_s": max(read, copied), "gb_s_sum": read, "gb_s_copy": copied, "bf16_tflops": rate}
    return {name: round(value, 1) for name, value in found.items()}


def ours(
    shape: str, storage: str, device: torch.device, top: dict[str, float], points: int | None = None
) -> Iterator[dict[str, Any]]:
    """Decode at every point and batch, the first point first; then its prefill and time to first token."""
    began = time.monotonic()
    made = shapes.make(shape, storage, device)
    torch.cuda.synchronize()
    yield {"model": shape, "storage": storage, "made_in_s": round(time.monotonic() - began, 2)}
    chosen = POINTS_OF[storage][:points]
    executor = TorchExecutor.of_model(made.model, points=chosen, max_step_tokens=PREFILL)
    for point in chosen:
        for batch in BATCHES:
            yield decode(made, executor, shape, point, batch, top)
    for batch, top_k in itertools.product(BATCHES, (50, 0)):
        times = timed(partial(executor.step, drawn_batch(chosen[0], batch, CONTEXT, top_k)), LEAST // 3)
        yield {
            "model": shape,
            "point": chosen[0],
            "engine": "haomiao",
            "what": "drawn",
            "rows": batch,
            "top_k": top_k,
            **spread(times),
        }
    for point in chosen[:1]:
        for what, tokens in (("prefill", PREFILL), ("ttft", TTFT)):
            times = timed(partial(executor.step, prefill_batch(point, tokens)), 8, warm=2)
            row: dict[str, Any] = {
                "model": shape,
                "point": point,
                "engine": "haomiao",
                "what": what,
                "tokens": tokens,
                **spread(times),
            }
            row["tflops"] = round(2 * made.matrix_weights * tokens / row["ms_p50"] / 1e9, 1)
            row["share_of_peak"] = round(row["tflops"] / top["bf16_tflops"], 3)
            yield row
    executor.close()


def decode(
    made: shapes.Made, executor: TorchExecutor, shape: str, point: str, batch: int, top: dict[str, float]
) -> dict[str, Any]:
    """A row of decode: steps as a caller has them, and the graph alone as the device has it."""
    given = decode_batch(point, batch, CONTEXT)
    first = min(timed(lambda: executor.step(given), 5))
    times = timed(lambda: executor.step(given), int(np.clip(1e3 * SECONDS / first, LEAST, MOST)))
    row: dict[str, Any] = {
        "model": shape,
        "point": point,
        "engine": "haomiao",
        "batch": batch,
        "context": CONTEXT,
        **spread(times),
    }
    moved = made.step_bytes(point, batch, CONTEXT)
    row["mb"] = round(moved / 1e6, 1)
    row["share_of_bandwidth"] = round(moved / row["ms_p50"] / 1e6 / top["gb_s"], 3)
    row["tokens_s"] = round(1e3 * batch / row["ms_p50"], 1)
    replay = executor.replay_of(given)
    if replay is not None:
        row["ms_graph"] = round(on_device(replay), 4)
        row["graph_share_of_bandwidth"] = round(moved / row["ms_graph"] / 1e6 / top["gb_s"], 3)
    return row


def other(name: str, shape: str, batch: int, device: torch.device, top: dict[str, float]) -> Iterator[dict[str, Any]]:
    """A decode step of a baseline."""
    began = time.monotonic()
    step = step_of(name, shape, batch, device)
    for _ in range(6):
        step()
    compiled = time.monotonic() - began
    times = timed(step, baselines.ROOM - 50, warm=10)
    row: dict[str, Any] = {"model": shape, "engine": name, "batch": batch, "context": CONTEXT, **spread(times)}
    yield row | {"compiled_in_s": round(compiled, 1), "tokens_s": round(1e3 * batch / row["ms_p50"], 1)}


def warm(name: str, shape: str, batch: int, device: torch.device) -> None:
    """Compile a baseline's step, so that the next process finds it in PyTorch's cache."""
    step = step_of(name, shape, batch, device)
    for _ in range(3):
        step()


def step_of(name: str, shape: str, batch: int, device: torch.device) -> Callable[[], Any]:
    """A decode step of a baseline."""
    if name == "transformers":
        return baselines.transformers_step(shape, batch, CONTEXT, device)
    return baselines.compiled_step(shape, batch, CONTEXT, device, int4=name.endswith("int4"))
