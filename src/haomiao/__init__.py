"""Haomiao (毫秒): a real-time LLM engine. A model, a prompt and a budget in; an answer and a receipt out.

Names are imported when they are first used, so that `import haomiao` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["LLM", "SamplingParams", "Session", "Tokenizer", "__version__"]

if TYPE_CHECKING:
    from haomiao.api import LLM, Session
    from haomiao.text.tokenizer import Tokenizer
    from haomiao.types import SamplingParams

_HOMES = {
    "LLM": "haomiao.api",
    "Session": "haomiao.api",
    "Tokenizer": "haomiao.text.tokenizer",
    "SamplingParams": "haomiao.types",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'haomiao' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
