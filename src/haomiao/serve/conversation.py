"""The conversation of one realtime session, and the tokens that the model reads for it.

While text is still arriving, only the beginning that further text will not change is worth computing: what the
tokenizer gives for the text as it is and for the text with another word behind it. Knows no connection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from haomiao.errors import InputError
from haomiao.serve.prompts import Prompts
from haomiao.serve.realtime_events import MAX_ITEMS, SessionFields
from haomiao.serve.schemas import ChatMessage

Key = tuple[str, str, tuple[tuple[str, str], ...]]


@dataclass(slots=True)
class Item:
    """One message. `role` is OpenAI's."""

    id: str
    role: str
    text: str
    status: str = "completed"


@dataclass(slots=True)
class Conversation:
    """Messages in order, and `buffer`: what the user is still saying."""

    items: list[Item] = field(default_factory=list)
    buffer: str = ""

    def add(self, item: Item, after: str | None = None) -> str | None:
        """Insert at the end, after the item `after`, or first for `root`. Returns the id of the item before it.

        Raises `InputError` for an id that is taken or not there.
        """
        if len(self.items) >= MAX_ITEMS:
            raise InputError(f"a conversation holds at most {MAX_ITEMS} items", param="item")
        if any(known.id == item.id for known in self.items):
            raise InputError(f"there is an item {item.id[:64]!r} already", param="item.id", code="item_exists")
        place = (
            len(self.items) if after is None else 0 if after == "root" else self.place(after, "previous_item_id") + 1
        )
        self.items.insert(place, item)
        return self.items[place - 1].id if place else None

    def place(self, item_id: str, param: str = "item_id") -> int:
        """Where an item is. Raises `InputError`."""
        for index, item in enumerate(self.items):
            if item.id == item_id:
                return index
        raise InputError(f"there is no item {item_id[:64]!r}", param=param, code="item_not_found")

    def replace(self, start: int, text: str) -> None:
        """From character `start` on, the buffer is `text`. Raises `InputError`."""
        if start > len(self.buffer):
            why = f"start is {start}; the buffer has {len(self.buffer)} characters"
            raise InputError(why, param="start", code="invalid_start")
        self.buffer = self.buffer[:start] + text

    def messages(self, extra: str | None = None) -> tuple[tuple[str, str], ...]:
        """(role, text) of every message; `extra` is one more of the user."""
        said = [(item.role, item.text) for item in self.items]
        if extra is not None:
            said.append(("user", extra))
        return tuple(said)


class Reader:
    """Turns a conversation into tokens; remembers the last prompt, so that a commit need not render it again."""

    def __init__(self, prompts: Prompts, salt: bytes) -> None:
        self._prompts = prompts
        self._salt = salt
        self._last: tuple[Key, list[int]] | None = None

    async def prompt(self, fields: SessionFields, messages: tuple[tuple[str, str], ...], form: str) -> list[int]:
        """Ids of the whole prompt, up to where the answer begins. Raises `InputError` and its kinds."""
        key = (form, fields.instructions or "", messages)
        if self._last is not None and self._last[0] == key:
            return list(self._last[1])
        ids = await self._render(*key)
        self._last = (key, ids)
        return list(ids)

    async def beginning(
        self, fields: SessionFields, conversation: Conversation, form: str, asked: Callable[[], bool]
    ) -> list[int] | None:
        """Ids of what will most likely not change, whatever the user goes on to say. None once an answer was `asked`
        for: it waits for this, and needs no more than the whole prompt, which is remembered."""
        instructions = fields.instructions or ""
        now = await self.prompt(fields, conversation.messages(conversation.buffer or "a"), form)
        if asked():
            return None
        other = conversation.buffer + " a" if conversation.buffer else "b"
        then = await self._render(form, instructions, conversation.messages(other))
        return now[: common(now, then)]

    async def _render(self, form: str, instructions: str, messages: tuple[tuple[str, str], ...]) -> list[int]:
        if form == "text":
            whole = instructions + "".join(text for _, text in messages)
            return await self._prompts.text(whole, "input", salt=self._salt)
        told = [ChatMessage(role="system", content=instructions)] if instructions else []
        told += [ChatMessage(role=role, content=text) for role, text in messages]  # type: ignore[arg-type]
        return await self._prompts.chat(told, salt=self._salt)


def common(one: list[int], other: list[int]) -> int:
    """How many ids two lists begin with alike."""
    count = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        count += 1
    return count
