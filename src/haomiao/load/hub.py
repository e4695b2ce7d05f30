"""Models from the Hugging Face hub, through `huggingface_hub` and its standard cache."""

from __future__ import annotations

from pathlib import Path

from haomiao.errors import DownloadError
from haomiao.load.source import Progress


def is_id(name: str) -> bool:
    """True if `name` can be a Hugging Face id, with or without a choice of a GGUF file."""
    return False


def download(
    name: str, *, revision: str | None, offline: bool | None, token: str | None, progress: Progress | None
) -> Path:
    """Fetch what is missing and return the directory or file."""
    raise DownloadError(name)
