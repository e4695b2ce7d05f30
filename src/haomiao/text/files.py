"""Reading small files that are not trusted. Knows nothing about tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from haomiao.errors import ModelError, ModelNotFoundError
from haomiao.text.parts import MAX_FILE_BYTES


def read_bytes(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """The whole file. Raises `ModelError` if it is not a readable file of at most `limit` bytes."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"{path}: no such file") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(data) > limit:
        raise ModelError(f"{path}: larger than {limit} bytes")
    return data


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object. Raises `ModelError` for anything else, bad UTF-8 and absurd nesting included."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{name}: not valid JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{name}: a JSON object is needed, not {type(value).__name__}")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, or an empty one if there is no such file."""
    if not path.is_file():
        return {}
    return parse_object(read_bytes(path, 64 << 20), path.name)
