"""A plan under construction: buffers, weights, operations and the layers' state, collected and handed over.

Knows what a plan consists of and nothing about any family; the decoder that most families share lives in `decoder`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from haomiao.errors import ModelError
from haomiao.kernels.packed import TILE_ROWS
from haomiao.models.plan import (
    PLAN_VERSION,
    Op,
    Plan,
    RopeSpec,
    WeightSpec,
)

Layout = Literal["concat", "interleave"]
Transform = Literal["none", "transpose", "plus_one"]
Role = Literal["body", "head", "embedding", "norm", "bias"]
Source = tuple[str, tuple[int, ...]]


def padded_neurons(ffn: int) -> int:
    """FFN width padded to whole 32-row tiles, as the interleaved gate/up matrix stores it."""
    return -(-ffn // TILE_ROWS) * TILE_ROWS


@dataclass
class PlanBuilder:
    """Collects buffers, weights and operations; `build` hands over the plan."""

    family: str
    vocab_size: int
    hidden_size: int
    max_context: int
    buffers: dict[str, int] = field(default_factory=dict)
    weights: dict[str, WeightSpec] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    ropes: list[RopeSpec] = field(default_factory=list)
    kv_heads: list[int] = field(default_factory=list)
    head_dims: list[int] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)

    def buffer(self, name: str, width: int) -> str:
        """A float32 [tokens, width] buffer; the same name always has the same width."""
        if self.buffers.setdefault(name, width) != width:
            raise ModelError(f"buffer {name} is used with widths {self.buffers[name]} and {width}")
        return name

    def matrix(
        self,
        name: str,
        rows: int,
        cols: int,
        *sources: Source,
        layout: Layout = "concat",
        transform: Transform = "none",
        slices: tuple[tuple[int, int], ...] = (),
        role: Role = "body",
        kind: Literal["matrix", "table"] = "matrix",
    ) -> str:
        """Declare a matrix [rows, cols] (see `WeightSpec`); a source is a name and the shape it must have."""
        names, shapes = tuple(s[0] for s in sources), tuple(s[1] for s in sources)
        self.weights[name] = WeightSpec(name, kind, rows, cols, names, layout, transform, slices, role, shapes)
        return name

    def vector(
        self,
        name: str,
        size: int,
        *sources: Source,
        transform: Transform = "none",
        layout: Layout = "concat",
        role: Role = "norm",
    ) -> str:
        """Declare a float32 vector."""
        names, shapes = tuple(s[0] for s in sources), tuple(s[1] for s in sources)
        self.weights[name] = WeightSpec(name, "vector", size, 1, names, layout, transform, (), role, shapes)
        return name

    def rope(self, spec: RopeSpec) -> int:
        """Index of a rotation, shared by the layers that use it."""
        if spec not in self.ropes:
            self.ropes.append(spec)
        return self.ropes.index(spec)

    def layer(self, kv_heads: int, head_dim: int, window: int) -> int:
        """Declare the state of the next attention layer and return its index."""
        self.kv_heads.append(kv_heads)
        self.head_dims.append(head_dim)
        self.windows.append(window)
        return len(self.kv_heads) - 1

    def build(self) -> Plan:
        """The finished plan."""
        return Plan(
            version=PLAN_VERSION,
            family=self.family,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            layers=len(self.kv_heads),
            kv_heads=tuple(self.kv_heads),
            head_dims=tuple(self.head_dims),
            windows=tuple(self.windows),
            max_context=self.max_context,
            buffers=dict(self.buffers),
            ops=tuple(self.ops),
            weights=dict(self.weights),
            ropes=tuple(self.ropes),
        )
