"""How wrong the result is, at every point, against the weights as loaded: measured on samples held out of calibration.

The reference runs through the plan beside the calibration, with the original weights, while these are at hand anyway;
its last hidden state is kept, and its logits are computed window by window. The candidate is run by the native
executor as it will be when it serves: int8 activations, its own K/V type. Knows nothing about solvers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from haomiao.kernels.packed import PackedTensor
from haomiao.measure.accuracy import measure_against
from haomiao.models.plan import Plan
from haomiao.types import F32, I32, KV_BLOCK_TOKENS, Executor, StepBatch

LogitWindows = Callable[[], Iterator[F32]]
STEP_TOKENS = 512


def sequence_logits(executor: Executor, ids: Sequence[int], point: str) -> F32:
    """Logits [tokens, vocab] of one sequence from an empty cache."""
    blocks = -(-len(ids) // KV_BLOCK_TOKENS)
    table = np.arange(blocks, dtype=np.int32)[None]
    parts = []
    for begin in range(0, len(ids), executor.max_step_tokens):
        part = np.asarray(ids[begin : begin + executor.max_step_tokens], np.int32)
        rows = np.arange(len(part), dtype=np.int32)
        starts = np.array([0, len(part)], np.int32)
        batch = StepBatch(part, starts, np.array([begin], np.int32), table, rows, point)
        parts.append(executor.step(batch).logits.copy())
    return np.concatenate(parts)


def measure_points(
    plan: Plan,
    tensors: Mapping[str, PackedTensor],
    vectors: Mapping[str, F32],
    points: Sequence[str],
    held_out: I32,
    reference: LogitWindows,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """`{point: figures}` as `AgreementResult.as_dict` has them. `held_out` [windows, tokens]; `reference` gives the
    logits of the same windows, in order, each time it is called."""
    from haomiao.engine.executors.native import NativeExecutor

    length = held_out.shape[1]
    executor = NativeExecutor(
        plan,
        tensors,
        vectors,
        points=points,
        kv_blocks=-(-length // KV_BLOCK_TOKENS),
        max_step_tokens=min(STEP_TOKENS, length),
        threads=threads,
    )
    try:
        windows = reference()
        candidates = {point: lambda ids, point=point: sequence_logits(executor, ids, point) for point in points}
        results = measure_against(
            lambda _: next(windows), candidates, held_out.reshape(-1).tolist(), window=length, progress=progress
        )
        return {point: result.as_dict() for point, result in results.items()}
    finally:
        executor.close()
