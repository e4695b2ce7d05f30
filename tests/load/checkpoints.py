"""Tiny model directories for tests, written from the formats' definitions."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int8": "I8", "int32": "I32", "int64": "I64"}
"""numpy type -> safetensors type; uint16 arrays hold the bits of bfloat16."""


def safetensors_bytes(tensors: Mapping[str, np.ndarray], pad: int = 0) -> bytes:
    """A safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, tensor in tensors.items():
        data = np.ascontiguousarray(tensor).tobytes()
        header[name] = {
            "dtype": DTYPES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    text = json.dumps(header).encode() + b" " * pad
    return struct.pack("<Q", len(text)) + text + body


def to_bf16(values: np.ndarray) -> np.ndarray:
    """The bits of bfloat16, truncated."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write_model(directory: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], shards: int = 1) -> Path:
    """A model directory, single or sharded."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return directory
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard::shards]
        (directory / file).write_bytes(safetensors_bytes({name: tensors[name] for name in part}))
        weight_map.update(dict.fromkeys(part, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory
