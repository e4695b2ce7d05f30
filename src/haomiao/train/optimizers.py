"""Which weights are moved how: AdamW for all, or Muon for the matrices of the layers and AdamW for the rest.

Muon (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024): the momentum of a matrix is made
orthogonal by five Newton-Schulz steps. Scaled by 0.2 sqrt(max(rows, cols)) its update has the size of AdamW's (Liu et
al., "Muon is scalable for LLM training", arXiv:2502.16982, section 2.2), so that both take the same rate and decay.
`torch.optim.Muon` computes in bf16, which AVX2 machines do ten times slower than f32: here it is f32 on a CPU.
Knows nothing about models, text or time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from haomiao.errors import ModelError
from haomiao.models.plan import Plan

BETAS = (0.9, 0.95)
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
STEPS = 5


class Optimizer:
    """Moves `weights` in place along their gradients. The rate of a step is an argument."""

    def __init__(self, plan: Plan, weights: Mapping[str, Tensor], kind: str, rate: float, decay: float) -> None:
        self.rate = rate
        body = {s.name for s in plan.weights.values() if s.kind == "matrix" and s.role == "body"}
        self._matrices = {n: w for n, w in weights.items() if n in body and kind == "muon"}
        self._others = {n: w for n, w in weights.items() if n not in self._matrices}
        self._momenta: dict[str, Tensor] = {}
        self._decay = decay
        decayed = [w for w in self._others.values() if w.ndim > 1]
        free = [w for w in self._others.values() if w.ndim == 1]
        groups = [{"params": decayed, "weight_decay": decay}, {"params": free, "weight_decay": 0.0}]
        self._adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=BETAS, eps=1e-8)

    def step(self, share: float) -> None:
        """One update at `share` of the peak rate; gradients are dropped."""
        for group in self._adam.param_groups:
            group["lr"] = self.rate * share
        self._adam.step()
        alike = defaultdict(list)
        for name, weight in self._matrices.items():
            if weight.grad is not None:
                alike[weight.shape].append((name, weight, weight.grad))
        with torch.no_grad():
            for group in alike.values():
                self._move(group, self.rate * share)
        for weight in (*self._matrices.values(), *self._others.values()):
            weight.grad = None

    def _move(self, group: list[tuple[str, Tensor, Tensor]], rate: float) -> None:
        """Matrices of one shape together: a GPU takes as long to be told of a small product as to compute it."""
        ahead = []
        for name, weight, gradient in group:
            momentum = self._momenta.setdefault(name, torch.zeros_like(weight))
            momentum.lerp_(gradient, 1 - MOMENTUM)
            ahead.append(gradient.lerp(momentum, MOMENTUM))  # Nesterov's
        for (_, weight, _), update in zip(group, orthogonal(torch.stack(ahead)), strict=True):
            weight.mul_(1 - rate * self._decay)
            weight.add_(update, alpha=-rate * 0.2 * max(weight.shape) ** 0.5)

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's own state, by `weight/what`."""
        found = {f"{name}/momentum": momentum for name, momentum in self._momenta.items()}
        for name, weight in self._others.items():
            found |= {f"{name}/{what}": value for what, value in self._adam.state.get(weight, {}).items()}
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` returned. Raises `ModelError` if it belongs to other weights."""
        self._momenta.clear()
        self._adam.state.clear()
        for key, value in tensors.items():
            name, _, what = key.rpartition("/")
            weight = self._matrices.get(name, self._others.get(name))
            if weight is None or (what != "step" and value.shape != weight.shape):
                raise ModelError(f"the checkpoint's {key} does not fit this model")
            if name in self._matrices:
                self._momenta[name] = value.to(weight.device)
            else:  # AdamW counts its steps on the CPU
                self._adam.state[weight][what] = value if what == "step" else value.to(weight.device)


def orthogonal(matrices: Tensor) -> Tensor:
    """[matrices, rows, cols] -> about U Vᵀ of each one's singular vectors: singular values brought near one."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def clip(weights: Iterable[Tensor], most: float) -> Tensor:
    """Shorten all gradients together to length `most`; returns the length they had."""
    return torch.nn.utils.clip_grad_norm_(weights, most)
