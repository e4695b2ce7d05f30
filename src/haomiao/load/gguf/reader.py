"""The GGUF container: metadata and tensor descriptions, every number distrusted, tensors' bytes mapped.

The format (ggml-org/ggml, docs/gguf.md), little-endian: magic, u32 version, u64 tensors, u64 metadata entries; entries
(key, u32 type, value); tensor infos (name, u32 dimensions, u64 sizes innermost first, u32 type, u64 offset); padding to
`general.alignment`; data. Knows nothing about architectures or what the quantized bytes mean.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from haomiao.errors import ModelError, UnsupportedModelError
from haomiao.load.gguf.blocks import TYPES
from haomiao.load.mapping import map_file
from haomiao.types import U8

VERSIONS = (2, 3)
MAX_ENTRIES = 1 << 16
MAX_ARRAY = 1 << 24
MAX_KEY_BYTES = 65535  # as the format says
MAX_NAME_BYTES = 255
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

Value: TypeAlias = int | float | bool | str | tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """`shape` is outermost first (rows, columns), as numpy says it; `begin` counts bytes from the file's start."""

    name: str
    type: int
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Strings:
    """An array of strings, left in the file until asked for (vocabularies are long)."""

    begin: int
    count: int


class GgufFile:
    """A mapped GGUF file whose header was found right. Raises `ModelError` otherwise."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data: U8 = map_file(path)
        self._buffer = memoryview(self._data.data)
        self._position = 0
        self.metadata: dict[str, Value] = {}
        self._strings: dict[str, Strings] = {}
        tensors, entries = self._read_counts()
        for _ in range(entries):
            self._read_entry()
        self.alignment = self._alignment()
        infos = [self._read_info() for _ in range(tensors)]
        self.tensors = self._place(infos)

    def bytes(self, info: TensorInfo) -> U8:
        """The tensor's bytes: a read-only view."""
        return self._data[info.begin : info.begin + info.nbytes]

    def strings(self, key: str) -> list[str]:
        """An array of strings of the metadata, empty if there is none. What is not UTF-8 is replaced."""
        where = self._strings.get(key)
        if where is None:
            return []
        self._position = where.begin
        return [str(self._string(), "utf-8", "replace") for _ in range(where.count)]

    def count(self, key: str) -> int:
        """The length of an array of strings, 0 if there is none."""
        where = self._strings.get(key)
        return where.count if where is not None else 0

    # ---- reading, bounded by the file

    def _fail(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: {what}")

    def _take(self, size: int) -> memoryview:
        begin, end = self._position, self._position + size
        if end > len(self._buffer):
            raise self._fail(f"truncated: {size} bytes expected at byte {begin} of {len(self._buffer)}")
        self._position = end
        return self._buffer[begin:end]

    def _number(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _string(self, limit: int | None = None) -> memoryview:
        size = self._number("Q")
        if limit is not None and size > limit:
            raise self._fail(f"a name of {size} bytes at byte {self._position - 8}")
        return self._take(size)

    def _name(self, limit: int) -> str:
        try:
            name = str(self._string(limit), "utf-8")
        except UnicodeDecodeError:
            raise self._fail(f"a name that is not UTF-8 before byte {self._position}") from None
        if not name or not name.isprintable():
            raise self._fail(f"an empty or unprintable name before byte {self._position}")
        return name

    def _read_counts(self) -> tuple[int, int]:
        if bytes(self._take(4)) != b"GGUF":
            raise self._fail("not a GGUF file")
        version = self._number("I")
        if version not in VERSIONS:
            order = " (big-endian files are not read)" if version and version & 0xFFFF == 0 else ""
            raise UnsupportedModelError(f"{self.path}: GGUF version {version}; 2 and 3 are read{order}")
        tensors, entries = self._number("Q"), self._number("Q")
        if tensors > MAX_ENTRIES or entries > MAX_ENTRIES:
            raise self._fail(
                f"{tensors} tensors and {entries} metadata entries; at most {MAX_ENTRIES} of each are read"
            )
        return tensors, entries

    def _read_entry(self) -> None:
        key = self._name(MAX_KEY_BYTES)
        if key in self.metadata or key in self._strings:
            raise self._fail(f"duplicate key '{key[:128]}'")
        kind = self._number("I")
        if kind in SCALARS:
            self.metadata[key] = self._scalar(key, kind)
        elif kind == STRING:
            self.metadata[key] = str(self._string(), "utf-8", "replace")
        elif kind == ARRAY:
            self._read_array(key)
        else:
            raise self._fail(f"'{key[:128]}' has unknown type {kind}")

    def _scalar(self, key: str, kind: int) -> Value:
        if kind == 7:
            byte = self._number("B")
            if byte > 1:
                raise self._fail(f"'{key[:128]}' is neither true nor false")
            return bool(byte)
        if kind == 6:  # the decimal that was meant: 1e-05, not 9.999999747378752e-06
            return float(str(np.float32(self._number("f"))))
        value: Value = self._number(SCALARS[kind])
        return value

    def _read_array(self, key: str) -> None:
        kind, count = self._number("I"), self._number("Q")
        if count > MAX_ARRAY:
            raise self._fail(f"'{key[:128]}' has {count} elements; at most {MAX_ARRAY} are read")
        if kind == STRING:
            self._strings[key] = Strings(self._position, count)
            self._skip_strings(count)
        elif kind in SCALARS:
            code = "B" if kind == 7 else SCALARS[kind]
            raw = self._take(count * struct.calcsize(code))
            self.metadata[key] = struct.unpack(f"<{count}{code}", raw)
        else:
            raise self._fail(f"'{key[:128]}' is an array of unreadable type {kind}")

    def _skip_strings(self, count: int) -> None:
        """A tight loop: vocabularies have hundreds of thousands of strings."""
        unpack, buffer, position, end = struct.Struct("<Q").unpack_from, self._buffer, self._position, len(self._buffer)
        if count * 8 > end - position:
            raise self._fail(f"truncated: {count} strings expected at byte {position} of {end}")
        for _ in range(count):
            if position + 8 > end:
                break
            position += 8 + unpack(buffer, position)[0]
        if position > end:
            raise self._fail(f"truncated: a string ends at byte {position} of {end}")
        self._position = position

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._fail(f"general.alignment must be a power of two from 8 on, not {str(alignment)[:32]}")
        return alignment

    # ---- tensors

    def _read_info(self) -> TensorInfo:
        name = self._name(MAX_NAME_BYTES)
        dimensions = self._number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._fail(f"tensor '{name}' has {dimensions} dimensions")
        sizes = tuple(self._number("Q") for _ in range(dimensions))
        kind, offset = self._number("I"), self._number("Q")
        if kind not in TYPES:
            raise UnsupportedModelError(f"{self.path}: tensor '{name}' has unknown type {kind}")
        block = TYPES[kind]
        elements = math.prod(sizes)  # Python's integers do not overflow
        if elements == 0 or sizes[0] % block.elements:
            raise self._fail(f"tensor '{name}': {block.name} cannot have the sizes {sizes}")
        return TensorInfo(name, kind, sizes[::-1], offset, elements // block.elements * block.bytes)

    def _place(self, infos: list[TensorInfo]) -> dict[str, TensorInfo]:
        """Offsets become positions in the file; alignment, bounds, overlaps and duplicates are checked."""
        start = -(-self._position // self.alignment) * self.alignment
        placed: dict[str, TensorInfo] = {}
        end = start
        for info in sorted(infos, key=lambda item: item.begin):
            begin = start + info.begin
            if info.begin % self.alignment:
                raise self._fail(f"tensor '{info.name}' is not aligned to {self.alignment} bytes")
            if begin < end:
                raise self._fail(f"tensor '{info.name}' overlaps another")
            end = begin + info.nbytes
            if end > len(self._buffer):
                raise self._fail(f"tensor '{info.name}' ends at byte {end} of {len(self._buffer)}")
            if info.name in placed:
                raise self._fail(f"tensor '{info.name}' stands twice")
            placed[info.name] = TensorInfo(info.name, info.type, info.shape, begin, info.nbytes)
        return {info.name: placed[info.name] for info in infos}

    # ---- typed access to the metadata

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = (1 << 31) - 1) -> int:
        """A whole number in [least, most]; an array whose elements agree counts as one. Raises `ModelError`."""
        value = self.metadata.get(key, default)
        if isinstance(value, tuple) and value and all(item == value[0] for item in value):
            value = value[0]
        if isinstance(value, tuple):
            raise UnsupportedModelError(f"{self.path}: '{key}' differs from layer to layer")
        if type(value) is not int or not least <= value <= most:
            raise self._fail(f"'{key}' must be a whole number from {least} to {most}, not {str(value)[:64]}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. Raises `ModelError`."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._fail(f"'{key}' must be a finite number, not {str(value)[:64]}")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A string. Raises `ModelError`."""
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise self._fail(f"'{key}' must be text, not {str(value)[:64]}")
        return value

    def __contains__(self, key: str) -> bool:
        return key in self.metadata

    def __iter__(self) -> Iterator[str]:
        return iter(self.metadata)
