"""`TorchExecutor`: implements `types.Executor` with PyTorch, on the CPU or on CUDA.

Checks what it is given, keeps the model on the device, and leaves a step to `slow` (twins, any device) or to `fast`
(Triton kernels and CUDA graphs). Knows neither's operations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from haomiao.engine.executors.reference import check_batch
from haomiao.engine.executors.torch import device as devices
from haomiao.engine.executors.torch.model import load
from haomiao.engine.executors.torch.slow import run_slowly
from haomiao.errors import InputError, UnavailableError, UnsupportedModelError
from haomiao.kernels.packed import PackedTensor
from haomiao.models import plan as ops
from haomiao.models.weights import check_encodings, check_weights
from haomiao.types import F32, I32, POINTS, KvType, StepBatch, StepResult

if TYPE_CHECKING:
    from haomiao.engine.executors.torch.fast import FastRunner
    from haomiao.engine.executors.torch.model import DeviceModel


class TorchExecutor:
    """Implements `types.Executor` in PyTorch.

    `tensors` and `vectors` are an artifact's, by the plan's weight names; `points` must be switchable (one family), and
    `int4-w` is among those that nested planes can run at. `fast` (default: on CUDA) takes Triton's kernels; without it
    every operation is its twin. Raises `ModelError`, `UnsupportedModelError`, `InputError` as the other executors do,
    and `UnavailableError` if the device, or memory on it, is not there.
    """

    draws = True
    """Rows that `StepBatch.draws` names are drawn on the device."""

    def __init__(
        self,
        plan: ops.Plan,
        tensors: Mapping[str, PackedTensor],
        vectors: Mapping[str, F32],
        *,
        points: Sequence[str],
        kv_type: KvType | None = None,
        kv_blocks: int = 64,
        max_step_tokens: int = 512,
        device: devices.DeviceName = "cpu",
        fast: bool | None = None,
    ) -> None:
        check_points(points)
        if plan.version != ops.PLAN_VERSION:
            raise UnsupportedModelError(f"a plan of version {plan.version} was given; {ops.PLAN_VERSION} is understood")
        check_weights(plan, tensors, vectors)
        check_encodings(plan, tensors, points)
        placed = devices.open_device(device)
        kept: KvType = kv_type or POINTS[points[0]].default_kv
        try:
            model = load(plan, tensors, vectors, device=placed, kv_type=kept, kv_blocks=kv_blocks)
        except torch.OutOfMemoryError:
            raise UnavailableError(
                "the GPU's memory does not hold the weights and the KV blocks; lower kv_blocks"
            ) from None
        self._begin(model, points, max_step_tokens, device == "cuda" if fast is None else fast, device == "cuda")

    @classmethod
    def of_model(
        cls,
        model: DeviceModel,
        *,
        points: Sequence[str],
        max_step_tokens: int = 512,
        fast: bool = True,
        ahead: bool = False,
    ) -> TorchExecutor:
        """An executor of a model that lies on the device already (benchmarks make random weights there). `ahead`:
        kernels are compiled and graphs captured now, not when they are first needed."""
        check_points(points)
        self = cls.__new__(cls)
        self._begin(model, points, max_step_tokens, fast, ahead)
        return self

    def _begin(self, model: DeviceModel, points: Sequence[str], max_step_tokens: int, fast: bool, ahead: bool) -> None:
        self.plan = model.plan
        self.points = tuple(points)
        self.vocab_size = model.plan.vocab_size
        self.hidden_size = model.plan.hidden_size
        self.max_context = model.plan.max_context
        self.max_step_tokens = max_step_tokens
        self.kv_blocks = model.kv_blocks
        self.kv_type: KvType = model.kv_type
        self.kv_bytes_per_block = model.kv_bytes_per_block
        self.threads = 1
        self.isa = devices.label(model.device)
        self._model: DeviceModel | None = model
        self._fast: FastRunner | None = None
        if fast:
            if model.device.type == "cpu" and not devices.interpreted():
                raise InputError("fast kernels run on a CPU only in Triton's interpreter", param="fast")
            devices.need_triton()
            from haomiao.engine.executors.torch.fast import FastRunner

            self._fast = FastRunner(model, self.points, max_step_tokens)
            if ahead:
                self._fast.prepare()

    def step(self, batch: StepBatch) -> StepResult:
        """Compute one step. `logits` is a view that the next step overwrites; of greedy and drawn rows it may hold
        anything."""
        began = time.monotonic_ns()
        model = self._open()
        check_batch(batch, self)
        check_draws(batch)
        drawn: I32 | None
        if self._fast is not None:
            logits, argmax, drawn, hidden = self._fast.step(batch)
        else:
            with torch.inference_mode():
                found, places, tokens, states = run_slowly(model, batch)
            logits, argmax = found.cpu().numpy(), places.cpu().numpy().astype(np.int32)
            drawn = None if tokens is None else tokens.cpu().numpy()
            hidden = None if states is None else states.cpu().numpy()
        return StepResult(logits, argmax, time.monotonic_ns() - began, hidden, drawn)

    def copy_blocks(self, pairs: I32) -> None:
        """Copy KV blocks of every layer: [n, 2] (from, to), in order."""
        model = self._open()
        pairs = np.asarray(pairs)
        if pairs.ndim != 2 or pairs.shape[1] != 2 or (pairs < 0).any() or (pairs >= self.kv_blocks).any():
            raise InputError(f"pairs must be [n, 2] block ids below {self.kv_blocks}")
        with torch.inference_mode():
            model.copy_blocks([(int(source), int(target)) for source, target in pairs])

    def replay_of(self, batch: StepBatch) -> Callable[[], None] | None:
        """What replays the CUDA graph of such a step, for timing it on the device; None if there is none."""
        return None if self._fast is None else self._fast.replay_of(batch)

    def close(self) -> None:
        """Release the device's memory; idempotent."""
        self._fast = None
        self._model = None

    def _open(self) -> DeviceModel:
        if self._model is None:
            raise InputError("the executor is closed")
        return self._model


def check_draws(batch: StepBatch) -> None:
    """Raises `InputError` unless every row has its numbers."""
    draws, shape = batch.draws, batch.logit_rows.shape
    if draws is None:
        return
    for name in ("temperature", "top_k", "top_p", "min_p", "uniform"):
        if getattr(draws, name).shape != shape:
            raise InputError(f"draws must have one {name} for every row", param="draws")


def check_points(points: Sequence[str]) -> None:
    """Raises `InputError` unless the points exist and are switchable."""
    for name in points:
        if name not in POINTS:
            raise InputError(f"point must be one of {', '.join(POINTS)}, not {name!r:.40}", param="point")
    if len({POINTS[name].family for name in points}) != 1:
        raise InputError(f"points must be switchable, one family: {', '.join(points) or 'none given'}", param="points")
