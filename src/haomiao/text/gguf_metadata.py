"""The tokenizer's part of a GGUF file's metadata, read with every count distrusted.

Knows nothing about tensors, and shares nothing with `load`, which reads the rest of the file. Format: GGUF
specification, versions 2 and 3 (ggml, docs/gguf.md): little-endian; magic, u32 version, u64 tensor count, u64 key
count, then keys: string, u32 type, value. Nothing is allocated beyond what the file's size can hold.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from haomiao.errors import ModelError, ModelNotFoundError, UnsupportedModelError

MAX_KEYS = 1 << 16
MAX_KEY_BYTES = 1 << 16
MAX_STRINGS = 1 << 21
"""Strings in one array; the largest known vocabularies have 0.3 million tokens and 0.6 million merges."""
WANTED = ("tokenizer.", "general.name", "general.architecture")

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SIZES = {kind: struct.calcsize("<" + code) for kind, code in _SCALARS.items()}
_DTYPES = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1", 10: "<u8", 11: "<i8", 12: "<f8"}
_U64 = struct.Struct("<Q")

Value: TypeAlias = Any
"""A scalar, a str (bytes where it is not UTF-8), a list of strings, or a numpy array of numbers."""


def read_metadata(path: Path) -> dict[str, Value]:
    """Key -> value of the keys in `WANTED`. Raises `ModelError` for anything that contradicts the file's size."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data, path.name).metadata()
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise ModelError(f"{path}: cannot be read: {error}") from error


class _Reader:
    """A cursor over the file that refuses to run past its end."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self._data = data
        self._name = name
        self._at = 0
        self._end = len(data)

    def metadata(self) -> dict[str, Value]:
        if self._data[:4] != b"GGUF":
            raise ModelError(f"{self._name}: not a GGUF file")
        self._at = 4
        version = self._scalar(4)
        if version not in (2, 3):
            raise UnsupportedModelError(f"{self._name}: GGUF version {version} is not supported (2 and 3 are)")
        self._scalar(10)  # tensors: not ours
        keys = self._count(10, 13, "keys")
        if keys > MAX_KEYS:
            raise ModelError(f"{self._name}: {keys} metadata keys, more than {MAX_KEYS}")
        found: dict[str, Value] = {}
        for _ in range(keys):
            key = self._string(MAX_KEY_BYTES).decode("utf-8", "replace")
            kind = self._scalar(4)
            wanted = key.startswith(WANTED)
            value = self._value(kind, key, wanted)
            if wanted:
                if key in found:
                    raise ModelError(f"{self._name}: metadata key {key} appears twice")
                found[key] = value
        return found

    def _take(self, size: int) -> int:
        """Advance by `size` and return where that began."""
        start = self._at
        if size > self._end - start:
            raise ModelError(f"{self._name}: truncated at byte {self._end} (metadata need {size} bytes at {start})")
        self._at = start + size
        return start

    def _scalar(self, kind: int) -> Any:
        start = self._take(_SIZES[kind])
        return struct.unpack_from("<" + _SCALARS[kind], self._data, start)[0]

    def _count(self, kind: int, smallest: int, what: str) -> int:
        """A count of things that take at least `smallest` bytes each."""
        count = int(self._scalar(kind))
        if count * smallest > self._end - self._at:
            raise ModelError(f"{self._name}: says {count} {what}, more than the file can hold")
        return count

    def _string(self, limit: int | None = None) -> bytes:
        size = int(self._scalar(10))
        if limit is not None and size > limit:
            raise ModelError(f"{self._name}: a metadata key of {size} bytes")
        start = self._take(size)
        return self._data[start : start + size]

    def _value(self, kind: int, key: str, wanted: bool) -> Value:
        if kind == _STRING:
            return _text(self._string())
        if kind in _SCALARS:
            return self._scalar(kind)
        if kind != _ARRAY:
            raise ModelError(f"{self._name}: metadata key {key[:80]} has unknown type {kind}")
        inner = self._scalar(4)
        if inner == _STRING:
            count = self._count(10, 8, "strings")
            if wanted and count > MAX_STRINGS:
                raise ModelError(
                    f"{self._name}: metadata key {key[:80]} holds {count} strings, more than {MAX_STRINGS}"
                )
            return self._strings(count, wanted)
        if inner not in _SCALARS:
            raise ModelError(f"{self._name}: metadata key {key[:80]} is an array of unknown type {inner}")
        count = self._count(10, _SIZES[inner], "values")
        start = self._take(count * _SIZES[inner])
        return np.frombuffer(self._data[start : self._at], dtype=_DTYPES[inner]) if wanted else None

    def _strings(self, count: int, wanted: bool) -> list[str | bytes]:
        """`count` strings, one after the other; the inner loop of loading, so it keeps its state in locals."""
        data, at, end, length_of = self._data, self._at, self._end, _U64.unpack_from
        values: list[str | bytes] = []
        for _ in range(count):
            if end - at < 8:
                raise ModelError(f"{self._name}: truncated inside an array of strings")
            (size,) = length_of(data, at)
            at += 8
            if size > end - at:
                raise ModelError(f"{self._name}: truncated inside an array of strings")
            if wanted:
                values.append(_text(data[at : at + size]))
            at += size
        self._at = at
        return values


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value
