"""Where a step copies K and V besides: from `StepBatch.copies` to slots. Knows no device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from haomiao.types import KV_BLOCK_TOKENS, StepBatch


def copied_slots(batch: StepBatch) -> npt.NDArray[np.int64] | None:
    """Slots [2, copies], from and to, of the tokens whose K and V `batch.copies` copies once they are written."""
    if batch.copies is None or not batch.copies.size:
        return None
    tokens, blocks = batch.copies[:, 0].astype(np.int64), batch.copies[:, 1].astype(np.int64)
    owners = np.searchsorted(batch.span_starts, tokens, side="right") - 1
    positions = batch.past[owners] + tokens - batch.span_starts[owners]
    own = batch.block_tables[owners, positions // KV_BLOCK_TOKENS].astype(np.int64)
    slots: npt.NDArray[np.int64] = np.stack([own, blocks]) * KV_BLOCK_TOKENS + positions % KV_BLOCK_TOKENS
    return slots
