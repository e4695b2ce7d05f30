"""Weights in a plan's own shapes: new ones, those of a checkpoint, and back into a Hugging Face directory.

Knows plans and safetensors, nothing about training. What is written holds the tokenizer's files of the source, so that
every command opens it.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haomiao.compress.export.compressed_tensors import check_target
from haomiao.compress.export.parts import rows_of
from haomiao.errors import ModelError, UnsupportedModelError
from haomiao.load.disk import disk_errors
from haomiao.load.source import TensorSource
from haomiao.models.convert import resolve
from haomiao.models.encode import Encoder
from haomiao.models.plan import Plan, WeightSpec

SHARD_BYTES = 14 << 20
"""Files of an exported checkpoint stay below 16 MiB where no single tensor is larger: they travel in parts."""


def new_weights(plan: Plan, seed: int, std: float = 0.02) -> dict[str, Tensor]:
    """Random weights for a plan: normal with deviation `std`, what writes into the residual by 1/sqrt(2 layers) less
    (GPT-2, section 2.3), norms one, biases zero. Neurons that pad a matrix are zero, and stay so: their gradient is."""
    made: dict[str, Tensor] = {}
    random = torch.Generator().manual_seed(seed)
    for spec in plan.weights.values():
        if spec.kind == "vector":
            made[spec.name] = torch.full((spec.rows,), 0.0 if spec.role == "bias" else 1.0)
            continue
        residual = spec.role == "body" and spec.name.endswith((".out", ".down"))
        values = torch.randn(spec.rows, spec.cols, generator=random)
        values *= std / math.sqrt(2 * plan.layers) if residual else std
        made[spec.name] = values * torch.from_numpy(real_places(spec))
    return made


def real_places(spec: WeightSpec) -> np.ndarray[Any, np.dtype[np.float32]]:
    """1 where a matrix [rows, cols] holds the checkpoint's numbers, 0 where it is padded."""
    mask = np.zeros((spec.rows, spec.cols), np.float32)
    shapes = dict(zip(spec.sources, spec.shapes, strict=True))
    for name, rows in rows_of(spec).items():
        mask[rows, : shapes[name][1]] = 1
    return mask


def read_weights(plan: Plan, source: TensorSource) -> dict[str, Tensor]:
    """The checkpoint's weights in float32, dequantized where they are in codes. Raises `ModelError`."""
    encoder = Encoder(source, resolve(plan, source), "full", 32, 4)
    found: dict[str, Tensor] = {}
    for spec in plan.weights.values():
        values = encoder.vector(spec) if spec.kind == "vector" else encoder.weights(spec)
        if not np.isfinite(values).all():
            raise ModelError(f"{source.name}: {spec.sources[0]} holds a NaN or an infinity")
        found[spec.name] = torch.from_numpy(np.array(values, np.float32))
    return found


def checkpoint_tensors(plan: Plan, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every weight under the checkpoint's own name. Raises `UnsupportedModelError` for families that transpose."""
    for spec in plan.weights.values():
        if spec.transform == "transpose":
            raise UnsupportedModelError(f"{plan.family} cannot be written yet: its checkpoints transpose weights")
        values = weights[spec.name].detach().to("cpu", torch.float32)
        if spec.transform == "plus_one":
            values = values - 1
        shapes = dict(zip(spec.sources, spec.shapes, strict=True))
        for name, rows in rows_of(spec).items():
            part, shape = values[torch.from_numpy(rows)], shapes[name]
            yield name, (part if len(shape) == 1 else part[:, : shape[1]]).to(dtype).contiguous()


def write_checkpoint(
    out: Path,
    plan: Plan,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    files: Mapping[str, Path | bytes],
    *,
    dtype: str = "bfloat16",
    overwrite: bool = False,
) -> Path:
    """Write a Hugging Face directory that our loaders and transformers open: whole under its name, or absent.

    `config` is its config.json, `files` the tokenizer's. Raises `InputError` if `out` holds something already,
    `UnavailableError` if the disk is full.
    """
    from safetensors.torch import save_file

    if not overwrite:
        check_target(out)
    parent = out.absolute().parent
    with disk_errors(out):
        parent.mkdir(parents=True, exist_ok=True)
    said = {k: v for k, v in config.items() if k not in ("generation_config", "quantization_config", "torch_dtype")}
    with disk_errors(out), tempfile.TemporaryDirectory(dir=parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / "checkpoint"
        folder.mkdir()
        shards = _shards(checkpoint_tensors(plan, weights, getattr(torch, dtype)))
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        if len(shards) == 1:
            names = ["model.safetensors"]
        for name, shard in zip(names, shards, strict=True):
            save_file(shard, folder / name, metadata={"format": "pt"})
        if len(shards) > 1:
            where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            size = sum(t.numel() * t.element_size() for shard in shards for t in shard.values())
            _write_json(
                folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where}
            )
        _write_json(folder / "config.json", said | {"dtype": dtype})
        for name, content in files.items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                shutil.copyfile(content, folder / name)
        if overwrite and out.is_dir():
            old = Path(temporary) / "old"
            out.rename(old)
        folder.rename(out)  # replaces an empty directory, fails on any other
    return out


def _shards(tensors: Iterator[tuple[str, Tensor]]) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors:
        count = tensor.numel() * tensor.element_size()
        if shards[-1] and size + count > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += count
    return shards


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
