"""Rotation of the residual stream (QuaRot, Ashkboos et al. 2404.00456; SpinQuant 2405.16406, R1 and R2), folded.

x' = x Q with Q orthogonal changes nothing that an RMS-normed decoder computes, once the norms' weights are folded into
the matrices behind them, and spreads outliers over all channels. Q is a Hadamard matrix with random signs, or its
Kronecker product with a small cosine transform where the size is not a power of two. The value channels of each head
are rotated likewise against the output projection. All of it is folded into the weights: nothing is added at run time.
A tied head needs a matrix of its own, since the final norm's weight goes into it and not into the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from haomiao.compress.solver import F64
from haomiao.errors import UnsupportedModelError
from haomiao.kernels.packed import PackedTensor
from haomiao.kernels.rtn import quantize_int8, quantize_planes
from haomiao.models import plan as ops
from haomiao.models.encode import Encoder
from haomiao.models.plan import WeightSpec
from haomiao.models.registry import plan_for
from haomiao.types import F32

SEED = 20240400
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def orthogonal(size: int, seed: int = SEED) -> F64:
    """Hadamard of the largest power of two in `size`, times a cosine transform of the rest, columns' signs random."""
    from scipy.fft import dct
    from scipy.linalg import hadamard

    power = size & -size
    matrix = hadamard(power) / np.sqrt(power)
    if size != power:
        matrix = np.kron(matrix, dct(np.eye(size // power), norm="ortho", axis=0))
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size)
    rotated: F64 = matrix * signs[:, None]
    return rotated


class Rotation:
    """What becomes of a checkpoint's weights. `config` is the rotated model's; `names` gains the head of its own.

    Raises `UnsupportedModelError` for models that are not rotation invariant: layer norms, norms behind a layer,
    learned positions.
    """

    def __init__(self, config: Mapping[str, Any], names: dict[str, str]) -> None:
        original = plan_for(config)
        self.config = {**config, "tie_word_embeddings": False}
        names.setdefault(HEAD, names.get(EMBEDDING, ""))
        self.plan = plan_for(self.config)
        self._names = names
        self._norm_of: dict[str, str] = {}  # matrix -> the norm whose weight it takes in
        self._joins: set[str] = set()  # matrices and biases whose output joins the residual
        self._values: dict[str, tuple[int, int, int]] = {}  # matrix or bias -> (first row, heads, head_dim)
        self._mixed: dict[str, tuple[int, int]] = {}  # matrix -> (heads, head_dim) of its columns
        self._read(original.family)
        self._turn = orthogonal(self.plan.hidden_size).astype(np.float32)
        self._norms: dict[str, F32] = {}
        self._heads = {dim: orthogonal(dim, SEED + 1).astype(np.float32) for dim in set(self.plan.head_dims)}

    def _read(self, family: str) -> None:
        """Where every matrix stands: before the residual, behind it, behind attention."""
        norms: dict[str, str] = {}
        made_by: dict[str, ops.Linear | ops.Attention] = {}
        for op in self.plan.ops:
            match op:
                case ops.Embed() if op.positions is not None:
                    raise UnsupportedModelError(f"{family}: learned positions cannot be rotated")
                case ops.Norm():
                    if op.kind != "rms" or op.source != "x":
                        raise UnsupportedModelError(f"{family}: only RMS norms before each layer can be rotated")
                    norms[op.out] = op.weight
                case ops.Linear():
                    if op.source in norms:
                        self._norm_of[op.weight] = norms[op.source]
                    behind = made_by.get(op.source)
                    if isinstance(behind, ops.Attention):
                        self._mixed[op.weight] = (behind.heads, behind.head_dim)
                    made_by[op.out] = op
                case ops.Attention():
                    linear = made_by[op.qkv]
                    assert isinstance(linear, ops.Linear)  # the plan's builder makes it so
                    for name in (linear.weight, linear.bias):
                        if name is not None:
                            self._values[name] = (op.v_offset, op.kv_heads, op.head_dim)
                    made_by[op.out] = op
                case ops.Add():
                    linear = made_by[op.source]
                    assert isinstance(linear, ops.Linear)
                    self._joins |= {name for name in (linear.weight, linear.bias) if name is not None}
                case ops.Head():
                    self._norm_of[op.weight] = norms[op.source]

    def matrix(self, spec: WeightSpec, values: F32) -> F32:
        """A matrix [rows, cols] of the rotated model from the checkpoint's."""
        out: Any = values
        if spec.name in self._norm_of:
            out = (out * self._norms[self._norm_of[spec.name]]) @ self._turn
        if spec.name in self._values:
            out = self._turn_values(spec.name, out.copy() if out is values else out)
        if spec.name in self._mixed:
            heads, dim = self._mixed[spec.name]
            out = (out.reshape(-1, heads, dim) @ self._heads[dim]).reshape(out.shape)
        if spec.name in self._joins:
            out = self._turn.T @ out
        return np.ascontiguousarray(out, np.float32)

    def vector(self, spec: WeightSpec, values: F32) -> F32:
        """A norm's weight (which becomes 1, and is remembered) or a bias."""
        if spec.name in set(self._norm_of.values()):
            self._norms[spec.name] = values
            return np.ones_like(values)
        if spec.name in self._values:
            return self._turn_values(spec.name, values[:, None].copy())[:, 0]
        if spec.name in self._joins:
            return np.ascontiguousarray(values @ self._turn)
        return values

    def learn(self, encoder: Encoder) -> None:
        """Read the norms' weights ahead: matrices need them."""
        for name in set(self._norm_of.values()):
            self._norms[name] = encoder.vector(self.plan.weights[name])

    def table(self, spec: WeightSpec, encoder: Encoder, group: int) -> PackedTensor:
        """The embedding (int8) or the head (both planes), rounded to nearest."""
        values = encoder.weights(spec)
        if spec.role == "embedding":
            return quantize_int8(values @ self._turn, group)
        return quantize_planes(self.matrix(spec, values), group, within_int8=True)

    def _turn_values(self, name: str, values: F32) -> F32:
        first, heads, dim = self._values[name]
        part = values[first : first + heads * dim].reshape(heads, dim, -1)
        values[first : first + heads * dim] = (self._heads[dim].T @ part).reshape(heads * dim, -1)
        return values
