"""What has to hold before a figure of speed counts: kernels beside their twins, graphs beside launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from gpulib import shapes
from haomiao.engine.executors.torch import launch, twins
from haomiao.engine.executors.torch.executor import TorchExecutor
from haomiao.engine.executors.torch.fast import FastRunner
from haomiao.types import POINTS, StepBatch

LINEAR = (
    ("f32", "full", "full"),
    ("bf16", "full", "full"),
    ("bf16", "bf16", "bf16"),
    ("int8", "int8", "hi+lo"),
    ("planes", "int8", "hi+lo"),
    ("planes", "int4", "hi"),
    ("planes", "int4-w", "hi"),
    ("planes", "int4-w", "hi+lo"),
)
SIZES = ((896, 896), (1152, 896), (2048, 8192))
FUSED = (896, 4864)
TOKENS = (1, 2, 17, 64, 200)


def run_checks(device: torch.device, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every check's name, error and bound. None is skipped when another fails."""
    found = []
    for name, bound, check in checks(device):
        try:
            error, words = check(), ""
        except Exception as reason:  # a kernel that does not compile must not hide the others
            error, words = (
                float("nan"),
                f" {type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}",
            )
        good = error <= bound
        say(f"{'ok  ' if good else 'FAIL'} {name}: {error:.2e}, at most {bound:.0e}{words[:300]}")
        found.append({"name": name, "error": error, "bound": bound, "ok": good})
    return found


def checks(device: torch.device) -> Iterator[tuple[str, float, Callable[[], float]]]:
    """(name, bound, what gives the error)."""
    for storage, point, planes in LINEAR:
        for tokens in TOKENS:
            wide = point == "int4-w" and tokens >= launch.DEQUANTIZED_FROM
            name = f"linear {storage} {point} {planes} m={tokens}"
            yield name, 1e-2 if wide else 1e-4, lambda a=(storage, point, planes, tokens): linear(device, *a)
    for what in ("norm", "glu"):
        for point in ("int4-w", "int4"):
            yield f"gemv after {what} at {point}", 2e-2, lambda a=(what, point): fused(device, *a)
    yield "greatest, lowest of equals", 0.0, lambda: greatest(device)
    for storage, point, kv in (
        ("f32", "full", "f32"), ("bf16", "bf16", "bf16"), ("planes", "int8", "bf16"), ("planes", "int8", "int8"),
        ("planes", "int4", "bf16"), ("planes", "int4-w", "bf16"), ("planes", "int4-w", "int8"),
    ):  # fmt: skip
        yield f"steps {point} kv {kv}", 5e-2, lambda a=(storage, point, kv): steps(device, *a)
        yield f"graph beside launches {point} kv {kv}", 0.0, lambda a=(storage, point, kv): graphs(device, *a)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


def generator_on(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(7)


def linear(device: torch.device, storage: str, point: str, planes: Any, tokens: int) -> float:
    worst = 0.0
    for rows, cols in SIZES:
        generator = generator_on(device)
        matrix = shapes.random_matrix(rows, cols, storage, generator, device)
        x = torch.randn(tokens, cols, generator=generator, device=device)
        bias, out = torch.randn(rows, generator=generator, device=device), torch.zeros(tokens, rows, device=device)
        after = launch.After(bias)
        if tokens == 1:
            launch.gemv(out, x, matrix, POINTS[point], planes, launch.PLAIN, after)
        else:
            launch.matmul(out, x, matrix, POINTS[point], planes, after)
        worst = max(worst, relative(out, twins.linear(matrix, x, POINTS[point], planes, bias)))
    return worst


def fused(device: torch.device, what: str, point: str) -> float:
    generator = generator_on(device)
    rows, cols = FUSED
    matrix = shapes.random_matrix(rows, cols, "planes", generator, device)
    planes = POINTS[point].planes
    out = torch.zeros(1, rows, device=device)
    if what == "norm":
        x, weight = (torch.randn(1, cols, generator=generator, device=device) for _ in range(2))
        launch.gemv(out, x, matrix, POINTS[point], planes, launch.Before(norm=weight[0], eps=1e-6), launch.After())
        source = twins.rms_norm(x, weight[0], 1e-6)
    else:
        x = torch.randn(1, 2 * cols, generator=generator, device=device)
        launch.gemv(out, x, matrix, POINTS[point], planes, launch.Before(glu="silu"), launch.After())
        source = twins.glu(x, "silu")
    return relative(out, twins.linear(matrix, source, POINTS[point], planes))


def greatest(device: torch.device) -> float:
    logits = torch.randn(9, 151936, generator=generator_on(device), device=device)
    logits[3, [70, 4096, 151935]] = 50.0
    logits[4, 99] = float("nan")
    out = torch.zeros(9, dtype=torch.int32, device=device)
    launch.greatest(out, logits)
    return float((out != twins.greatest(logits)).sum())


def batch_of(seed: int, point: str, spans: list[tuple[int, int]]) -> StepBatch:
    """(past, tokens) a sequence; sequence i owns blocks 40 i to 40 i + 39."""
    tokens = sum(count for _, count in spans)
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum([count for _, count in spans])]).astype(np.int32)
    tables = np.array([np.arange(40 * i, 40 * i + 40) for i in range(len(spans))], np.int32)
    return StepBatch(
        rng.integers(0, 1000, tokens).astype(np.int32), starts, np.array([past for past, _ in spans], np.int32),
        tables, (starts[1:] - 1).astype(np.int32), point,
    )  # fmt: skip


STEPS = ([(0, 90), (0, 700)], [(90, 1), (700, 1)], [(91, 1), (701, 4)], [(92, 1)], [(705, 1)])
"""Prefill of two sequences, then decoding together, with drafts, and alone."""


def steps(device: torch.device, storage: str, point: str, kv: Any) -> float:
    """Whole steps beside the twins' steps, the last of which run as graphs."""
    worst = 0.0
    pair = [
        TorchExecutor.of_model(
            shapes.make("tiny", storage, device, kv_type=kv, kv_blocks=80).model,
            points=(point,),
            max_step_tokens=1024,
            fast=fast,
        )
        for fast in (True, False)
    ]
    for number, spans in enumerate(STEPS):
        ours, theirs = (each.step(batch_of(number, point, list(spans))).logits.copy() for each in pair)
        worst = max(worst, float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
    return worst


def graphs(device: torch.device, storage: str, point: str, kv: Any) -> float:
    """The same step launched kernel by kernel and replayed: the number of logits that differ."""
    model = shapes.make("tiny", storage, device, kv_type=kv, kv_blocks=80).model
    runner = FastRunner(model, (point,), 1024)
    runner.step(batch_of(0, point, [(0, 90), (0, 700)]))
    differing = 0
    for spans in ([(90, 1)], [(90, 1), (700, 3)]):
        batch = batch_of(1, point, spans)
        first, *others = (runner.step(batch)[0].copy() for _ in range(4))
        differing += sum(int((first != other).sum()) for other in others)
    if device.type == "cuda" and not runner.graphs:
        raise RuntimeError("no graph was captured")
    return float(differing)
