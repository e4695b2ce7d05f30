"""Low-rank adaptation (Hu et al., arXiv:2106.09685): W + (alpha / rank) B A, with W of the layers fixed.

A is random and B zero, so that a run begins with the model as it is. `merged` gives whole matrices: what is written
after training is an ordinary model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from haomiao.models.plan import Plan


class Lora:
    """The adapters of a plan's body matrices; `weights` are what is trained, by `matrix/a` and `matrix/b`."""

    def __init__(self, plan: Plan, base: Mapping[str, Tensor], rank: int, alpha: float, seed: int) -> None:
        self._base = base
        self._scale = alpha / rank
        self.names = [s.name for s in plan.weights.values() if s.kind == "matrix" and s.role == "body"]
        self.weights: dict[str, Tensor] = {}
        random = torch.Generator().manual_seed(seed)
        for name in self.names:
            rows, cols = base[name].shape
            values = torch.randn(rank, cols, generator=random) * cols**-0.5
            self.weights[f"{name}/a"] = values.to(base[name].device).requires_grad_()
            self.weights[f"{name}/b"] = torch.zeros(rows, rank, device=base[name].device).requires_grad_()

    def merged(self) -> dict[str, Tensor]:
        """The model's weights with the adapters in them, with gradients into the adapters."""
        whole = dict(self._base)
        for name in self.names:
            whole[name] = self._base[name] + self._scale * (self.weights[f"{name}/b"] @ self.weights[f"{name}/a"])
        return whole
