"""How far a compression is, in multiply-adds: what a stage costs, what is done, and what progress is told.

Knows the sizes of layers, nothing about how they are solved.
"""

from __future__ import annotations

from haomiao.compress.calibrate import Stage
from haomiao.compress.width import Width
from haomiao.load.source import Progress
from haomiao.models.plan import Plan

SOLVE_COST = 3.0
"""Multiply-adds of solving a matrix [rows, cols], per rows * cols * cols."""
REST = 1.02
"""All that is done, times the work of the stages: tables, measuring."""


class Headway:
    """The count of one run: `plan` as it will be, `wide` at full width, `tokens` of calibration in all."""

    def __init__(
        self,
        name: str,
        plan: Plan,
        wide: Plan,
        width: Width,
        stages: list[Stage],
        tokens: int,
        progress: Progress | None,
    ) -> None:
        self.doing = "preparing"
        self._name, self._plan, self._wide, self._width = name, plan, wide, width
        self._stages, self._tokens, self._progress = stages, tokens, progress
        self._done = 0.0
        self._total = REST * sum(self._stage_work(stage) for stage in stages)

    def count(self, stage: Stage, tokens: int) -> None:
        """So many more tokens went through a stage."""
        self._done += tokens * self._token_work(stage)
        self.tell(stage.weight)

    def finish(self, index: int) -> None:
        """All stages up to and with this one are done."""
        self._done = sum(self._stage_work(stage) for stage in self._stages[: index + 1])
        self.tell(self._stages[index].weight)

    def tell(self, what: str | None = None) -> None:
        """Say what is being done (default: `doing`), without any advance."""
        if self._progress is not None:
            what = f"compressing {self._name}: {what or self.doing}"
            self._progress(what, int(self._done), int(self._total))

    def _token_work(self, stage: Stage) -> float:
        """Multiply-adds of a token in one pass up to this layer: the moments of its inputs and the layers computed, and
        the same of the layer behind where width is taken out here."""
        spec = self._wide.weights[stage.weight]
        work = float(spec.cols * spec.cols + spec.rows * spec.cols)
        block = self._width.block(stage.weight)
        if block is not None:
            work += spec.rows * spec.cols + float(self._wide.buffers[block.source]) ** 2
        return work

    def _stage_work(self, stage: Stage) -> float:
        spec = self._plan.weights[stage.weight]
        return self._tokens * self._token_work(stage) + SOLVE_COST * spec.rows * spec.cols * spec.cols
