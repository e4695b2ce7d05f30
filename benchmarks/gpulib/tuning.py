"""Other block sizes for the matrix kernels, timed on the matrices of the three models.

Every product reads another copy of its matrix than the one before, so that none comes out of the L2 cache. The result
goes into `executors/torch/launch.Blocks` by hand.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpulib import measure, shapes
from haomiao.engine.executors.torch import launch
from haomiao.models.plan import Glu, Head, Linear, Norm
from haomiao.models.registry import plan_for
from haomiao.types import POINTS

CACHE = 200 << 20
"""Bytes that the copies of a matrix must have together: four times the L2 cache of an H100."""
KINDS = (("planes", "int4-w"), ("bf16", "bf16"), ("planes", "int8"))


def matrices() -> Iterator[tuple[str, int, int, str]]:
    """(what, rows, cols, what stands before it) of every model's layer, the smallest and the greatest model first."""
    for shape in ("0.5b", "8b", "1b"):
        plan = plan_for(shapes.CONFIGS[shape])
        outputs = {op.out: op for op in plan.ops if isinstance(op, Norm | Glu)}
        wanted: list[Linear | Head] = []
        wanted += [op for op in plan.ops if isinstance(op, Linear)][:4]
        wanted += [op for op in plan.ops if isinstance(op, Head)]
        for op in wanted:
            spec, before = plan.weights[op.weight], outputs.get(op.source)
            kind = "norm" if isinstance(before, Norm) else "glu" if isinstance(before, Glu) else ""
            yield f"{shape} {op.weight}", spec.rows, spec.cols, kind


def candidates(tokens: int) -> Iterator[dict[str, int | bool]]:
    """Sizes of blocks to try, the likeliest first."""
    if tokens == 1:
        for bytes_, columns, resident in itertools.product((32, 64, 128), (1024, 512, 2048), (24, 12, 48)):
            yield {"gemv_bytes": bytes_, "gemv_columns": columns, "gemv_resident": resident}
    else:
        for rows, warps, stages, groups in (
            (32, 4, 3, 4), (64, 4, 3, 4), (16, 2, 3, 4), (32, 2, 4, 4), (32, 4, 3, 8), (64, 4, 4, 2), (64, 4, 4, 1),
        ):  # fmt: skip
            yield {"gemm_rows": rows, "gemm_warps": warps, "gemm_stages": stages, "gemm_groups": groups}


def tune(device: torch.device, seconds: float, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Microseconds of every matrix by sizes of blocks: the best, and what the default does. Stops when time is up."""
    deadline, generator = time.monotonic() + seconds, torch.Generator(device).manual_seed(0)
    top, defaults = measure.ceilings(device), dict(launch.BLOCKS.__dict__)
    best: list[dict[str, Any]] = []
    ahead = [(tokens, kind, each) for tokens in (1, 8) for kind in KINDS for each in matrices()]
    for tokens, (storage, point), (what, rows, cols, before) in ahead:
        if tokens > 1 and storage == "bf16":
            continue  # the vendor's library
        if time.monotonic() > deadline:
            break
        one = shapes.random_matrix(rows, cols, storage, generator, device)
        read = one.nbytes - (one.lo.numel() if one.lo is not None and not one.reads_lo(POINTS[point].planes) else 0)
        copies = [shapes.random_matrix(rows, cols, storage, generator, device) for _ in range(CACHE // read)]
        found = []
        for blocks in candidates(tokens):
            launch.BLOCKS.__dict__.update(defaults | blocks)
            try:
                replay = products([one, *copies], point, tokens, before, device)
                us = 1e3 * measure.on_device(replay, 4, 3) / (len(copies) + 1)
            except Exception as reason:  # too many registers, too much shared memory
                keep({"matrix": what, "point": point, **blocks, "failed": f"{type(reason).__name__}: {reason}"[:200]})
                continue
            found.append({**blocks, "us": round(us, 2), "share": round(read / us / 1e3 / top["gb_s"], 3)})
            if time.monotonic() > deadline:
                break
        launch.BLOCKS.__dict__.update(defaults)
        if found:
            row = {"matrix": what, "rows": rows, "cols": cols, "point": point, "m": tokens, "mb": round(read / 1e6, 2)}
            best.append(row | {"default": found[0]} | {"best": min(found, key=lambda each: each["us"])})
            keep(best[-1] | {"all": [[*each.values()] for each in found]})
    return {"best": best}


def products(copies: list[Any], point: str, tokens: int, before: str, device: torch.device) -> Callable[[], None]:
    """A graph of one product with each copy, one behind the other as in a step."""
    cols, rows, planes = copies[0].cols, copies[0].rows, POINTS[point].planes
    x = torch.randn(tokens, cols * (2 if before == "glu" else 1), device=device)
    out = torch.zeros(tokens, rows, device=device)
    prologue = launch.Before(glu="silu") if before == "glu" else launch.PLAIN
    if before == "norm":
        prologue = launch.Before(norm=torch.ones(cols, device=device), eps=1e-5)

    def all_of_them() -> None:
        for matrix in copies:
            if tokens == 1:
                launch.gemv(out, x, matrix, POINTS[point], planes, prologue, launch.After())
            else:
                launch.matmul(out, x[:, :cols].contiguous(), matrix, POINTS[point], planes, launch.After())

    all_of_them()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_of_them()
    replay: Callable[[], None] = graph.replay
    return replay
