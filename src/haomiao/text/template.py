"""Chat templates: a conversation to a prompt, and to ids in which content can never become control tokens.

A template is Jinja source that comes with a checkpoint; it is not trusted. It is rendered in another process
(`template_process`, `template_worker`), never in this one: no check of the source that would make rendering here safe
was found that real templates pass (they loop over messages, multiply strings and call methods), and one exchange over
a pipe costs less than a millisecond. A checkpoint without a template gets ChatML, and `fallback` says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from haomiao.errors import InputError, TemplateError
from haomiao.text.template_process import PROCESS
from haomiao.text.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Used where a checkpoint has no template: OpenAI's ChatML, which most small models have seen."""
ALLOWED_KWARGS = frozenset(
    [
        "enable_thinking",
        "thinking",
        "reasoning_effort",
        "documents",
        "date_string",
        "builtin_tools",
        "custom_tools",
        "tools_in_user_message",
        "add_thoughts",
        "continue_final_message",
        "preserve_thinking",
    ]
)
"""Further variables that a caller may set; any other is refused by name."""
MAX_SOURCE_BYTES = 1 << 20
MAX_MESSAGES = 4096
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_NAMES = frozenset(["role", "type"])
"""Keys whose values are names that templates compare with; they are checked rather than protected."""


class ChatTemplate:
    """A compiled template. Raises `TemplateError` for one that is malformed, when first used or by `check`.

    `source` None gives ChatML. `bos_token` and `eos_token` are texts that the template may refer to.
    """

    def __init__(
        self,
        source: str | None,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        if source is not None and len(source) > MAX_SOURCE_BYTES:
            raise TemplateError(f"the chat template is larger than {MAX_SOURCE_BYTES} bytes")
        self.fallback = source is None
        """True if the checkpoint has no template and ChatML stands in."""
        self.source = CHATML if source is None else source
        self._variables = dict(special_tokens or {})
        self._variables.setdefault("bos_token", bos_token or "")
        self._variables.setdefault("eos_token", eos_token or "")

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The template of a tokenizer's checkpoint, or ChatML."""

        def text(id_: int | None) -> str | None:
            return None if id_ is None else tokenizer.token_bytes(id_).decode("utf-8", "replace")

        declared = tokenizer.declared_tokens
        eos = declared.get("eos_token") or text(tokenizer.eos_ids[0] if tokenizer.eos_ids else None)
        return cls(tokenizer.chat_template, bos_token=text(tokenizer.bos_id), eos_token=eos, special_tokens=declared)

    def check(self) -> None:
        """Start the renderer and compile, so that the first request waits for neither. Raises `TemplateError`."""
        PROCESS.compile(self.source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt. Raises `InputError` for messages that are none, `TemplateError` for what the template refuses,
        exceeds or does wrong, and for variables outside `ALLOWED_KWARGS`."""
        check_messages(messages)
        unknown = sorted(set(kwargs) - ALLOWED_KWARGS)
        if unknown:
            raise TemplateError(f"template variable {unknown[0][:60]!r} is not allowed", param=unknown[0][:60])
        context = {
            **self._variables,
            **kwargs,
            "messages": [dict(message) for message in messages],
            "tools": None if tools is None else list(tools),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        _check_unicode(context)
        return PROCESS.render(self.source, context)


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what is not a list of {role, content}. Raises `InputError`."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise InputError("messages must be a non-empty list", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise InputError(f"{len(messages)} messages, at most {MAX_MESSAGES} are allowed", param="messages")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise InputError(f"{where} must be an object", param=where)
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise InputError(f"{where}.role must be a name, such as user", param=f"{where}.role")
        if not isinstance(content, (str, list, type(None))):
            raise InputError(f"{where}.content must be a string or a list of parts", param=f"{where}.content")


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    encode: Callable[[str, bool], list[int]] | None = None,
    **kwargs: Any,
) -> list[int]:
    """Ids of a conversation: the template's own special tokens are control tokens, those in content are plain text.

    Without special-token text in any content this is exactly the encoding of the rendered prompt. Otherwise a private
    character is put inside each such text (and at an edge of content that could complete one together with what stands
    beside it) before rendering; after rendering the prompt is cut at the special tokens that are still whole, the
    private character is removed, and what lies between is encoded literally. A template may trim or cut content: the
    mark travels with the text it guards. Roles are checked instead. Added tokens that are not special but look like
    markup (`<think>`, `<tool_call>`) are guarded too, except in what the assistant said.

    BOS is added only with the fallback template: a checkpoint's own template writes it. `encode` stands in for
    `Tokenizer.encode_part`, of which it must give the ids.
    """
    encode = encode or tokenizer.encode_part
    guard = _Guard(tokenizer, encode)
    marked, tools_marked = guard.messages(messages), guard.value(tools)
    prompt = template.render(
        marked if guard.used else messages,
        add_generation_prompt=add_generation_prompt,
        tools=tools_marked if guard.used else tools,
        **({key: guard.value(value) for key, value in kwargs.items()} if guard.used else kwargs),
    )
    ids = guard.encode(prompt) if guard.used else encode(prompt, True)
    return [*tokenizer.prefix_ids, *ids] if template.fallback else ids


class _Guard:
    """Marks special-token text in the strings of one conversation, and encodes the prompt they were rendered into."""

    def __init__(self, tokenizer: Tokenizer, encode: Callable[[str, bool], list[int]]) -> None:
        self._encode = encode
        known = _KNOWN.get(tokenizer)
        if known is None:
            known = _KNOWN[tokenizer] = _Guarded(tokenizer)
        self._added, self._markup = known.added, known.markup
        self._strict, self._lenient = known.strict, known.lenient
        self.used = False
        """True once anything has been marked."""
        self.mark = "\uf8f0"

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The same messages with marks."""
        check_messages(messages)
        self.mark = _unused_character(messages)
        marked = []
        for message in messages:
            patterns = self._lenient if message["role"] == "assistant" else self._strict
            marked.append({key: self._leaves(value, patterns, key) for key, value in message.items()})
        return marked

    def value(self, value: Any) -> Any:
        """Tools or a template variable with marks."""
        return self._leaves(value, self._strict, "")

    def _leaves(self, value: Any, patterns: _Patterns, key: str, depth: int = 0) -> Any:
        if depth > 64:
            raise InputError("messages are nested too deeply", param="messages")
        if isinstance(value, str):
            if key in _NAMES:
                return value
            text = patterns.mark(value, self.mark)
            self.used |= text is not value
            return text
        if isinstance(value, Mapping):
            return {
                self._leaves(name, patterns, "", depth + 1): self._leaves(item, patterns, name, depth + 1)
                for name, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._leaves(item, patterns, "", depth + 1) for item in value]
        return value

    def encode(self, prompt: str) -> list[int]:
        """Ids of a rendered prompt with marks in it."""
        whole = sorted(self._added, key=len, reverse=True)
        ids: list[int] = []
        start = 0
        for match in re.compile("|".join(map(re.escape, whole)) or r"(?!)").finditer(prompt):
            ids += self._literal(prompt[start : match.start()])
            ids.append(self._added[match[0]])
            start = match.end()
        return ids + self._literal(prompt[start:])

    def _literal(self, text: str) -> list[int]:
        """Ids of text without whole special tokens; marks are removed."""
        plain = text.replace(self.mark, "")
        if len(plain) == len(text) or not any(markup in plain for markup in self._markup):
            return self._encode(plain, False) if plain else []
        # Added tokens that are not special are found in content, too: what the mark parts stays apart.
        parts = [part for part in text.split(self.mark) if part]
        return [id_ for part in parts for id_ in self._encode(part, False)]


class _Patterns:
    """Texts to guard, and their beginnings and ends."""

    def __init__(self, texts: set[str]) -> None:
        ordered = sorted((text for text in texts if len(text) > 1), key=len, reverse=True)
        # Looking ahead finds those that overlap as well.
        self._inside = re.compile("(?=" + "|".join(map(re.escape, ordered)) + ")" if ordered else r"(?!)")
        self._beginnings = {text[:size] for text in ordered for size in range(1, len(text))}
        self._endings = {text[size:] for text in ordered for size in range(1, len(text))}
        self._longest = max(map(len, ordered), default=1)

    def mark(self, text: str, mark: str) -> str:
        """`text` itself if there is nothing to guard."""
        places = {match.start() + 1 for match in self._inside.finditer(text)}
        sizes = range(1, min(self._longest, len(text) + 1))
        if any(text[:size] in self._endings for size in sizes):
            places.add(0)
        if any(text[-size:] in self._beginnings for size in sizes):
            places.add(len(text))
        if not places:
            return text
        cuts = [0, *sorted(places), len(text)]
        return mark.join(text[start:end] for start, end in pairwise(cuts))


class _Guarded:
    """What must not be said in a tokenizer's conversations; the same for all of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.added = tokenizer.added_tokens
        special = {text for text, id_ in self.added.items() if id_ in tokenizer.special_ids}
        self.markup = {text for text in self.added if text not in special and _looks_like_markup(text)}
        self.strict = _Patterns(special | self.markup)
        self.lenient = _Patterns(special)


_KNOWN: WeakKeyDictionary[Tokenizer, _Guarded] = WeakKeyDictionary()


def _looks_like_markup(text: str) -> bool:
    return len(text) > 2 and (text[0], text[-1]) in (("<", ">"), ("[", "]")) and not text.isspace()


def _unused_character(messages: Sequence[Mapping[str, Any]]) -> str:
    """A private-use character that the conversation does not contain."""
    try:
        text = json.dumps(list(map(dict, messages)), ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"messages are not JSON: {str(error)[:200]}", param="messages") from error
    for code in range(0xF8F0, 0xE000, -1):
        if chr(code) not in text:
            return chr(code)
    raise InputError("messages use every private character", param="messages")


def _check_unicode(context: Mapping[str, Any]) -> None:
    try:
        json.dumps(context, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError("messages hold a lone surrogate, which is not Unicode", param="messages") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"messages are not JSON: {str(error)[:200]}", param="messages") from error
