"""Which device there is, and in one line what is missing. Knows nothing about models."""

from __future__ import annotations

import os
from typing import Literal

import torch

from haomiao.errors import UnavailableError

DeviceName = Literal["cpu", "cuda"]
LEAST_CAPABILITY = (8, 0)
"""bfloat16 in tensor cores: Ampere and later."""


def open_device(name: DeviceName) -> torch.device:
    """The device of that name. Raises `UnavailableError` that says what is missing."""
    if name == "cpu":
        return torch.device("cpu")
    if torch.version.cuda is None:
        raise UnavailableError(
            f"--device cuda: PyTorch {torch.__version__} was built without CUDA; install a CUDA build", param="device"
        )
    if not torch.cuda.is_available():
        raise UnavailableError(
            "--device cuda: PyTorch finds no NVIDIA GPU; is a driver installed, and is CUDA_VISIBLE_DEVICES right?",
            param="device",
        )
    found = torch.cuda.get_device_capability()
    if found < LEAST_CAPABILITY:
        raise UnavailableError(
            f"--device cuda: {torch.cuda.get_device_name()} has compute capability {found[0]}.{found[1]}; "
            f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or more is needed",
            param="device",
        )
    need_triton()
    return torch.device("cuda", torch.cuda.current_device())


def need_triton() -> None:
    """Raises `UnavailableError` unless Triton can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        raise UnavailableError("--device cuda: Triton is not installed; pip install triton", param="device") from None


def interpreted() -> bool:
    """True if Triton kernels run in its interpreter, on the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def label(device: torch.device) -> str:
    """What receipts and calibrations call the device."""
    if device.type == "cpu":
        return "torch"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor} {torch.cuda.get_device_name(device)}"


def free_memory() -> int:
    """Bytes of the GPU's memory that nobody uses."""
    free, _ = torch.cuda.mem_get_info()
    return int(free)
