"""A larger model that begins as a smaller one: the same function at first, with room to learn more.

New layers are copies of the one before whose outputs are zero (progressive stacking, Gong et al., ICML 2019, made
function-preserving as in Net2Net, arXiv:1511.05641); new neurons are random with outputs of zero. Their rows are as
large as those that are there: at the size of a new model's, a fifth of it, they learnt hardly anything (docs/LOG.md,
"Compression: the table of haomiao-tiny"). Width, heads and vocabulary stay. Knows names of checkpoints, nothing about
training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from haomiao.errors import InputError
from haomiao.load.source import QuantizedTensor, TensorSource
from haomiao.types import F32

LAYER = re.compile(r"^(model\.layers\.)(\d+)(\..+)$")
GROWS = ("num_hidden_layers", "intermediate_size", "max_position_embeddings")
"""Keys of a config in which the larger model may differ."""
OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")


class Grown:
    """A `TensorSource` of the larger model `config` over a smaller one. Raises `InputError` for anything else."""

    def __init__(self, source: TensorSource, config: Mapping[str, Any], seed: int) -> None:
        self._source, self._seed = source, seed
        self.name: str = source.name
        self.files: Mapping[str, Path | bytes] = source.files
        self.identity: str = source.identity
        self.config: Mapping[str, Any] = dict(config)
        compared = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
        for key in compared:
            if config.get(key) != source.config.get(key):
                raise InputError(
                    f"{source.name} has {key} {source.config.get(key)}, the config {config.get(key)}: "
                    f"only {', '.join(GROWS)} may differ",
                    param="start",
                )
        self._old, self._new = int(source.config["num_hidden_layers"]), int(config["num_hidden_layers"])
        self._ffn, self._old_ffn = int(config["intermediate_size"]), int(source.config["intermediate_size"])
        if self._new < self._old or self._ffn < self._old_ffn:
            raise InputError(f"{source.name} is larger than the config: a model can only grow", param="start")
        self.origins = origins(self._old, self._new)

    def names(self) -> Sequence[str]:
        """Names of the larger model."""
        rest = [name for name in self._source.names() if not LAYER.match(name)]
        first = [m[3] for name in self._source.names() if (m := LAYER.match(name)) and m[2] == "0"]
        return [*rest, *(f"model.layers.{layer}{tail}" for layer in range(self._new) for tail in first)]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in the larger model."""
        shape = self._source.shape(self._origin(name)[0])
        if ".mlp.down_proj." in name and len(shape) == 2:
            return shape[0], self._ffn
        if ".mlp.gate_proj." in name or ".mlp.up_proj." in name:
            return self._ffn, *shape[1:]
        return shape

    def dtype(self, name: str) -> str:
        """Floats, whatever the smaller model holds."""
        return "f32"

    def read(self, name: str) -> F32:
        """The smaller model's weights where it has some, else what keeps the function."""
        origin, copied = self._origin(name)
        old, shape = self._source.read(origin), self.shape(name)
        if copied and any(part in name for part in OUTPUTS):
            return np.zeros(shape, np.float32)
        if old.shape == shape:
            return old
        grown = np.zeros(shape, np.float32)
        if ".mlp.down_proj." not in name and len(shape) == 2:
            random = np.random.Generator(np.random.Philox([self._seed, sum(name.encode())]))
            grown[:] = random.normal(0, float(old.std()), shape)
        grown[tuple(slice(0, size) for size in old.shape)] = old
        return grown

    def quantized(self, name: str) -> QuantizedTensor | None:
        """Codes are not kept: they are about to be trained."""
        return None

    def close(self) -> None:
        """Close the smaller model."""
        self._source.close()

    def _origin(self, name: str) -> tuple[str, bool]:
        """The smaller model's name for a weight, and whether its layer is a copy."""
        match = LAYER.match(name)
        if match is None:
            return name, False
        layer, copied = self.origins[int(match[2])]
        return f"{match[1]}{layer}{match[3]}", copied


def origins(old: int, new: int) -> list[tuple[int, bool]]:
    """For each layer of the larger model the smaller one's layer, and whether it is an additional copy of it: copies
    are spread evenly and stand behind their originals."""
    copies = [(layer + 1) * (new - old) // old - layer * (new - old) // old for layer in range(old)]
    return [(layer, copy > 0) for layer in range(old) for copy in range(copies[layer] + 1)]
