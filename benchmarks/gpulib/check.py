"""What has to hold before a figure of speed counts: kernels beside their twins, graphs beside launches, whole steps.

Checks come in groups, each a process of its own: kernels compile beside each other, and a fault of one group, which
makes the GPU unusable for its process, takes nothing from the others.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch

from gpulib import shapes
from haomiao.engine.executors.torch import drawing, launch, twins
from haomiao.engine.executors.torch.executor import TorchExecutor
from haomiao.engine.executors.torch.fast import FastRunner
from haomiao.types import KV_BLOCK_TOKENS, POINTS, KvType, RowDraws, StepBatch

Check: TypeAlias = tuple[str, float, Callable[[], float]]
"""Name, bound, what gives the error."""

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
TOKENS = (1, 2, 8, 17, 64, 200)
STEPS: tuple[tuple[str, str, KvType], ...] = (
    ("f32", "full", "f32"), ("bf16", "bf16", "bf16"), ("planes", "int8", "bf16"), ("planes", "int8", "int8"),
    ("planes", "int4", "bf16"), ("planes", "int4-w", "bf16"), ("planes", "int4-w", "int8"),
)  # fmt: skip
AGREE = {"full": 1e-4, "bf16": 2e-2, "int4-w": 2e-2, "int8": 5e-2, "int4": 5e-2}
"""Of whole steps, relative to the greatest logit. A bf16 activation, or a code of one, that falls the other way moves
a logit by as much as 1e-2; kernels alone are held to 1e-4."""
GROUP_SECONDS = 150.0
AT_ONCE = 6
"""Groups beside each other: the widest of them take up to 12 GB."""


def groups(device: torch.device) -> dict[str, list[Check]]:
    """All checks, by group; those that take longest first."""
    found: dict[str, list[Check]] = {}
    for shape in ("8b", "1b", "0.5b"):
        for storage in ("bf16", "planes"):
            found[f"wide-{shape}-{storage}"] = list(wide_checks(device, shape, storage))
    for storage, point, kv in STEPS:
        found[f"steps-{point}-{kv}"] = [
            (f"steps {point} kv {kv}", AGREE[point], partial(steps, device, storage, point, kv)),
            (f"graph beside launches {point} kv {kv}", 0.0, partial(graphs, device, storage, point, kv)),
            (f"launches of a decode step {point} kv {kv}", 0.0, partial(launches, device, storage, point, kv)),
        ]
    for storage, point, planes in LINEAR:
        name = f"linear {storage} {point} {planes}"
        found[f"linear-{storage}-{point}-{planes}"] = [
            (f"{name} m={tokens}", linear_bound(point, tokens), partial(linear, device, storage, point, planes, tokens))
            for tokens in TOKENS
        ]
    found["fused"] = [
        *((f"gemv after {what} at {point}", 2e-2, partial(fused, device, what, point))
          for what in ("norm", "glu") for point in ("bf16", "int4-w", "int4", "int8")),
        ("greatest, lowest of equals", 0.0, partial(greatest, device)),
        ("drawn as the twin does", 0.0, partial(drawn, device)),
        ("drawn alike in any company", 0.0, partial(drawn_in_company, device)),
        ("K and V beyond 2^31 numbers", AGREE["bf16"], partial(far_blocks, device)),
    ]  # fmt: skip
    return found


def run_group(name: str, device: torch.device, say: Callable[[str], None]) -> bool:
    """One group's checks, a JSON line each. None is skipped when another fails."""
    good = True
    for words, bound, check in groups(device)[name]:
        began, reason = time.monotonic(), ""
        try:
            error = check()
        except Exception as failure:  # a kernel that does not compile must not hide the others
            lines = str(failure).splitlines() or [""]
            error, reason = float("nan"), f"{type(failure).__name__}: {lines[0]}"[:300]
        row: dict[str, Any] = {"name": words, "error": error, "bound": bound, "ok": error <= bound}
        row |= {"s": round(time.monotonic() - began, 2)} | ({"reason": reason} if reason else {})
        good = good and bool(row["ok"])
        say(json.dumps(row))
    return good


def run_checks(
    script: Sequence[str],
    names: Sequence[str],
    say: Callable[[str], None],
    at_once: int = AT_ONCE,
    seconds: float | None = None,
) -> list[dict[str, Any]]:
    """The groups of these names, each in a process of its own that runs `script check --group NAME`. After `seconds`
    those that still run are ended, and they and those that wait have failed."""
    lock, rows = threading.Lock(), []
    began = time.monotonic()

    def heard(row: dict[str, Any]) -> None:
        with lock:
            rows.append(row)
            word = f" {row['reason']}" if row.get("reason") else ""
            verdict = "ok  " if row["ok"] else "FAIL"
            error = "" if row["error"] is None else f": {row['error']:.2e}, at most {row['bound']:.0e}"
            say(f"{verdict} {time.monotonic() - began:5.1f} s  {row['name']}{error} ({row['s']} s){word}")

    def one(name: str) -> None:
        start = time.monotonic()
        command = [sys.executable, *script, "check", "--group", name]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            left = GROUP_SECONDS if seconds is None else min(GROUP_SECONDS, began + seconds - start)
            killer = threading.Timer(max(left, 0.1), process.kill)
            killer.start()
            try:
                output, errors = process.communicate()
            finally:
                killer.cancel()
        for line in output.splitlines():
            if line.startswith("{"):
                heard(json.loads(line))
        if process.returncode not in (0, 1):
            said = (errors.strip().splitlines() or ["nothing said"])[-1][:300]
            took = round(time.monotonic() - start, 1)
            reason = f"ended with {process.returncode}: {said}"
            heard({"name": f"group {name}", "error": None, "bound": 0.0, "ok": False, "s": took, "reason": reason})

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, names))
    return rows


# ---- kernels --------------------------------------------------------------------------------------------------------


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


def generator_on(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(7)


def linear_bound(point: str, tokens: int) -> float:
    """With more than one token int4-w may round its weights to bf16."""
    return 1e-2 if point == "int4-w" and tokens > 1 else 1e-4


def linear(device: torch.device, storage: str, point: str, planes: Any, tokens: int) -> float:
    worst = 0.0
    for rows, cols in SIZES:
        generator = generator_on(device)
        matrix = shapes.random_matrix(rows, cols, storage, generator, device)
        x = torch.randn(tokens, cols, generator=generator, device=device)
        bias = torch.randn(rows, generator=generator, device=device)
        out = torch.full((tokens, rows), 9.0, device=device)
        after = launch.After(bias)
        if tokens == 1:
            launch.gemv(out, x, matrix, POINTS[point], planes, launch.PLAIN, after)
        else:
            launch.matmul(out, x, matrix, POINTS[point], planes, after)
        wanted = twins.linear(matrix, x, POINTS[point], planes, bias)
        worst = max(worst, relative(out, wanted))
        if tokens == 1 and storage == "planes":  # the other way for one token, which `tune` may choose
            encoding, rounding = launch.encoding_of(matrix, planes), launch.rounding_of(matrix, POINTS[point])
            launch.codes_matmul(out, x, matrix, encoding, rounding, launch.PLAIN, after)
            worst = max(worst, relative(out, wanted))
    return worst


def fused(device: torch.device, what: str, point: str) -> float:
    generator = generator_on(device)
    rows, cols = FUSED
    matrix = shapes.random_matrix(rows, cols, "bf16" if point == "bf16" else "planes", generator, device)
    planes = POINTS[point].planes
    residual = torch.randn(1, rows, generator=generator, device=device)
    out = residual.clone()
    if what == "norm":
        x, weight = (torch.randn(1, cols, generator=generator, device=device) for _ in range(2))
        before = launch.Before(norm=weight[0], eps=1e-6)
        source = twins.rms_norm(x, weight[0], 1e-6)
    else:
        x = torch.randn(1, 2 * cols, generator=generator, device=device)
        before, source = launch.Before(glu="silu"), twins.glu(x, "silu")
    launch.gemv(out, x, matrix, POINTS[point], planes, before, launch.After(add=True))
    return relative(out, residual + twins.linear(matrix, source, POINTS[point], planes))


def greatest(device: torch.device) -> float:
    logits = torch.randn(9, 151936, generator=generator_on(device), device=device)
    logits[3, [70, 4096, 151935]] = 50.0
    logits[4, 99] = float("nan")
    out = torch.zeros(9, dtype=torch.int32, device=device)
    launch.greatest(out, logits)
    return float((out != twins.greatest(logits)).sum())


def rows_to_draw(device: torch.device) -> tuple[torch.Tensor, twins.Draws]:
    """Logits from peaked to nearly flat, with ties, -inf and one NaN, and ways to draw them."""
    rows, vocab = (48, 151936) if device.type == "cuda" else (8, 600)
    generator, rng = generator_on(device), np.random.default_rng(0)
    spread = torch.linspace(6.0, 0.5, rows, device=device)
    logits = spread[:, None] * torch.randn(rows, vocab, generator=generator, device=device)
    logits[1::4] = torch.round(logits[1::4])
    logits[2, ::3] = -torch.inf
    logits[rows // 2, 100] = torch.nan
    numbers = (
        rng.random(rows), rng.choice([1.0, 0.95, 0.5], rows), rng.choice([0.5, 0.7, 1.0], rows).astype(np.float32),
        rng.choice([0.0, 0.05], rows).astype(np.float32), rng.choice([0, 1, 20, 200], rows).astype(np.int32),
    )  # fmt: skip
    return logits, twins.Draws(*(torch.from_numpy(each).to(device) for each in numbers))


def draw_on(logits: torch.Tensor, draws: twins.Draws) -> torch.Tensor:
    """What the kernels draw."""
    out = torch.zeros(logits.shape[0], dtype=torch.int32, device=logits.device)
    drawing.draw(out, logits, twins.greatest(logits), draws)
    return out


def drawn(device: torch.device) -> float:
    """Rows whose tokens are others than the twin's; and 1 more if most are left open."""
    logits, draws = rows_to_draw(device)
    ours, theirs = draw_on(logits, draws), twins.draw(logits, draws)
    both = (ours >= 0) & (theirs >= 0)
    return float((both & (ours != theirs)).sum()) + float(2 * both.sum() < len(ours))


def drawn_in_company(device: torch.device) -> float:
    """Rows that come out otherwise alone, or again."""
    logits, draws = rows_to_draw(device)
    together = draw_on(logits, draws)
    differing = float((together != draw_on(logits, draws)).sum())
    parts = (draws.uniform, draws.top_p, draws.temperature, draws.min_p, draws.top_k)
    for row in range(0, len(logits), 5):
        alone = draw_on(logits[row : row + 1], twins.Draws(*(each[row : row + 1].clone() for each in parts)))
        differing += float((alone != together[row : row + 1]).sum())
    return differing


# ---- whole steps ----------------------------------------------------------------------------------------------------


def batch_of(seed: int, point: str, spans: Sequence[tuple[int, int]], first_block: int = 0) -> StepBatch:
    """(past, tokens) a sequence; sequence i owns 40 blocks from `first_block` + 40 i on."""
    tokens = sum(count for _, count in spans)
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum([count for _, count in spans])]).astype(np.int32)
    tables = np.array([first_block + np.arange(40 * i, 40 * i + 40) for i in range(len(spans))], np.int32)
    return StepBatch(
        rng.integers(0, 1000, tokens).astype(np.int32), starts, np.array([past for past, _ in spans], np.int32),
        tables, (starts[1:] - 1).astype(np.int32), point,
    )  # fmt: skip


COMPANIES: tuple[Sequence[tuple[int, int]], ...] = (
    [(0, 90), (0, 300)],
    [(90, 1), (300, 1)],
    [(91, 1), (301, 4)],
    [(92, 1)],
    [(305, 1)],
    [(306, 7), (93, 6)],
    [(93, 1), (306, 1)],
)
"""Prefill of two sequences, then decoding together, with drafts, alone, with many drafts, and back to what was drafted.
Each twice, so that the second is a graph."""


def pair_of(made: shapes.Made, point: str, *, tokens: int = 1024) -> list[TorchExecutor]:
    """A fast executor and a slow one, of the same weights, each with K and V of its own."""
    return [
        TorchExecutor.of_model(each, points=(point,), max_step_tokens=tokens, fast=fast)
        for each, fast in ((made.model, True), (made.with_new_memory(), False))
    ]


def apart(pair: Sequence[TorchExecutor], batch: StepBatch) -> float:
    """How far the two are apart on a step, the worse of a launch and a replay."""
    theirs = pair[1].step(batch).logits.copy()
    found = [pair[0].step(batch).logits.copy() for _ in range(2)]
    return max(float(np.abs(ours - theirs).max() / np.abs(theirs).max()) for ours in found)


def steps(device: torch.device, storage: str, point: str, kv: KvType) -> float:
    """Whole steps beside the twins' steps; the second of each decode step is a graph."""
    pair = pair_of(shapes.make("tiny", storage, device, kv_type=kv, kv_blocks=80), point)
    return max(apart(pair, batch_of(number, point, spans)) for number, spans in enumerate(COMPANIES))


def graphs(device: torch.device, storage: str, point: str, kv: KvType) -> float:
    """The same steps launched kernel by kernel and replayed, others in between: the number of logits that differ."""
    model = shapes.make("tiny", storage, device, kv_type=kv, kv_blocks=80).model
    runner = FastRunner(model, (point,), 1024)
    runner.step(batch_of(0, point, [(0, 90), (0, 700)]))
    differing = 0
    first: dict[int, Any] = {}
    for again in range(5):  # the first round settles K and V, the last is launched by a runner without graphs
        chosen = runner if again < 4 else FastRunner(model, (point,), 1024)
        for number, spans in enumerate(([(90, 1)], [(90, 1), (700, 3)], [(700, 1)], [(90, 5), (700, 8)])):
            logits = chosen.step(batch_of(1, point, spans))[0].copy()
            if again:
                differing += int((first.setdefault(number, logits) != logits).sum())
    if device.type == "cuda" and runner.graphs < 3:
        raise RuntimeError(f"{runner.graphs} graphs were captured")
    return float(differing)


def launches(device: torch.device, storage: str, point: str, kv: KvType) -> float:
    """What the host launches in a decode step of one token and of five, greedy and drawn, beyond one graph."""
    if device.type != "cuda":
        return 0.0
    executor = TorchExecutor.of_model(
        shapes.make("tiny", storage, device, kv_type=kv, kv_blocks=200).model, points=(point,), max_step_tokens=64
    )
    extra = 0
    for count, is_drawn in ((1, False), (5, False), (1, True), (5, True)):
        batch = batch_of(0, point, [(90, 1)] * count)
        batch.greedy = np.full(count, not is_drawn)
        batch.draws = drawing_of(count) if is_drawn else None
        for _ in range(3):
            executor.step(batch)
        seen = host_calls(partial(executor.step, batch))
        graph = sum(count for name, count in seen.items() if "GraphLaunch" in name)
        if not seen:
            raise RuntimeError("the profiler saw nothing")
        extra += sum(seen.values()) - graph + abs(graph - 1)
    return float(extra)


def drawing_of(rows: int) -> RowDraws:
    """Top-k of 20, which the candidates always decide."""
    ones = np.ones(rows)
    return RowDraws(ones.astype(np.float32), np.full(rows, 20, np.int32), ones, 0 * ones.astype(np.float32), 0.5 * ones)


def host_calls(step: Callable[[], Any]) -> dict[str, int]:
    """Launches and copies that the host asks for in one step, by the name of the call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    wanted = ("Launch", "Memcpy", "Memset")
    return {e.key: e.count for e in seen.key_averages() if e.key.startswith("cu") and any(w in e.key for w in wanted)}


def wide_checks(device: torch.device, shape: str, storage: str) -> Iterator[Check]:
    """One layer of a real model: its widths, its grids, its head."""
    for point in ("bf16",) if storage == "bf16" else ("int4-w", "int8", "int4"):
        yield f"one layer of {shape} at {point}", AGREE[point], partial(wide, device, shape, storage, point)


def wide(device: torch.device, shape: str, storage: str, point: str) -> float:
    """Prefill, then a decode step of 1, 3, 8 and 40 sequences."""
    made = shapes.make(shape, storage, device, kv_blocks=1700, layers=1)
    pair = pair_of(made, point, tokens=160)
    worst = apart(pair, batch_of(0, point, [(0, 33), (0, 97)]))
    for number, spans in enumerate(([(97, 1)], [(33, 1), (97, 1), (0, 1)], [(5, 1)] * 8, [(3, 1)] * 40)):
        worst = max(worst, apart(pair, batch_of(number + 1, point, spans)))
    return worst


def far_blocks(device: torch.device) -> float:
    """Sequences whose blocks lie where 32 bits no longer count K's and V's numbers."""
    far = 2**31 // (8 * KV_BLOCK_TOKENS * 128) + 100 if device.type == "cuda" else 100
    made = shapes.make("8b" if device.type == "cuda" else "tiny", "bf16", device, kv_blocks=far + 90, layers=1)
    pair = pair_of(made, "bf16", tokens=160)
    batches = [batch_of(n, "bf16", spans, far) for n, spans in enumerate(([(0, 60), (0, 40)], [(60, 1), (40, 1)]))]
    return max(apart(pair, batch) for batch in batches)
