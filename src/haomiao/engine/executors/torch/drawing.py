"""Launches of the kernels that draw tokens from rows of logits: `twins.draw` on the device. Knows no plan and no step.

Between the kernels, in memory of their own: the greatest of each chunk of a row, the sum of its weights in parts, and
about 270 candidates, every entry that is at least as good as the `FIRST_LOOK`-th of the chunks' greatest. Unlike the
twin, they leave only what is not finite open.
"""

from __future__ import annotations

import torch

from haomiao.engine.executors.torch.kernels import draw as kernels
from haomiao.engine.executors.torch.launch import power, up
from haomiao.engine.executors.torch.matrices import Tensor
from haomiao.engine.executors.torch.twins import FIRST_LOOK, Draws

LANES = 128
"""Chunks that one program works off."""
MOST_CHUNKS = 2048
"""Chunks of a row: entry i belongs to chunk i modulo their number, so that the best, which are often neighbours, fall
into different ones; then 270 of 128 thousand are as good as the 256th of the chunks' greatest."""
DEPTH = 16
"""Entries of each chunk that are read at a turn."""
CAPACITY = 512
"""Candidates that are put in order; a row with more of them (ties) is walked whole."""
TAIL, TAIL_WARPS = 4096, 16
"""Entries that the walk over a whole row reads at a turn, and its warps: one program a row, since few rows need it."""


def draw(out: Tensor, logits: Tensor, places: Tensor, draws: Draws) -> None:
    """out int32 [rows]: what is drawn from logits f32 [rows, vocab], whose greatest stand at `places` int32 [rows]."""
    rows, vocab = logits.shape
    parts = min(MOST_CHUNKS // LANES, up(vocab, LANES))
    chunks = parts * LANES
    device = logits.device
    peaks = torch.empty(rows, chunks, device=device)
    sums = torch.empty(rows, parts, dtype=torch.float64, device=device)
    floors = torch.empty(rows, dtype=torch.int32, device=device)
    counts = torch.empty(rows, dtype=torch.int32, device=device)
    found, ordered = torch.empty(2, rows, CAPACITY, dtype=torch.int64, device=device)
    kernels.chunks[(rows, parts)](
        peaks, sums, counts, logits, places, draws.temperature, vocab,
        CHUNKS=chunks, LANES=LANES, DEPTH=DEPTH,
    )  # fmt: skip
    kernels.candidates[(rows, parts)](
        found, counts, floors, peaks, logits, places, draws.temperature, vocab,
        CHUNKS=chunks, ALL=power(chunks), LANES=LANES, DEPTH=DEPTH, LOOK=FIRST_LOOK, CAPACITY=CAPACITY,
    )  # fmt: skip
    kernels.order[(rows, CAPACITY // LANES)](ordered, found, counts, draws.temperature, CAPACITY=CAPACITY, BLOCK=LANES)
    kernels.tokens[(rows,)](
        out, ordered, counts, floors, sums, draws.uniform, draws.top_p, draws.temperature, draws.min_p, draws.top_k,
        vocab, PARTS=parts, PARTS_ALL=power(parts), CAPACITY=CAPACITY,
    )  # fmt: skip
    kernels.tail[(rows,)](
        out, logits, places, sums, draws.uniform, draws.top_p, draws.temperature, draws.min_p, draws.top_k, vocab,
        PARTS=parts, PARTS_ALL=power(parts), BLOCK=min(TAIL, power(vocab, 128)), num_warps=TAIL_WARPS,
    )  # fmt: skip
