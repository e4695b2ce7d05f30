"""Settings that come from the environment. Knows nothing about models or the command line.

Every setting is read when asked for, not at import, so that tests and embedding programs can change it.
"""

from __future__ import annotations

import os
from pathlib import Path

from haomiao.errors import InputError


def cache_dir() -> Path:
    """Where converted models live: `HAOMIAO_CACHE`, else `$XDG_CACHE_HOME/haomiao`, else `~/.cache/haomiao`."""
    explicit = os.environ.get("HAOMIAO_CACHE")
    if explicit:
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "haomiao"


def offline() -> bool:
    """True if nothing may be fetched: `HAOMIAO_OFFLINE` or `HF_HUB_OFFLINE` is set to a true value."""
    return any(
        os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in ("HAOMIAO_OFFLINE", "HF_HUB_OFFLINE")
    )


def threads_from_environment() -> int | None:
    """`HAOMIAO_THREADS`, or None. Raises `InputError` for anything but a positive number."""
    value = os.environ.get("HAOMIAO_THREADS")
    if value is None:
        return None
    if not value.isdigit() or int(value) < 1:
        raise InputError(f"HAOMIAO_THREADS must be a positive number, not {value!r}", param="HAOMIAO_THREADS")
    return int(value)
