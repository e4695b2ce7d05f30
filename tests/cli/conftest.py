"""A model that says what it is told, in place of the real one: the command line is tested apart from the engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from haomiao.types import Receipt, ScheduleEntry


@dataclass
class FakeChunk:
    text: str
    token_ids: list[int]
    logprobs: Any = None
    finish_reason: str | None = None
    receipt: Receipt | None = None


@dataclass
class Calls:
    """What the command line asked of the model."""

    opened: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    asked: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    closed: int = 0
    says: list[str] = field(default_factory=lambda: ["Hello", ", ", "world"])
    raises: BaseException | None = None
    raises_after: int = 0
    model: Any = None


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Replaces `haomiao.api.LLM`; returns the record of its calls."""
    calls = Calls()

    class LLM:
        name, point, threads, vocab_size = "fake", "int8", 2, 100
        tokenizer = SimpleNamespace(chat_template="a template")

        def __init__(self, model: str | None = None, *, progress: Any = None, **options: Any) -> None:
            if isinstance(model, str) and model.startswith("missing"):
                from haomiao.errors import ModelNotFoundError

                raise ModelNotFoundError(f"no model {model!r}")
            calls.opened.append((model, options))

        def stream(self, prompt: Any, **options: Any) -> Iterator[FakeChunk]:
            calls.asked.append((prompt, options))
            for index, text in enumerate(calls.says):
                if calls.raises is not None and index == calls.raises_after:
                    raise calls.raises
                yield FakeChunk(text, [index + 1])
            receipt = Receipt(
                ttft_ms=12.0,
                decode_ms=20.0,
                completion_tokens=len(calls.says),
                schedule=[ScheduleEntry("int8", 3, 3)],
                model="fake",
            )
            yield FakeChunk("", [], finish_reason="stop", receipt=receipt)

        def chat(self, messages: Any, *, stream: bool = False, **options: Any) -> Iterator[FakeChunk]:
            assert stream
            return self.stream(messages, **options)

        def close(self) -> None:
            calls.closed += 1

    module = ModuleType("haomiao.api")
    calls.model = LLM
    module.LLM = LLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "haomiao.api", module)
    for variable in ("MODEL", "THREADS", "POINT", "MAX_CONTEXT", "KV", "EXECUTOR", "REVISION", "OFFLINE", "DEBUG"):
        monkeypatch.delenv(f"HAOMIAO_{variable}", raising=False)
    return calls
