"""One safetensors file: its header distrusted, its tensors read lazily from the mapped file.

The format (huggingface/safetensors, README "Format"): u64 header size, a JSON object name -> {dtype, shape,
data_offsets}, then the data, which the tensors cover without gaps or overlaps. Knows nothing about models or
directories (`checkpoint`), and nothing about what integer tensors mean (`quantized`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from haomiao.errors import ModelError
from haomiao.load.jsonfile import parse_object
from haomiao.load.mapping import map_file
from haomiao.types import F32, U8

MAX_HEADER_BYTES = 32 << 20
MAX_DIMENSIONS = 8
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
INTEGERS: dict[str, Any] = {"I8": np.int8, "U8": np.uint8, "I16": "<i2", "I32": "<i4", "U32": "<u4", "I64": "<i8"}
FLOATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the file: `begin` and `end` are bytes from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A mapped safetensors file whose header was found right. Raises `ModelError` otherwise."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data: U8 = map_file(path)
        self.entries = _read_header(self._data, path)

    def raw(self, name: str) -> npt.NDArray[Any]:
        """An integer tensor as it is stored: a read-only view. Raises `ModelError` for other types."""
        entry = self._entry(name)
        if entry.dtype not in INTEGERS:
            raise ModelError(f"{self.path}: tensor '{name}' has type {entry.dtype}, an integer type is expected")
        values: npt.NDArray[Any] = self._bytes(entry).view(INTEGERS[entry.dtype]).reshape(entry.shape)
        return values

    def read(self, name: str) -> F32:
        """A floating-point tensor as float32: a read-only view if it is stored so, else a copy."""
        entry = self._entry(name)
        if entry.dtype not in FLOATS:
            raise ModelError(f"{self.path}: tensor '{name}' has type {entry.dtype}; F32, F16 and BF16 are read")
        return to_f32(self._bytes(entry), FLOATS[entry.dtype]).reshape(entry.shape)

    def _entry(self, name: str) -> Entry:
        try:
            return self.entries[name]
        except KeyError:
            raise ModelError(f"{self.path}: no tensor '{name}'") from None

    def _bytes(self, entry: Entry) -> U8:
        return self._data[entry.begin : entry.end]


def to_f32(data: U8, dtype: str) -> F32:
    """Flat bytes of `f32`, `f16` or `bf16` values as float32; a view where nothing has to change."""
    if dtype == "f32":
        values = data.view("<f4")
        return values if values.flags.aligned else values.copy()
    if dtype == "f16":
        return data.view("<f2").astype(np.float32)
    widened = data.view("<u2").astype(np.uint32)
    widened <<= 16  # bfloat16 is the upper half of float32
    return widened.view(np.float32)


def _read_header(data: U8, path: Path) -> dict[str, Entry]:
    if data.nbytes < 8:
        raise ModelError(f"{path}: truncated: {data.nbytes} bytes")
    header_bytes = int.from_bytes(data[:8].tobytes(), "little")
    if header_bytes > min(data.nbytes - 8, MAX_HEADER_BYTES):
        raise ModelError(f"{path}: header of {header_bytes} bytes in a file of {data.nbytes}")
    header = parse_object(data[8 : 8 + header_bytes].tobytes(), f"{path}: header", max_bytes=MAX_HEADER_BYTES)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelError(f"{path}: __metadata__ must map text to text")
    start = 8 + header_bytes
    entries = {name: _entry(f"{path}: tensor '{name[:128]}'", value, start) for name, value in header.items()}
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            wrong = "overlaps another" if entry.begin < position else "leaves a gap before it"
            raise ModelError(f"{path}: tensor '{name[:128]}' {wrong}")
        position = entry.end
    if position != data.nbytes:
        raise ModelError(f"{path}: the tensors end at byte {position}, the file has {data.nbytes}")
    return entries


def _entry(where: str, value: Any, start: int) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ModelError(f"{where}: must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ModelError(f"{where}: unknown type {str(dtype)[:32]!r}")
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ModelError(f"{where}: not a shape: {str(shape)[:64]}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelError(f"{where}: not a range of bytes: {str(offsets)[:64]}")
    needed = math.prod(shape) * DTYPE_BYTES[dtype]  # Python's integers do not overflow
    if needed != offsets[1] - offsets[0]:
        raise ModelError(f"{where}: {dtype} {shape} needs {needed} bytes, its range has {offsets[1] - offsets[0]}")
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
