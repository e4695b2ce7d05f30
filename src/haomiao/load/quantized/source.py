"""A quantized checkpoint as a `TensorSource`: its layers appear as `weight`s, dequantized or as exact codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from haomiao.errors import ModelError, UnsupportedModelError
from haomiao.load.checkpoint import Checkpoint
from haomiao.load.quantized.awq import Awq
from haomiao.load.quantized.codes import Format
from haomiao.load.quantized.compressed_tensors import CompressedTensors
from haomiao.load.quantized.gptq import Gptq
from haomiao.load.source import QuantizedTensor, TensorSource
from haomiao.types import F32


def with_quantization(checkpoint: Checkpoint) -> TensorSource:
    """The checkpoint itself, or a reader of its quantized layers if its config declares some.

    Raises `UnsupportedModelError` for methods that are not read, by name.
    """
    settings = checkpoint.config.get("quantization_config", checkpoint.config.get("compression_config"))
    if settings is None:
        return checkpoint
    if not isinstance(settings, dict):
        raise ModelError(f"{checkpoint.directory}: quantization_config must be an object")
    method = settings.get("quant_method", "")
    if method == "gptq":
        return QuantizedCheckpoint(checkpoint, Gptq(checkpoint, settings))
    if method == "awq":
        return QuantizedCheckpoint(checkpoint, Awq(checkpoint, settings))
    if method == "compressed-tensors":
        return QuantizedCheckpoint(checkpoint, CompressedTensors(checkpoint, settings))
    raise UnsupportedModelError(
        f"{checkpoint.directory}: quantization '{str(method)[:64]}' is not supported"
        " (compressed-tensors, gptq and awq are)"
    )


class QuantizedCheckpoint:
    """`Checkpoint` with the quantized layers of one `Format` put in place of their parts."""

    def __init__(self, checkpoint: Checkpoint, scheme: Format) -> None:
        self._checkpoint = checkpoint
        self._format = scheme
        self.name = checkpoint.name
        self.config: Mapping[str, Any] = checkpoint.config
        self.files: Mapping[str, Path | bytes] = checkpoint.files
        self.identity = checkpoint.identity
        stored = checkpoint.names()
        prefixes = [name.removesuffix(scheme.marker) for name in stored if name.endswith(scheme.marker)]
        self._prefixes = {f"{prefix}.weight": prefix for prefix in prefixes}
        hidden = {prefix + part for prefix in prefixes for part in scheme.parts}
        self._plain = [name for name in stored if name not in hidden]
        for name, prefix in self._prefixes.items():
            if name in self._plain:
                raise ModelError(f"{checkpoint.directory}: '{name}' is stored both plainly and quantized")
            scheme.shape(prefix)  # the parts are there and their shapes make sense

    def names(self) -> Sequence[str]:
        """Names in Hugging Face's manner: the plain tensors, then the quantized ones."""
        return [*self._plain, *self._prefixes]

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, [rows, cols] for a quantized layer."""
        prefix = self._prefixes.get(name)
        return self._checkpoint.shape(name) if prefix is None else self._format.shape(prefix)

    def dtype(self, name: str) -> str:
        """As stored: `f16`, or `gptq-int4`, `awq-int4`, `compressed-tensors-int8`."""
        prefix = self._prefixes.get(name)
        if prefix is None:
            return self._checkpoint.dtype(name)
        return f"{self._format.name}-int{self._format.bits(prefix)}"

    def read(self, name: str) -> F32:
        """The tensor as float32, dequantized if need be."""
        prefix = self._prefixes.get(name)
        return self._checkpoint.read(name) if prefix is None else self._format.unpack(prefix).dequantize()

    def quantized(self, name: str) -> QuantizedTensor | None:
        """The layer's own codes where they can be kept exactly, else None."""
        prefix = self._prefixes.get(name)
        return None if prefix is None else self._format.unpack(prefix).exact()

    def close(self) -> None:
        """Let go of the mapped files; idempotent."""
        self._checkpoint.close()
