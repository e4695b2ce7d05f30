"""Where a run computes, and in which precision. Weights are float32 everywhere; `bf16` is autocast's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from haomiao.errors import UnavailableError
from haomiao.measure.machine import default_threads


def take_device(name: str, threads: int | None) -> torch.device:
    """The device that `name` means (`auto`: a GPU where there is one). Raises `UnavailableError`."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("device cuda: PyTorch finds no GPU here (or is a build without CUDA)", param="device")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        torch.backends.cuda.matmul.allow_tf32 = True
        return torch.device("cuda")
    torch.set_num_threads(threads or default_threads())
    return torch.device("cpu")


def precise(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context in which a forward pass runs."""
    context: AbstractContextManager[object] = nullcontext()
    if precision == "bf16":
        context = torch.autocast(device.type, dtype=torch.bfloat16)
    return context
