"""Other block sizes for the matrix kernels, timed on the matrices of the three models.

Every product reads another copy of its matrix than the one before, so that none comes out of the L2 cache. Kernels are
compiled by processes beside each other first (`compile_part`), so that the time goes into timing. `--out FILE` keeps
the best of each matrix, which `run --blocks FILE` takes (`adopt`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gpulib import measure, shapes
from haomiao.engine.executors.torch import launch
from haomiao.models.plan import Glu, Head, Linear, Norm
from haomiao.models.registry import plan_for
from haomiao.types import POINTS

CACHE = 200 << 20
"""Bytes that the copies of a matrix must have together: more than three times the L2 cache of an H200."""
KINDS = (
    ("planes", "int4-w", 1), ("planes", "int4-w", 8), ("planes", "int4-w", 64), ("bf16", "bf16", 1),
    ("planes", "int8", 1),
)  # fmt: skip
PARTS = 14
"""Processes that compile."""


def matrices() -> Iterator[tuple[str, int, int, str]]:
    """(what, rows, cols, what stands before it) of every model's layer and head, in the order of what is wanted."""
    for shape in ("8b", "0.5b", "1b"):
        plan = plan_for(shapes.CONFIGS[shape])
        outputs = {op.out: op for op in plan.ops if isinstance(op, Norm | Glu)}
        wanted: list[Linear | Head] = []
        wanted += [op for op in plan.ops if isinstance(op, Linear)][:4]
        wanted += [op for op in plan.ops if isinstance(op, Head)]
        for op in wanted:
            spec, before = plan.weights[op.weight], outputs.get(op.source)
            kind = "norm" if isinstance(before, Norm) else "glu" if isinstance(before, Glu) else ""
            yield f"{shape} {op.weight}", spec.rows, spec.cols, kind


def candidates(tokens: int, storage: str) -> Iterator[dict[str, Any]]:
    """Sizes of blocks to try, the default first."""
    if tokens == 1:
        for bytes_, columns, tiles, resident in (
            (32, 1024, 4, 20), (64, 1024, 2, 16), (64, 1024, 4, 16), (32, 512, 4, 20), (32, 1024, 1, 20),
            (32, 1024, 2, 24), (16, 1024, 4, 32),
        ):  # fmt: skip
            yield {"gemv_bytes": bytes_, "gemv_columns": columns, "gemv_tiles": tiles, "gemv_resident": resident}
        if storage == "planes":
            yield {"gemv_codes": True}
    elif tokens <= 16:
        yield {"codes_from_rows": launch.BLOCKS.codes_from_rows}
        for rows, warps, stages, groups in ((32, 4, 3, 8), (64, 4, 3, 4), (32, 4, 4, 4), (16, 4, 3, 8)):
            sizes = {"gemm_rows": rows, "gemm_warps": warps, "gemm_stages": stages, "gemm_groups": groups}
            yield sizes | {"codes_from_rows": 0}
        yield {"gemm_batched": False}
    else:
        yield {"codes_to": 0}
        for rows, groups in ((32, 4), (64, 4)):
            yield {"codes_to": 64, "gemm_rows": rows, "gemm_groups": groups}


def jobs() -> list[tuple[tuple[str, str, int], tuple[str, int, int, str]]]:
    """Every kind of product of every matrix, model by model; of the smaller ones, one token alone."""
    return [
        (kind, each)
        for shape in ("8b", "0.5b", "1b")
        for kind in KINDS
        for each in matrices()
        if each[0].startswith(shape) and (shape == "8b" or kind[2] == 1)
    ]


def planes_of(what: str, point: str) -> Any:
    """A head is read with the planes that the point gives it."""
    return POINTS[point].planes if "layers" in what else POINTS[point].head


def compile_part(part: int, device: torch.device) -> None:
    """Launch this part's candidates once."""
    todo = [(kind, each, blocks) for kind, each in jobs() for blocks in candidates(kind[2], kind[0])]
    defaults, generator = dict(launch.BLOCKS.__dict__), torch.Generator(device).manual_seed(0)
    for (storage, point, tokens), (what, rows, cols, before), blocks in todo[part::PARTS]:
        launch.BLOCKS.__dict__.update(defaults | blocks)
        matrix = shapes.random_matrix(rows, cols, storage, generator, device)
        try:
            product_of(what, cols, rows, point, tokens, before, device)(matrix)
        except Exception as reason:  # too many registers, too much shared memory: said when it is timed
            print(f"{what}: {reason}"[:200], file=sys.stderr)
    torch.cuda.synchronize()


def tune(
    device: torch.device, script: Sequence[str], seconds: float, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Microseconds of every matrix by sizes of blocks: the best, and what the default does. Stops when time is up."""
    began = time.monotonic()
    deadline, generator = began + seconds, torch.Generator(device).manual_seed(0)
    parts = [subprocess.Popen([sys.executable, *script, "tune", "--part", str(part)]) for part in range(PARTS)]
    top, defaults = measure.ceilings(device), dict(launch.BLOCKS.__dict__)
    for process in parts:
        try:
            process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    keep({"compiled_in_s": round(time.monotonic() - began, 1)})
    best: list[dict[str, Any]] = []
    for (storage, point, tokens), (what, rows, cols, before) in jobs():
        if time.monotonic() > deadline:
            break
        one, planes = shapes.random_matrix(rows, cols, storage, generator, device), planes_of(what, point)
        read = one.nbytes - (one.lo.numel() if one.lo is not None and not one.reads_lo(planes) else 0)
        copies = [one, *(shapes.random_matrix(rows, cols, storage, generator, device) for _ in range(CACHE // read))]
        found = []
        for blocks in candidates(tokens, storage):
            launch.BLOCKS.__dict__.update(defaults | blocks)
            try:
                replay = graph_of(product_of(what, cols, rows, point, tokens, before, device), copies)
                us = 1e3 * measure.on_device(replay, 2, 3) / len(copies)
            except Exception as reason:  # too many registers, too much shared memory
                keep({"matrix": what, "point": point, **blocks, "failed": f"{type(reason).__name__}: {reason}"[:200]})
                continue
            found.append({**blocks, "us": round(us, 2), "share": round(read / us / 1e3 / top["gb_s"], 3)})
        launch.BLOCKS.__dict__.update(defaults)
        if found:
            row = {"matrix": what, "rows": rows, "cols": cols, "point": point, "m": tokens, "mb": round(read / 1e6, 2)}
            row |= {"encoding": launch.encoding_of(one, planes), "default": found[0]}
            best.append(row | {"best": min(found, key=lambda each: float(each["us"]))})
            keep(best[-1] | {"all": [[*each.values()] for each in found]})
    return {"best": best}


def adopt(file: Path) -> int:
    """Take what `tune` wrote as the sizes of blocks of its matrices; how many there were."""
    for line in file.read_text().splitlines():
        row = json.loads(line)
        if "best" in row and "encoding" in row:
            blocks = {name: value for name, value in row["best"].items() if name in launch.BLOCKS.__dict__}
            rounding = 2 if POINTS[row["point"]].activations == "int8" and row["encoding"] > 1 else 1
            key = (row["encoding"], rounding, row["rows"], row["cols"], launch.company(row["m"]))
            launch.BEST[key] = launch.Blocks(**launch.BLOCKS.__dict__ | blocks)
    return len(launch.BEST)


def product_of(
    what: str, cols: int, rows: int, point: str, tokens: int, before: str, device: torch.device
) -> Callable[[Any], None]:
    """One product with a matrix, its prologue included."""
    planes = planes_of(what, point)
    x = torch.randn(tokens, cols * (2 if before == "glu" and tokens == 1 else 1), device=device)
    out = torch.zeros(tokens, rows, device=device)
    prologue = launch.Before(glu="silu") if before == "glu" else launch.PLAIN
    if before == "norm":
        prologue = launch.Before(norm=torch.ones(cols, device=device), eps=1e-5)

    def product(matrix: Any) -> None:
        if tokens == 1:
            launch.gemv(out, x, matrix, POINTS[point], planes, prologue, launch.After())
        else:
            launch.matmul(out, x, matrix, POINTS[point], planes, launch.After())

    return product


def graph_of(product: Callable[[Any], None], copies: Sequence[Any]) -> Callable[[], None]:
    """A graph of one product with each copy, one behind the other as in a step."""
    product(copies[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for matrix in copies:
            product(matrix)
    replay: Callable[[], None] = graph.replay
    return replay
