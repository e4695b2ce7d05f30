"""What the search chooses from: every matrix at every level, solved once, and the models that can be put together.

Levels of a matrix: `int8` (both planes), `int4` (the first alone), then int4 with a share of its tiles gone. Depth:
layers can be left out. Width: the FFNs of all layers can lose the same share of their neurons, chosen and made up for
on the second moments that `down` was solved with; rows of gate and up do not depend on each other and are cut as they
are. Solving every level once and measuring combinations is EvoPress's scheme (Sieberling et al. 2410.14649, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from haomiao.compress.layer import solve_layer
from haomiao.compress.planes import without_lo
from haomiao.compress.prune.structured import compensate
from haomiao.compress.recipe import Prune, Recipe
from haomiao.compress.shrink import (
    Block,
    Sizes,
    blocks,
    choose_neurons,
    maker_rows,
    original_name,
    shrunk_config,
    sizes_of,
    without_layers,
)
from haomiao.compress.solver import F64, I64
from haomiao.compress.workspace import Workspace
from haomiao.errors import HaomiaoError
from haomiao.kernels.pack import pack_planes, unpack_codes, without_empty
from haomiao.kernels.packed import TILE_ROWS, PackedTensor
from haomiao.models.plan import Plan
from haomiao.models.registry import plan_for
from haomiao.types import F32

TILES = (0.1, 0.2, 0.3, 0.5)
LEVELS = ("int8", "int4", *(f"tile-{round(100 * share)}" for share in TILES))
"""Of a matrix, the most accurate first."""
NARROW = (0.125, 0.25, 0.375, 0.5)
"""Shares of the neurons that widths 1, 2, ... are without; width 0 has all."""


@dataclass(frozen=True, slots=True)
class State:
    """A model that can be put together: the layers that stay, the width, each matrix's level (index of `LEVELS`)."""

    layers: tuple[int, ...]
    width: int
    levels: tuple[int, ...]  # by the order of `Database.matrices`, those of layers left out included

    def key(self) -> str:
        """What tells states apart, in letters."""
        return f"{'.'.join(map(str, self.layers))}/{self.width}/{''.join(map(str, self.levels))}"


@dataclass(frozen=True, slots=True)
class Model:
    """A state put together."""

    config: dict[str, Any]
    plan: Plan
    tensors: dict[str, PackedTensor]
    vectors: dict[str, F32]


class Database:
    """The solved levels in a workspace. `config` and `plan` are those of the model at full width and depth."""

    def __init__(self, config: Mapping[str, Any], plan: Plan, recipe: Recipe, work: Workspace, length: int) -> None:
        self.config, self.plan, self.work = dict(config), plan, work
        self._recipe, self._length = recipe, length
        self.matrices = tuple(
            name for name, spec in plan.weights.items() if spec.kind == "matrix" and spec.role == "body"
        )
        self.ffn = {block.taker: block for block in blocks(plan) if block.attention is None}
        self._makers = {block.maker: block for block in self.ffn.values()}
        self._biases = {block.bias: block for block in self.ffn.values() if block.bias is not None}
        self.widths = self._widths()

    def _widths(self) -> list[Sizes]:
        """Sizes by width index; widths that the family or the group cannot have are left out."""
        try:
            now = sizes_of(self.config)
        except HaomiaoError:
            return [Sizes(self.plan.layers, 0, 0, 0)]
        unit = max(self._recipe.group, TILE_ROWS)
        found = [now]
        for share in NARROW:
            neurons = round(now.neurons * (1 - share) / unit) * unit
            if unit <= neurons < found[-1].neurons:
                found.append(replace(now, neurons=neurons))
        return found

    # ---- solving

    def solve(self, name: str, weights: F32, hessian: F64) -> tuple[dict[str, PackedTensor], dict[str, F32]]:
        """What a stage keeps besides the matrix itself: its pruned levels, and narrow forms of a `down`."""
        tensors: dict[str, PackedTensor] = {}
        vectors: dict[str, F32] = {}
        for level, share in zip(LEVELS[2:], TILES, strict=True):
            recipe = replace(self._recipe, prune=(Prune("tile", share),), lo=False)
            tensors[f"{name}@{level}"] = solve_layer(weights, hessian, recipe, name)[0]
        narrow = self.widths[1:] if name in self.ffn else []
        stays = choose_neurons(weights, hessian, self.widths[0], narrow, self._recipe.damping) if narrow else []
        for width, kept in enumerate(stays, 1):
            fitted, _ = compensate(weights, hessian, kept, self._recipe.damping)
            part = np.ascontiguousarray(hessian[np.ix_(kept, kept)])
            tensors[f"{name}@width-{width}"] = solve_layer(fitted, part, self._recipe, name)[0]
            vectors[f"{name}@kept-{width}"] = kept.astype(np.float32)
        return tensors, vectors

    # ---- putting together

    def start(self) -> State:
        """Everything, as accurate as can be."""
        return State(tuple(range(self.plan.layers)), 0, (0,) * len(self.matrices))

    def model(self, state: State) -> Model:
        """The plan and the weights of a state."""
        config = self.config
        if state.width:
            config = shrunk_config(config, self.widths[state.width], range(self.plan.layers))
        if len(state.layers) < self.plan.layers:
            config = without_layers(config, state.layers)
        plan = plan_for(config, self._length)
        tensors: dict[str, PackedTensor] = {}
        vectors: dict[str, F32] = {}
        for name, spec in plan.weights.items():
            before = original_name(name, state.layers)
            if spec.kind == "vector":
                vectors[name] = self._vector(before, state.width)
            elif before in self.matrices:
                tensors[name] = self.matrix(before, state)
            else:
                tensors[name] = self.work.tensor(before)
        return Model(config, plan, tensors, vectors)

    def matrix(self, name: str, state: State) -> PackedTensor:
        """A matrix (by its name at full depth) as a state has it."""
        level = state.levels[self.matrices.index(name)]
        narrow = state.width and (name in self.ffn or name in self._makers)
        if not narrow:
            if level >= 2:
                return without_empty(self.work.tensor(f"{name}@{LEVELS[level]}"))
            whole = self.work.tensor(name)
        elif name in self.ffn:
            whole = self.work.tensor(f"{name}@width-{state.width}")
        else:
            whole = cut_rows(self.work.tensor(name), self._rows(self._makers[name], state.width))
        return whole if level == 0 else without_lo(whole)

    def deepest(self, name: str, state: State) -> int:
        """The last level that a matrix has in a state: narrow ones have no pruned forms."""
        narrow = state.width and (name in self.ffn or name in self._makers)
        return 1 if narrow else len(LEVELS) - 1

    def _vector(self, name: str, width: int) -> F32:
        vector = self.work.vector(name)
        if width and name in self._biases:
            return vector[self._rows(self._biases[name], width)]
        return vector

    def _rows(self, block: Block, width: int) -> I64:
        return maker_rows(block, self.work.vector(f"{block.taker}@kept-{width}").astype(np.int64))


def cut_rows(tensor: PackedTensor, rows: I64) -> PackedTensor:
    """Some rows of nested planes, in the order given."""
    high, scales = unpack_codes(tensor, "hi")
    first, scales = high[rows].astype(np.int8), scales[rows]
    if tensor.lo is None:
        return pack_planes(first, None, scales, tensor.group, 0)
    codes, _ = unpack_codes(tensor)
    low = (codes[rows] - (high[rows] << np.int16(tensor.lo_shift))).astype(np.int8)
    return pack_planes(first, low, scales, tensor.group, tensor.lo_shift)


def describe(database: Database, state: State) -> dict[str, Any]:
    """A state in a reader's words: layers, neurons, and how many of the matrices that are left stand at each level."""
    counts = dict.fromkeys(LEVELS, 0)
    for index, name in enumerate(database.matrices):
        if int(name.split(".")[1]) in state.layers:
            counts[LEVELS[state.levels[index]]] += 1
    out: dict[str, Any] = {"layers": len(state.layers), "matrices": {k: v for k, v in counts.items() if v}}
    if database.widths[0].neurons:
        out["neurons"] = database.widths[state.width].neurons
    return out
