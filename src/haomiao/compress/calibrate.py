"""Calibration: what the linear layers of a model are given on real text, streamed through a file.

Samples run through the plan piece by piece: from one linear layer's input to the next, with the weights that were
already solved, so that each layer is fitted to what it will really see (GPTQ's sequential scheme). Between pieces only
the buffers that are still needed are kept, and on disk; memory holds one chunk of tokens and one Hessian, whatever the
number of samples. Every file is written beside its name and renamed. Knows plans and operations, not solvers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from haomiao.compress.forward import Buffers, Weights, live, run, uses
from haomiao.compress.solver import F64
from haomiao.load.disk import disk_errors
from haomiao.models import plan as ops
from haomiao.types import F32, I32

CHUNK_TOKENS = 1024
"""Tokens computed at once (at least one sample)."""
STORED_WIDTH = 3
"""Times the hidden size: wider sets of buffers are computed again rather than written."""

SUM_TOKENS = 8192
"""Tokens whose squares are added up in float32 before they go into the float64 sum: that costs a pass over it."""
MIRRORED = 512
"""Columns of the lower triangle that are copied into the upper at once."""

Consume = Callable[[Buffers], None]
Tick = Callable[[int], None]
"""Called with the number of tokens that were just computed."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A linear layer to be solved: its operation's place in the plan, its weight and where its input stands."""

    place: int
    weight: str
    source: str


def stages(plan: ops.Plan) -> list[Stage]:
    """The linear layers in the order of computation."""
    return [Stage(i, op.weight, op.source) for i, op in enumerate(plan.ops) if isinstance(op, ops.Linear)]


class Moments:
    """Second moments XᵀX / N of a layer's inputs, float64 [cols, cols], and their mean magnitude by column.

    One triangle is added up, by BLAS's symmetric update: half of the multiply-adds of a product. Sums of `SUM_TOKENS`
    are float32, sums of these float64.
    """

    def __init__(self, cols: int) -> None:
        self.tokens = 0
        self._squares = np.zeros((cols, cols), np.float64, order="F")
        self._part = np.zeros((cols, cols), np.float32, order="F")
        self._pending = 0
        self._magnitudes = np.zeros(cols, np.float64)

    def add(self, x: F32) -> None:
        """Inputs [tokens, cols]."""
        from scipy.linalg.blas import ssyrk

        rows = np.ascontiguousarray(x)
        beta = 1.0 if self._pending else 0.0
        self._part = ssyrk(1.0, rows.T, beta=beta, c=self._part, lower=1, overwrite_c=1)
        self._pending += len(x)
        if self._pending >= SUM_TOKENS:
            self._flush()
        self._magnitudes += np.abs(rows).sum(axis=0)
        self.tokens += len(x)

    def _flush(self) -> None:
        if self._pending:
            self._squares += self._part
            self._pending = 0

    def hessian(self) -> F64:
        """XᵀX / N, symmetric to the bit; the sums are given away, nothing more can be added."""
        self._flush()
        squares = self._squares
        self._squares, self._part = np.zeros((0, 0)), np.zeros((0, 0), np.float32)
        squares /= max(self.tokens, 1)
        for begin in range(0, len(squares), MIRRORED):
            end = min(begin + MIRRORED, len(squares))
            block = squares[begin:end, begin:end]
            block[...] = np.tril(block) + np.tril(block, -1).T
            squares[begin:end, end:] = squares[end:, begin:end].T
        return squares.T

    def magnitudes(self) -> F64:
        """Mean |x| of every column."""
        return self._magnitudes / max(self.tokens, 1)


class Stream:
    """The activations of all samples at one place of a plan.

    `ids` [samples, tokens]; `folder` holds one file, `<name>-<place>.f32`, whose records are a sample's live buffers.
    At place 0 there is none. A stream that finds its file goes on from there.
    """

    def __init__(self, plan: ops.Plan, ids: I32, folder: Path, name: str) -> None:
        self.plan, self.ids, self.folder, self.name = plan, ids, folder, name
        self._live = live(plan)
        self.place = max((p for p in self._places() if self._whole(p)), default=0)
        self._keep_only(self.place)

    def advance(
        self,
        end: int,
        weights: Weights,
        *,
        consume: Consume | None = None,
        store: int | None = None,
        tick: Tick | None = None,
    ) -> None:
        """Run every sample up to operation `end` (not included) and show the buffers there to `consume`.

        The stream then stands where it is cheapest to go on from: at `store`, or the place that `cut` names, or where
        it was. Raises `UnavailableError` if the disk is full; the stream then stands where it stood.
        """
        cut = self.cut(end) if store is None else store
        with contextlib.ExitStack() as stack:
            out = None if cut in (None, self.place) else stack.enter_context(_replacing(self._path(cut or 0)))
            for ids, buffers in self._chunks():
                run(self.plan, weights, buffers, ids, self.place, end if cut is None else cut)
                if out is not None and cut is not None:
                    for part in range(len(ids)):
                        for name in self._live[cut]:
                            rows = buffers[name][part * ids.shape[1] : (part + 1) * ids.shape[1]]
                            out.write(np.ascontiguousarray(rows).data)
                if cut is not None:
                    run(self.plan, weights, buffers, ids, cut, end)
                if consume is not None:
                    consume(buffers)
                if tick is not None:
                    tick(ids.size)
        if cut is not None:
            self.place = cut
            self._keep_only(cut)

    def cut(self, end: int) -> int | None:
        """Where to store between here and `end`: behind the last matrix product or attention, where least is alive;
        None if nothing was computed that is worth it, or too much is alive."""
        heavy = [i for i in range(self.place, end) if isinstance(self.plan.ops[i], (ops.Linear, ops.Attention))]
        if not heavy:
            return None
        width = {place: self._width(place) for place in range(heavy[-1] + 1, end + 1)}
        best = min(width, key=lambda place: (width[place], -place))
        return best if width[best] <= STORED_WIDTH * self.plan.hidden_size else None

    def outputs(self) -> Iterator[Buffers]:
        """The buffers where the stream stands, chunk by chunk, samples in order."""
        for _, buffers in self._chunks():
            yield buffers

    def remove(self) -> None:
        """Delete the stream's files."""
        self._keep_only(-1)

    # ---- files

    def _chunks(self) -> Iterator[tuple[I32, Buffers]]:
        samples, tokens = self.ids.shape
        step = max(1, CHUNK_TOKENS // tokens)
        names = self._live[self.place]
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(self._path(self.place).open("rb")) if names else None
            for begin in range(0, samples, step):
                ids = self.ids[begin : begin + step]
                parts: dict[str, list[F32]] = {name: [] for name in names}
                for _ in range(len(ids)):
                    for name in names:
                        assert file is not None  # a place with live buffers has a file
                        block = np.fromfile(file, np.float32, tokens * self.plan.buffers[name])
                        parts[name].append(block.reshape(tokens, -1))
                yield ids, {name: np.concatenate(blocks) for name, blocks in parts.items()}

    def _width(self, place: int) -> int:
        return sum(self.plan.buffers[name] for name in self._live[place])

    def _path(self, place: int) -> Path:
        return self.folder / f"{self.name}-{place:06d}.f32"

    def _places(self) -> list[int]:
        found = self.folder.glob(f"{self.name}-*.f32")
        return [int(path.stem.rpartition("-")[2]) for path in found]

    def _whole(self, place: int) -> bool:
        if not 0 <= place < len(self._live) or not self._live[place]:
            return False
        return self._path(place).stat().st_size == 4 * self.ids.size * self._width(place)

    def _keep_only(self, place: int) -> None:
        for other in self._places():
            if other != place:
                self._path(other).unlink(missing_ok=True)
        for part in self.folder.glob(f"{self.name}-*.part"):
            part.unlink(missing_ok=True)


def first_reader(plan: ops.Plan, name: str, begin: int) -> ops.Op | None:
    """The first operation from `begin` on that reads a buffer, None if it is written before."""
    for op in plan.ops[begin:]:
        reads, writes = uses(op)
        if name in reads:
            return op
        if name in writes:
            return None
    return None


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name only when it is whole."""
    part = path.with_suffix(".part")
    with disk_errors(path, kept=True), part.open("wb") as file:
        yield file
        file.flush()
    with disk_errors(path, kept=True):
        part.replace(path)
