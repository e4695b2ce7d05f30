"""How calibration takes width out of a layer: heads or neurons, chosen and made up for when the layer is reached.

At the layer that makes them (qkv; gate and up) the whole width is computed once more for every sample, with the weights
as they are and from inputs that the compressed layers before have made. The second moments of what comes out choose
what stays and fit the layer behind (out; down) to it; both are then quantized like any other. What is left of the
layer behind is kept in the workspace until its turn comes. Knows blocks of a plan, not jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from haomiao.compress.calibrate import Moments
from haomiao.compress.forward import Buffers, Weights, run
from haomiao.compress.prune.structured import compensate
from haomiao.compress.recipe import Recipe
from haomiao.compress.shrink import (
    Block,
    blocks,
    choose,
    layer_weights,
    maker_rows,
    shrinks,
    shrunk_config,
    sizes_of,
    target_width,
)
from haomiao.compress.solver import I64, layer_power
from haomiao.models.plan import Plan
from haomiao.models.registry import plan_for
from haomiao.types import F32, I32

TARGET = ".fitted"
"""Behind a matrix's name: its weights, float32, fitted to the columns that stay."""


class Width:
    """What the recipe leaves of every layer's width. `config` is the narrower model's."""

    def __init__(self, config: Mapping[str, Any], recipe: Recipe) -> None:
        self.config = dict(config)
        self.damping = recipe.damping
        self._blocks: dict[str, Block] = {}
        self._fitted: set[str] = set()
        if not recipe.structured:
            return
        plan = plan_for(config)
        self.wide = sizes_of(config)
        self.sizes = target_width(self.wide, recipe, layer_weights(plan))
        if self.sizes != self.wide:
            self.config = shrunk_config(config, self.sizes, range(self.wide.layers))
        for block in blocks(plan):
            if shrinks(block, self.wide, self.sizes):
                self._blocks[block.maker] = block
                self._fitted.add(block.taker)

    def block(self, maker: str) -> Block | None:
        """The block that this matrix begins, if width goes there."""
        return self._blocks.get(maker)

    def fitted(self, name: str) -> str | None:
        """The name under which a matrix's fitted weights are kept; None if it keeps all its columns."""
        return f"{name}{TARGET}" if name in self._fitted else None


@dataclass(frozen=True, slots=True)
class Cut:
    """What became of a block: rows of the maker that stay, vectors to keep (its bias, the fitted taker), a log line."""

    rows: I64
    vectors: dict[str, F32]
    log: dict[str, Any]


class Behind:
    """The second moments of a block's inner activations at full width, gathered sample by sample."""

    def __init__(self, block: Block, wide: Plan, maker: F32, vector: Callable[[str], F32], tokens: int) -> None:
        self.block = block
        self._plan, self._tokens, self._vector = wide, tokens, vector
        self._weights = Weights(lambda _: maker, _no_rows, vector)
        self._moments = Moments(wide.buffers[block.source])

    def add(self, buffers: Buffers) -> None:
        """One chunk: `buffers` hold the maker's input."""
        source = self._plan.ops[self.block.begin].source  # type: ignore[union-attr]
        inner = {source: buffers[source]}
        ids = np.zeros((len(inner[source]) // self._tokens, self._tokens), np.int32)
        run(self._plan, self._weights, inner, ids, self.block.begin, self.block.end)
        self._moments.add(inner[self.block.source])

    def cut(self, taker: F32, width: Width) -> Cut:
        """Choose, and fit the taker [rows, cols]."""
        hessian = self._moments.hessian()
        kept, columns = choose(self.block, taker, hessian, width.wide, width.sizes, width.damping)
        fitted, error = compensate(taker, hessian, columns, width.damping)
        rows = maker_rows(self.block, kept)
        vectors = {f"{self.block.taker}{TARGET}": fitted}
        if self.block.bias is not None:
            vectors[self.block.bias] = self._vector(self.block.bias)[rows]
        power = layer_power(taker, hessian)
        log = {
            "what": "neurons" if self.block.attention is None else "heads",
            "kept": len(kept),
            "of": width.wide.neurons if self.block.attention is None else width.wide.heads,
            "error": error,
            "relative": error / power if power else 0.0,
        }
        return Cut(rows, vectors, log)


def _no_rows(name: str, ids: I32) -> F32:
    raise AssertionError(f"no table is read inside a block: {name}")
