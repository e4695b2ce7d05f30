"""The events of /v1/realtime, in the names of OpenAI's Realtime API where it has them: what clients may say, and the
parts of what the server says.

Text only: what concerns audio is accepted where it changes nothing, else refused by name. Ours are the events
`input_text_buffer.*` (the text counterpart of OpenAI's audio buffer) and everything under `haomiao`. Knows no model.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from haomiao.serve.schemas import Body, Count, Name, Natural, Part, Sampled

MAX_ITEMS = 4096


class SessionFields(Sampled, kw_only=True):
    """What a session, or one response, may be told. Fields of ours are those of chat completions."""

    type: Literal["realtime"] | None = None
    instructions: str | None = None
    max_output_tokens: Count | Literal["inf"] | None = None
    output_modalities: list[Literal["text"]] | None = None
    modalities: list[Literal["text"]] | None = None
    prompt_format: Literal["chat", "text"] | None = None
    """`chat`: through the model's template; `text`: the items' texts one after the other, to be continued."""
    interrupt_response: bool | None = None
    """True (the default): text that arrives while an answer is given ends that answer."""
    conversation: Literal["auto", "none"] | None = None
    """Of a response: `none` leaves the answer out of the conversation."""
    tools: Any = None
    tool_choice: Any = None
    audio: Any = None
    include: Any = None
    tracing: Any = None
    truncation: Any = None
    prompt: Any = None
    reasoning: Any = None
    parallel_tool_calls: Any = None


class MessageItem(Body, kw_only=True):
    """One message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], Meta(max_length=256)]
    id: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    object: str | None = None
    status: str | None = None


class Event(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of what clients say. `event_id` comes back with an error."""

    event_id: Annotated[str, Meta(max_length=512)] | None = None


class SessionUpdate(Event, tag_field="type", tag="session.update", kw_only=True):
    """Change the fields that are given."""

    session: SessionFields


class ItemCreate(Event, tag_field="type", tag="conversation.item.create", kw_only=True):
    """Add a message: at the end, after another one, or first (`root`)."""

    item: MessageItem
    previous_item_id: Name | None = None


class ItemDelete(Event, tag_field="type", tag="conversation.item.delete", kw_only=True):
    """Take a message out."""

    item_id: Name


class ItemRetrieve(Event, tag_field="type", tag="conversation.item.retrieve", kw_only=True):
    """Show a message."""

    item_id: Name


class BufferAppend(Event, tag_field="type", tag="input_text_buffer.append", kw_only=True):
    """More of what the user is saying; it is computed while the rest is awaited."""

    text: str


class BufferReplace(Event, tag_field="type", tag="input_text_buffer.replace", kw_only=True):
    """A correction: from character `start` (in Unicode code points) on, the buffer is `text`. Only what changes is
    computed again."""

    start: Natural = 0
    text: str


class BufferClear(Event, tag_field="type", tag="input_text_buffer.clear", kw_only=True):
    """Forget what was said since the last commit."""


class BufferCommit(Event, tag_field="type", tag="input_text_buffer.commit", kw_only=True):
    """The user has finished: the buffer becomes a message."""


class ResponseCreate(Event, tag_field="type", tag="response.create", kw_only=True):
    """Answer the conversation. The budget counts from this event."""

    response: SessionFields | None = None


class ResponseCancel(Event, tag_field="type", tag="response.cancel", kw_only=True):
    """End the answer that is being given."""

    response_id: Name | None = None


ClientEvent: TypeAlias = (
    SessionUpdate
    | ItemCreate
    | ItemDelete
    | ItemRetrieve
    | BufferAppend
    | BufferReplace
    | BufferClear
    | BufferCommit
    | ResponseCreate
    | ResponseCancel
)


def message_item(item_id: str, role: str, text: str, status: str = "completed") -> dict[str, Any]:
    """A message as the server shows it."""
    kind = "output_text" if role == "assistant" else "input_text"
    shown_role = "system" if role == "developer" else role
    content = [{"type": kind, "text": text}] if text or status != "in_progress" else []
    return {
        "id": item_id,
        "object": "realtime.item",
        "type": "message",
        "status": status,
        "role": shown_role,
        "content": content,
    }


def merged(base: SessionFields, change: SessionFields | None) -> SessionFields:
    """`base` with every field that `change` gives."""
    given = (
        {}
        if change is None
        else {name: value for name in change.__struct_fields__ if (value := getattr(change, name)) is not None}
    )
    result: SessionFields = msgspec.structs.replace(base, **given)
    return result
