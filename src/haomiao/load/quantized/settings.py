"""Typed access to `quantization_config`: what is missing has a default, what is wrong is one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from haomiao.errors import ModelError, UnsupportedModelError


def integer(settings: Mapping[str, Any], key: str, default: int, supported: Sequence[int] | None = None) -> int:
    """A whole number. `UnsupportedModelError` if it is none of `supported`."""
    value = settings.get(key)
    value = default if value is None else value
    if type(value) is not int or abs(value) >= 1 << 31:
        raise ModelError(f"quantization_config: {key} must be a whole number, not {str(value)[:64]}")
    if supported is not None and value not in supported:
        raise UnsupportedModelError(f"quantization_config: {key} {value} is not supported ({_list(supported)} are)")
    return value


def choice(settings: Mapping[str, Any], key: str, default: str, supported: Sequence[str]) -> str:
    """A word. `UnsupportedModelError` if it is none of `supported`."""
    value = settings.get(key)
    value = default if value is None else value
    if not isinstance(value, str):
        raise ModelError(f"quantization_config: {key} must be text, not {str(value)[:64]}")
    if value.lower() not in supported:
        raise UnsupportedModelError(f"quantization_config: {key} '{value[:64]}' is not supported ({_list(supported)})")
    return value.lower()


def _list(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)
