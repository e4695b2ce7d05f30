"""Writing the GGUF container: metadata, tensor descriptions, aligned bodies. Knows nothing about models.

The format is that of `load/gguf/reader` (ggml-org/ggml, docs/gguf.md), version 3. Bodies are written as they come, so
that one is in memory at a time; the header, whose size does not depend on them, is filled in last.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from haomiao.load.gguf.blocks import TYPES
from haomiao.load.gguf.reader import DEFAULT_ALIGNMENT

VERSION = 3
U32, I32, FLOAT, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9

Value: TypeAlias = bool | int | float | str | Sequence[str] | npt.NDArray[Any]
"""int: u32. float: f32. Arrays: strings, int32 or float32."""
NUMBERS = {block.name: number for number, block in TYPES.items()}


def write_file(
    path: Path,
    metadata: Mapping[str, Value],
    shapes: Mapping[str, tuple[int, ...]],
    bodies: Iterable[tuple[str, str, npt.NDArray[Any]]],
) -> dict[str, str]:
    """Write a file. `shapes`: every tensor's, outermost first. `bodies`: (name, type, bytes), each tensor once, in any
    order. Returns tensor -> type. Raises `OSError`, and `ValueError` for bodies that do not agree with `shapes`."""
    entries = b"".join(_string(key) + _typed(value) for key, value in metadata.items())
    placed: dict[str, tuple[str, int]] = {}
    size = _aligned(len(_header(entries, len(metadata), shapes, placed)))
    with path.open("xb") as file:
        file.write(bytes(size))
        for name, kind, body in bodies:
            if name in placed or body.nbytes != _bytes_of(shapes[name], kind):
                raise ValueError(f"tensor {name} of type {kind} does not agree with {shapes[name]}")
            placed[name] = kind, file.tell() - size
            file.write(np.ascontiguousarray(body).data)
            file.write(bytes(-file.tell() % DEFAULT_ALIGNMENT))
        if len(placed) != len(shapes):
            raise ValueError(f"{len(shapes) - len(placed)} tensors were not given")
        file.seek(0)
        file.write(_header(entries, len(metadata), shapes, placed))
    return {name: kind for name, (kind, _) in placed.items()}


def _bytes_of(shape: tuple[int, ...], kind: str) -> int:
    block = TYPES[NUMBERS[kind]]
    count = int(np.prod(shape))
    return -1 if shape[-1] % block.elements else count // block.elements * block.bytes


def _header(
    entries: bytes, count: int, shapes: Mapping[str, tuple[int, ...]], placed: Mapping[str, tuple[str, int]]
) -> bytes:
    out = [b"GGUF", struct.pack("<IQQ", VERSION, len(shapes), count), entries]
    for name, shape in shapes.items():
        kind, offset = placed.get(name, ("f32", 0))
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        out += [_string(name), sizes, struct.pack("<IQ", NUMBERS[kind], offset)]
    return b"".join(out)


def _aligned(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _typed(value: Value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", U32, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, np.ndarray):
        kind, dtype = (FLOAT, "<f4") if value.dtype.kind == "f" else (I32, "<i4")
        return struct.pack("<IIQ", ARRAY, kind, value.size) + value.astype(dtype).tobytes()
    return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
