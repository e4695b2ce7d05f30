"""JSON from files that nobody vouches for: bounded in size, depth and number of values, no duplicate keys, no NaN.

Knows nothing about what the JSON means. Python's own parser does the work; what it would let through is refused here.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NoReturn

from haomiao.errors import ModelError

MAX_BYTES = 16 << 20
MAX_DEPTH = 64
MAX_VALUES = 4_000_000
"""Bounds the objects that a small file could unfold into (each comma, colon or bracket is at most one of them)."""


def parse_json(data: bytes, what: str, *, error: type[ModelError] = ModelError, max_bytes: int = MAX_BYTES) -> Any:
    """The value that `data` holds. Raises `error`, one line that begins with `what`."""
    if len(data) > max_bytes:
        raise error(f"{what}: JSON of {len(data)} bytes, at most {max_bytes} are read")
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise error(f"{what}: JSON with more than {MAX_VALUES} values")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
        _check(value)
    except RecursionError:
        raise error(f"{what}: JSON nested too deeply") from None
    except ValueError as wrong:  # JSONDecodeError, UnicodeDecodeError, numbers with thousands of digits
        raise error(f"{what}: not valid JSON ({str(wrong)[:200]})") from None
    return value


def parse_object(
    data: bytes, what: str, *, error: type[ModelError] = ModelError, max_bytes: int = MAX_BYTES
) -> dict[str, Any]:
    """As `parse_json`, for a file whose value must be an object."""
    value = parse_json(data, what, error=error, max_bytes=max_bytes)
    if not isinstance(value, dict):
        raise error(f"{what}: a JSON object is expected")
    return value


def read_object(path: Path, *, error: type[ModelError] = ModelError, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object of a file. Takes no more memory than the file has bytes, and reads none above `max_bytes`."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(size) if size <= max_bytes else b""
        if size > max_bytes:
            raise error(f"{path}: JSON of {size} bytes, at most {max_bytes} are read")
    except OSError as wrong:
        raise error(f"{path}: cannot be read ({wrong.strerror or wrong})") from None
    return parse_object(data, str(path), error=error, max_bytes=max_bytes)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {key[:64]!r}")
            seen.add(key)
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check(value: Any) -> None:
    """Depth, and numbers that overflow to infinity. No recursion."""
    level: list[Any] = [value]
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH + 1:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, float) and not math.isfinite(item):
                raise ValueError("a number beyond the range of float64")
        level = below
