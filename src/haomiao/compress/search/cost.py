"""What a step of a model costs on this machine: measured through the engine, and fitted so that noise decides nothing.

A decode step of one token is timed for models that differ in depth and in the bytes of each plane; non-negative least
squares over them gives milliseconds for the step as such, for a layer and for a megabyte of the first and of the second
plane. Every model that the search measures joins the fit. Knows plans and executors, not the search.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from haomiao.compress.search.levels import Model
from haomiao.kernels.packed import PackedTensor
from haomiao.types import KV_BLOCK_TOKENS, StepBatch

POINT = "int8"
CONTEXT = 128
"""Tokens before the one that is timed."""
WARM, TIMED = 3, 15


@dataclass(frozen=True, slots=True)
class Features:
    """What the time of a step is taken to depend on."""

    layers: int
    hi_mb: float
    lo_mb: float

    def row(self) -> tuple[float, float, float, float]:
        """With the constant first."""
        return 1.0, float(self.layers), self.hi_mb, self.lo_mb


def features(model: Model) -> Features:
    """Of a step at `int8`: each plane of each matrix that is read."""
    body = [
        model.tensors[name]
        for name, spec in model.plan.weights.items()
        if spec.role == "body" and spec.kind == "matrix"
    ]
    hi, lo = sum(t.hi.nbytes for t in body), sum(t.lo.nbytes for t in body if t.lo is not None)
    return Features(model.plan.layers, hi / 1e6, lo / 1e6)


def megabytes(tensors: Mapping[str, PackedTensor]) -> float:
    """Of all matrices."""
    return sum(tensor.nbytes for tensor in tensors.values()) / 1e6


def step_ms(model: Model, threads: int | None) -> float:
    """The median time of a decode step of one token, milliseconds."""
    from haomiao.engine.executors.native import NativeExecutor

    context = min(CONTEXT, model.plan.max_context - 1)
    blocks = -(-(context + 1) // KV_BLOCK_TOKENS)
    executor = NativeExecutor(
        model.plan,
        model.tensors,
        model.vectors,
        points=(POINT,),
        kv_blocks=blocks,
        max_step_tokens=context,
        threads=threads,
    )
    table = np.arange(blocks, dtype=np.int32)[None]

    def step(tokens: int, begin: int) -> float:
        ids = np.arange(tokens, dtype=np.int32) % model.plan.vocab_size
        starts, rows = np.array([0, tokens], np.int32), np.array([tokens - 1], np.int32)
        batch = StepBatch(ids, starts, np.array([begin], np.int32), table, rows, POINT)
        before = time.perf_counter()
        executor.step(batch)
        return 1e3 * (time.perf_counter() - before)

    try:
        step(context, 0)
        return statistics.median([step(1, context) for _ in range(WARM + TIMED)][WARM:])
    finally:
        executor.close()


class CostModel:
    """Milliseconds a step, fitted to (features, measured) pairs."""

    def __init__(self, measured: Sequence[tuple[Features, float]]) -> None:
        from scipy.optimize import nnls

        rows = np.array([found.row() for found, _ in measured])
        times = np.array([ms for _, ms in measured])
        # errors count relative to the time: a fast model is what is looked for
        self.weights, _ = nnls(rows / times[:, None], np.ones(len(times)))

    def predict(self, found: Features) -> float:
        """Milliseconds."""
        return float(np.dot(self.weights, found.row()))
