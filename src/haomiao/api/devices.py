"""Which executor runs a model, and where: `--device` and `--executor` made into one.

torch is imported only if a device or an executor that needs it was asked for. Knows models and executors; not engines.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from haomiao.errors import InputError, UnavailableError
from haomiao.types import POINTS, Executor, KvType

if TYPE_CHECKING:
    from haomiao.models.open import OpenedModel

EXECUTORS = ("native", "reference", "torch")
DEVICES = ("cpu", "cuda", "auto")
MAX_STEP_TOKENS = 512
GPU_NODES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")
"""What a machine with an NVIDIA driver has (the last one under WSL): `auto` looks here before it imports torch."""
KV_SHARE = 0.8
"""Of the GPU's memory that is free beside the weights, what K and V may take."""
WIDE = {"int4-w": "int4"}
"""Points of the torch executor alone, and the point whose conversion they read."""


@dataclass(frozen=True, slots=True)
class Placement:
    """What was decided."""

    executor: Literal["native", "reference", "torch"]
    device: Literal["cpu", "cuda"]

    @property
    def name(self) -> str:
        """Changes with whatever a step's time depends on."""
        return self.executor if self.device == "cpu" else f"{self.executor}-{self.device}"


def place(executor: str | None, device: str | None) -> Placement:
    """Executor and device by name. None: the native one, or what the device needs. Raises `InputError` for names and
    pairs that do not exist, `UnavailableError` in one line for what is missing."""
    if executor is not None and executor not in EXECUTORS:
        raise InputError(f"executor must be {', '.join(EXECUTORS)}, not {executor!r:.40}", param="executor")
    if device is not None and device not in DEVICES:
        raise InputError(f"device must be {', '.join(DEVICES)}, not {device!r:.40}", param="device")
    if device == "auto":
        device = "cuda" if executor in (None, "torch") and _has_gpu() else "cpu"
    if device == "cuda":
        if executor not in (None, "torch"):
            raise InputError(f"executor {executor} runs on the CPU; device cuda needs torch", param="executor")
        _devices("--device cuda").open_device("cuda")
        return Placement("torch", "cuda")
    if executor == "torch":
        _devices("--executor torch")
    chosen: Any = executor or "native"
    return Placement(chosen, "cpu")


def opening_point(placement: Placement, point: str | None) -> str | None:
    """The point that a model is opened at for `point`. Raises `InputError` for one that the executor does not have."""
    if point not in WIDE:
        return point
    if placement.executor == "native":
        raise InputError(f"point {point} needs --device cuda (or --executor torch)", param="point")
    return WIDE[point]


def on_device(placement: Placement, opened: OpenedModel, point: str | None) -> OpenedModel:
    """The opened model with the points that this executor adds, at `point` if that is one of them."""
    if placement.executor == "native" or (placement.executor == "reference" and point not in WIDE):
        return opened
    added = [wide for wide, read in WIDE.items() if read in opened.points]
    points = tuple(sorted({*opened.points, *added}, key=list(POINTS).index))
    return replace(opened, points=points, default_point=point if point in WIDE else opened.default_point)


def kv_memory_on(placement: Placement, opened: OpenedModel, kv_memory: int | None) -> int | None:
    """Bytes for K and V: as given, else what the device's memory leaves; None leaves it to the machine's memory."""
    if placement.device == "cpu" or kv_memory is not None:
        return kv_memory
    import_ = _devices("--device cuda")
    weights = sum(tensor.nbytes for tensor in opened.artifact.tensors.values())
    left = int(import_.free_memory() - weights * 1.05)
    if left < (64 << 20):
        raise UnavailableError(f"the GPU's free memory does not hold {weights >> 20} MiB of weights", param="device")
    return int(left * KV_SHARE)


def make_executor(
    placement: Placement, opened: OpenedModel, kv: KvType, blocks: int, threads: int | None, isa: str | None
) -> Executor:
    """The executor. Raises `UnavailableError` if what it needs is not there."""
    artifact = opened.artifact
    common: dict[str, Any] = {
        "points": opened.points,
        "kv_type": kv,
        "kv_blocks": blocks,
        "max_step_tokens": min(MAX_STEP_TOKENS, opened.plan.max_context),
    }
    weights = (opened.plan, artifact.tensors, artifact.vectors)
    if placement.executor == "reference":
        from haomiao.engine.executors.reference import ReferenceExecutor

        return ReferenceExecutor(*weights, **common)
    if placement.executor == "torch":
        from haomiao.engine.executors.torch.executor import TorchExecutor

        return TorchExecutor(*weights, **common, device=placement.device)
    from haomiao.config import threads_from_environment

    if threads is None:
        threads = threads_from_environment()
    elif type(threads) is not int or threads < 1:
        raise InputError(f"threads must be a positive number, not {threads!r:.40}", param="threads")
    try:
        from haomiao.engine.executors.native import NativeExecutor
    except ImportError as error:
        raise UnavailableError(f"the compiled core cannot be loaded: {error}") from error
    return NativeExecutor(*weights, **common, threads=threads, isa=isa)


def _devices(asked: str) -> Any:
    """The module that knows torch's devices."""
    try:
        from haomiao.engine.executors.torch import device
    except ImportError as error:
        raise UnavailableError(
            f"{asked} needs PyTorch: pip install 'haomiao[torch]' ({error})", param="device"
        ) from None
    return device


def _has_gpu() -> bool:
    """Whether `--device auto` finds a GPU that can be used. What is missing is then nobody's error."""
    if not any(Path(node).exists() for node in GPU_NODES):
        return False
    try:
        _devices("--device auto").open_device("cuda")
    except UnavailableError:
        return False
    return True
