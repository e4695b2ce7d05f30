"""Quantized Hugging Face checkpoints as `TensorSource`s."""

from __future__ import annotations

from haomiao.errors import UnsupportedModelError
from haomiao.load.checkpoint import Checkpoint
from haomiao.load.source import TensorSource


def with_quantization(checkpoint: Checkpoint) -> TensorSource:
    """The checkpoint itself, or a reader of its quantized weights if its config has `quantization_config`."""
    if checkpoint.config.get("quantization_config"):
        raise UnsupportedModelError(f"{checkpoint.directory}: quantized checkpoints are not read yet")
    return checkpoint
