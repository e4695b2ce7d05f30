"""Tiny random checkpoints that anyone can make again, bit for bit, without torch.

Every tensor is drawn from its own Philox stream, keyed by the seed and the tensor's name; raw 64-bit words become
uniform float32 numbers by exact arithmetic, so no numpy version changes them. Names and shapes are those that the plan
asks for; `make_goldens.py` checks that transformers asks for the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from haomiao.load.source import QuantizedTensor
from haomiao.models.plan import WeightSpec
from haomiao.models.registry import plan_for
from haomiao.types import F32
from tests.golden.cases import Case

GAIN = 1.3
"""Standard deviation of what a matrix makes of a normalized input: enough for attention and logits with contrast."""


def uniform(name: str, seed: int, shape: tuple[int, ...], deviation: float) -> F32:
    """Uniform numbers with mean 0 and the given standard deviation."""
    raw = np.random.Philox(key=(seed << 32) | zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    centred = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    return (centred * np.float32(deviation * 3.0**0.5)).reshape(shape)


def tensor(spec: WeightSpec, index: int, seed: int) -> F32:
    """One source of a weight."""
    name, shape = spec.sources[index], spec.shapes[index]
    if spec.role == "norm":
        least = 0.0 if spec.transform == "plus_one" else 1.0
        # Gemma: with post norms near one the scaled embedding drowns the layers, and every token predicts itself
        louder = 1.5 if spec.transform == "plus_one" and "post_" in name else 0.0
        return uniform(name, seed, shape, 0.2) + np.float32(least + louder)
    if spec.role == "bias":
        return uniform(name, seed, shape, 0.2)
    if spec.role == "embedding":
        return uniform(name, seed, shape, 1.0)
    return uniform(name, seed, shape, GAIN / float(np.sqrt(spec.cols)))


def random_checkpoint(config: Mapping[str, Any], seed: int) -> dict[str, F32]:
    """All tensors of the checkpoint that a config describes."""
    tensors: dict[str, F32] = {}
    for spec in plan_for(config).weights.values():
        for index, name in enumerate(spec.sources):
            if name not in tensors:
                tensors[name] = tensor(spec, index, seed)
    return tensors


def tokens_of(case: Case, count: int = 72) -> list[int]:
    """A fixed token sequence."""
    raw = np.random.Philox(key=zlib.crc32(case.name.encode())).random_raw(count)
    return [int(token) for token in raw % np.uint64(case.config["vocab_size"])]


class DictSource:
    """A `TensorSource` over arrays in memory."""

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, F32],
        *,
        dtypes: Mapping[str, str] | None = None,
        codes: Mapping[str, QuantizedTensor] | None = None,
        files: Mapping[str, Path | bytes] | None = None,
    ) -> None:
        self.name, self.identity = "tiny", "in memory"
        self.config: Mapping[str, Any] = config
        self.files: Mapping[str, Path | bytes] = files or {}
        self._tensors, self._dtypes, self._codes = tensors, dtypes or {}, codes or {}

    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        return self._dtypes.get(name, "f32")

    def read(self, name: str) -> F32:
        return self._tensors[name]

    def quantized(self, name: str) -> QuantizedTensor | None:
        return self._codes.get(name)

    def close(self) -> None:
        pass
