"""What a checkpoint looks like to the rest: Hugging Face names, Hugging Face config terms, whatever the file was.

Readers (`safetensors`, `gguf`, quantized checkpoints) implement `TensorSource`; `models.convert` consumes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from haomiao.types import F32


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A matrix stored in integer codes: w[r, c] = scales[r, c // group] * codes[r, c]. Offsets are already applied."""

    codes: npt.NDArray[np.int8]  # [rows, cols]
    scales: F32  # [rows, cols / group], each exactly representable in float16
    group: int
    bits: int
    """4: codes in [-8, 7], an exact hi plane. 5: in [-15, 15] (4 bits with zero-points). 8: in [-128, 127]."""


class TensorSource(Protocol):
    """A checkpoint. Reading is lazy: nothing is allocated beyond the tensor asked for."""

    name: str
    """Human name, for progress and provenance."""
    config: Mapping[str, Any]
    """config.json in Hugging Face terms (GGUF metadata are translated to it); `generation_config` nested in it."""
    files: Mapping[str, Path | bytes]
    """Text files to carry along: tokenizer.json, tokenizer.model, tokenizer_config.json, generation_config.json,
    chat_template.jinja, or `tokenizer.gguf` (the GGUF file itself, whose metadata hold the tokenizer)."""
    identity: str
    """What the cache key hashes: changes whenever the checkpoint does."""

    def names(self) -> Sequence[str]:
        """Names in Hugging Face's manner (`model.layers.0.self_attn.q_proj.weight`)."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str:
        """`f32`, `f16`, `bf16`, or the quantized type's own name (`q4_0`, `gptq-int4`, ...)."""
        ...

    def read(self, name: str) -> F32:
        """The tensor as float32 in Hugging Face's orientation, dequantized if need be. Raises `ModelError`."""
        ...

    def quantized(self, name: str) -> QuantizedTensor | None:
        """The tensor's own codes where they can be kept exactly, else None."""
        ...

    def close(self) -> None: ...
