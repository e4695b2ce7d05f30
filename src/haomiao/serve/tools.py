"""Tool calls in an answer's text: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen), or an
answer that is nothing but such an object, `parameters` in place of `arguments` included (Llama 3).

Text that only looks like a call stays text. Knows nothing about models; what a template teaches is its own affair.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from haomiao.serve.schemas import Tool

BEGIN, END = "<tool_call>", "</tool_call>"


@dataclass(slots=True)
class Call:
    """One call; `arguments` is JSON text, as OpenAI has it."""

    name: str
    arguments: str
    index: int = 0
    id: str = field(default_factory=lambda: "call_" + secrets.token_hex(12))

    def as_dict(self) -> dict[str, Any]:
        """As an answer shows it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def parse(text: str, tools: Sequence[Tool], *, whole: bool = False) -> tuple[str, list[Call]]:
    """Content and calls of a whole answer. `whole`: the answer was constrained to be one call."""
    parser = StreamParser(tools, whole=whole)
    deltas = [*parser.push(text), *parser.finish()]
    content = "".join(delta.get("content", "") for delta in deltas)
    return content, parser.calls


def call_of(text: str, tools: Sequence[Tool]) -> Call | None:
    """The call that `text` is, or None: not JSON, not an object with a name, or a name that is no tool's."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.get("name") not in {tool.function.name for tool in tools}:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return Call(value["name"], arguments)
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


class StreamParser:
    """Deltas out of text as it comes: what is certainly content at once, a call when it is complete."""

    def __init__(self, tools: Sequence[Tool], *, whole: bool = False) -> None:
        self._tools = tools
        self._held = ""
        self._inside = False
        self._bare = whole
        self._started = False
        self.calls: list[Call] = []

    @property
    def called(self) -> bool:
        """True if there was a call."""
        return bool(self.calls)

    def push(self, text: str) -> list[dict[str, Any]]:
        """Take more text."""
        self._held += text
        deltas: list[dict[str, Any]] = []
        if not self._started and self._held.strip():
            self._started = True
            self._bare = self._bare or self._held.lstrip().startswith("{")
        if self._bare or not self._started:
            return deltas
        while True:
            if self._inside:
                body, end, rest = self._held.partition(END)
                if not end:
                    return deltas
                deltas += self._call(body, BEGIN + body + END)
                self._held, self._inside = rest, False
                continue
            content, begin, rest = self._held.partition(BEGIN)
            if begin:
                self._held, self._inside = rest, True
            else:
                keep = _beginning(self._held)
                content, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            content = content if not self.calls else content.lstrip("\n")
            if content:
                deltas.append({"content": content})
            if not begin:
                return deltas

    def finish(self) -> list[dict[str, Any]]:
        """The answer has ended: what was held is a call or content after all."""
        held, self._held = self._held, ""
        if not held:
            return []
        if self._inside:
            return self._call(held, BEGIN + held)
        return self._call(held, held) if self._bare else [{"content": held}]

    def _call(self, text: str, shown: str) -> list[dict[str, Any]]:
        call = call_of(text, self._tools)
        if call is None:
            return [{"content": shown}]
        call.index = len(self.calls)
        self.calls.append(call)
        return [{"tool_calls": [{"index": call.index, **call.as_dict()}]}]


def _beginning(text: str) -> int:
    """Characters at the end of `text` that may become `BEGIN`."""
    return next((size for size in range(min(len(BEGIN) - 1, len(text)), 0, -1) if BEGIN.startswith(text[-size:])), 0)
