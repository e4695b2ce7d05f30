"""The model as it was, run beside the calibration on the samples that are held out: what errors are measured against.

Its weights are read while the calibration reads them anyway, a layer at a time; its last hidden state is kept on disk,
and logits are computed from it sample by sample, as often as they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from haomiao.compress.calibrate import Stream, stages
from haomiao.compress.forward import Weights
from haomiao.models.encode import Encoder
from haomiao.models.plan import Head
from haomiao.models.registry import plan_for
from haomiao.types import F32, I32


class Reference:
    """`encoder` reads the checkpoint under the names of its own plan; `held_out` [samples, tokens]."""

    def __init__(self, encoder: Encoder, held_out: I32, folder: Path) -> None:
        self.encoder, self.held_out = encoder, held_out
        self.plan = plan_for(encoder.source.config, held_out.shape[1])
        self.stream = Stream(self.plan, held_out, folder, "reference")
        self.stages = stages(self.plan)
        self._head = next(i for i, op in enumerate(self.plan.ops) if isinstance(op, Head))
        self._tables: dict[str, tuple[I32, F32]] = {}

    def advance(self, count: int) -> None:
        """Bring it behind its first `count` linear layers: to the next one's input, or the head's."""
        for index, stage in enumerate(self.stages[:count]):
            end = self.stages[index + 1].place if index + 1 < len(self.stages) else self._head
            if self.stream.place < end:
                self._piece(stage.weight, end)

    def _piece(self, only: str, end: int) -> None:
        weights: list[F32] = []

        def matrix(name: str) -> F32:
            assert name == only  # the pieces between layers hold one matrix each
            if not weights:
                weights.append(self.encoder.weights(self.plan.weights[name]))
            return weights[0]

        vector = lambda name: self.encoder.vector(self.plan.weights[name])  # noqa: E731
        self.stream.advance(end, Weights(matrix, self._rows, vector), store=end)

    def _rows(self, name: str, ids: I32) -> F32:
        """Rows of a table of the checkpoint: those that the held-out samples use are read once."""
        if name not in self._tables:
            used = np.arange(self.held_out.shape[1]) if name == "positions" else self.held_out
            rows = np.unique(used).astype(np.int32)
            self._tables[name] = rows, self.encoder.weights(self.plan.weights[name])[rows]
        rows, values = self._tables[name]
        found: F32 = values[np.searchsorted(rows, ids)]
        return found

    def logits(self) -> Iterator[F32]:
        """Logits [tokens, vocab] of the held-out samples, sample by sample."""
        head = self.plan.ops[self._head]
        assert isinstance(head, Head)
        weights = self.encoder.weights(self.plan.weights[head.weight])
        tokens = self.held_out.shape[1]
        for buffers in self.stream.outputs():
            hidden = buffers[head.source]
            for begin in range(0, len(hidden), tokens):
                logits = hidden[begin : begin + tokens] @ weights.T * np.float32(head.scale)
                yield np.float32(head.softcap) * np.tanh(logits / np.float32(head.softcap)) if head.softcap else logits
