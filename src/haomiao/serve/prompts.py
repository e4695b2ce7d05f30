"""Prompts: templates are rendered and text becomes tokens, on threads beside the event loop.

What cannot fit is refused by its size before it is tokenized. Knows the tokenizer, and of the model only what the
engine said of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from haomiao.errors import ContextLengthError, HaomiaoError, InputError, ModelNotFoundError, NotReadyError
from haomiao.serve.messages import Hello
from haomiao.serve.schemas import ChatMessage, Tool
from haomiao.serve.settings import Settings

if TYPE_CHECKING:
    from haomiao.text.beginnings import Beginnings
    from haomiao.text.template import ChatTemplate
    from haomiao.text.tokenizer import Tokenizer

T = TypeVar("T")
TEMPLATE_VARIABLES = frozenset(["enable_thinking", "thinking", "reasoning_effort", "documents", "date_string"])
"""What requests may set in `chat_template_kwargs`; the template decides what it means."""


class Prompts:
    """The tokenizer and template of the model that is served. Made before the model is known; `load` follows."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="haomiao-text")
        self._tokenizer: Tokenizer | None = None
        self._template: ChatTemplate | None = None
        self._beginnings: Beginnings | None = None
        self._longest = self._wordiest = 1  # bytes of the vocabulary's longest token, words of its wordiest
        self.hello: Hello | None = None

    def load(self, hello: Hello) -> None:
        """Load the files that the engine named; called again after a restart, when there is nothing to do."""
        if self.hello is not None and self.hello.files == hello.files:
            self.hello = hello
            return
        self._pool.submit(lambda: None)  # starts the other thread now, while this one is busy
        import haomiao.api.requests  # noqa: F401 - the first choice would wait half a second for it
        from haomiao.text.beginnings import Beginnings
        from haomiao.text.template import ChatTemplate, encode_chat
        from haomiao.text.tokenizer import Tokenizer

        try:
            tokenizer = Tokenizer(Path(hello.files))
        except ModelNotFoundError:
            tokenizer = None
        if tokenizer is not None:
            tokenizer.concurrent = True
            template = ChatTemplate.of(tokenizer)
            if self._settings.chat_template is not None:
                template = _with_source(tokenizer, self._settings.chat_template)
            template.check()
            with contextlib.suppress(HaomiaoError):  # a template may want more than this to warm up with
                tokenizer.encode_part("warm up " * 4096, True)  # long enough for the library's own tokenizer
                encode_chat(tokenizer, template, [{"role": "user", "content": "x"}])
            tokens = [tokenizer.token_bytes(id_) for id_ in range(tokenizer.vocab_size)]
            self._longest = max(1, *map(len, tokens))
            self._wordiest = max(1, *(len(token.decode("utf-8", "replace").split()) for token in tokens))
            self._template = template
            self._beginnings = Beginnings(tokenizer)
        self._tokenizer = tokenizer
        gc.collect()
        gc.freeze()  # the collector looks only through what requests make
        self.hello = hello

    def close(self) -> None:
        """End the threads and the template's process."""
        from haomiao.text.template_process import PROCESS

        self._pool.shutdown(wait=False, cancel_futures=True)
        PROCESS.close()

    async def run(self, work: Callable[[], T]) -> T:
        """Do something on a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises `NotReadyError` before the model is known, `InputError` if it has none."""
        if self.hello is None:
            raise NotReadyError("the model is being loaded")
        if self._tokenizer is None:
            raise InputError("this model has no tokenizer: give token ids instead of text", param="prompt")
        return self._tokenizer

    @property
    def known_tokenizer(self) -> Tokenizer | None:
        """The tokenizer, or None if the model has none."""
        return self._tokenizer

    @property
    def template(self) -> ChatTemplate:
        """The template that conversations are rendered with."""
        _ = self.tokenizer
        if self._template is None:
            raise NotReadyError("the model is being loaded")
        return self._template

    # ---- off the loop ---------------------------------------------------------------------------------------------

    def encoder(self, salt: bytes | None) -> Callable[[str, bool], list[int]]:
        """`Tokenizer.encode_part`; with a salt, the beginnings of texts of the same salt are remembered."""
        tokenizer, beginnings = self.tokenizer, self._beginnings
        if salt is None or beginnings is None:
            return tokenizer.encode_part
        return lambda text, special: beginnings.encode(text, special, salt)

    async def text(
        self, prompt: str, param: str = "prompt", *, special: bool = True, salt: bytes | None = None
    ) -> list[int]:
        """Ids of a prompt, BOS as the model has it; special tokens in it are recognised unless `special` is False."""
        tokenizer, encode = self.tokenizer, self.encoder(salt)
        return await self.encoded([prompt], param, lambda: [*tokenizer.prefix_ids, *encode(prompt, special)])

    async def encoded(self, texts: Sequence[str], param: str, encode: Callable[[], T]) -> T:
        """What `encode` makes of the texts, on a thread. Raises `ContextLengthError` before it is called if they cannot
        fit together."""
        self.check_size(sum(map(len, texts)), param)

        def checked() -> T:
            self.check_size(sum(len(text.encode("utf-8", "surrogatepass")) for text in texts), param)
            self.check_words(sum(len(text.split()) for text in texts), param)
            return encode()

        return await self.run(checked)

    async def chat(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool] | None = None,
        variables: Mapping[str, Any] | None = None,
        *,
        source: str | None = None,
        add_generation_prompt: bool = True,
        salt: bytes | None = None,
    ) -> list[int]:
        """Ids of a conversation, up to where the answer begins. `source` is a template of the request's own."""
        return (
            await self.chat_choice(
                messages, (), tools, variables, source=source, add_generation_prompt=add_generation_prompt, salt=salt
            )
        )[0]

    async def chat_choice(
        self,
        messages: Sequence[ChatMessage],
        choices: Sequence[str],
        tools: Sequence[Tool] | None = None,
        variables: Mapping[str, Any] | None = None,
        *,
        source: str | None = None,
        add_generation_prompt: bool = True,
        salt: bytes | None = None,
    ) -> tuple[list[int], list[list[int]]]:
        """The same, and ids of the options of a choice, each by itself."""
        for choice in choices:
            self.check_size(len(choice), "choice")
        plain = [plain_message(message, index) for index, message in enumerate(messages)]
        texts = [str(message["content"] or "") for message in plain]
        for name in variables or ():
            if name not in TEMPLATE_VARIABLES:
                allowed = ", ".join(sorted(TEMPLATE_VARIABLES))
                raise InputError(
                    f"template variable {name[:60]!r} is not allowed; {allowed} are",
                    param=f"chat_template_kwargs.{name[:60]}",
                )
        if source is not None and not self._settings.request_templates:
            raise InputError(
                "chat_template: this server takes no templates from requests (--request-templates)",
                param="chat_template",
            )
        from haomiao.text.template import encode_chat

        tokenizer, template, encode = self.tokenizer, self.template, self.encoder(salt)
        if source is not None:
            template = _with_source(tokenizer, source)
        described = None if not tools else [_plain(tool) for tool in tools]
        return await self.encoded(
            texts,
            "messages",
            lambda: (
                encode_chat(
                    tokenizer,
                    template,
                    plain,
                    add_generation_prompt=add_generation_prompt,
                    tools=described,
                    encode=encode,
                    **dict(variables or {}),
                ),
                tokenizer.encode_options(choices) if choices else [],
            ),
        )

    async def options(
        self, text: str, whole: Callable[[str], list[int]], choices: Sequence[str]
    ) -> tuple[list[int], list[list[int]]]:
        """Ids of a prompt and of the options of a choice; `whole` gives those of the prompt with a text behind it."""
        from haomiao.api.requests import shared_beginning

        prompt, tails = await self.encoded(
            [text], "prompt", lambda: shared_beginning(whole(""), [whole(choice) for choice in choices])
        )
        return prompt, [list(tail) for tail in tails]

    async def choices(self, choices: Sequence[str]) -> list[list[int]]:
        """Ids of the options of a choice, each by itself."""
        for choice in choices:
            self.check_size(len(choice), "choice")
        tokenizer = self.tokenizer
        return await self.run(lambda: tokenizer.encode_options(choices))

    def check_size(self, size: int, param: str) -> None:
        """Refuse `size` characters or bytes of text that cannot fit, however they are tokenized. Raises
        `ContextLengthError`."""
        self._check_least(f"{size} bytes of text are", size // self._longest, param)

    def check_words(self, words: int, param: str) -> None:
        """The same for text of so many words, parted by white space: no token begins more of them than the vocabulary's
        wordiest."""
        self._check_least(f"{words} words are", words // self._wordiest, param)

    def check_length(self, tokens: int, param: str) -> None:
        """Refuse tokens that do not fit where no answer follows them. Raises `ContextLengthError`."""
        if tokens > self._most:
            raise ContextLengthError(f"{param} has {tokens} tokens; the context holds {self._most}", param=param)

    def _check_least(self, what: str, tokens: int, param: str) -> None:
        if tokens > self._most:
            raise ContextLengthError(f"{what} at least {tokens} tokens; the context holds {self._most}", param=param)

    @property
    def _most(self) -> int:
        if self.hello is None:
            raise NotReadyError("the model is being loaded")
        return self.hello.max_request_tokens


def plain_message(message: ChatMessage, index: int) -> dict[str, Any]:
    """A message as templates know it: content is text, `developer` is `system`. Raises `InputError`."""
    where = f"messages[{index}]"
    out: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    for name in ("audio", "function_call"):
        if getattr(message, name) is not None:
            raise InputError(f"{where}.{name} is not supported", param=f"{where}.{name}")
    if isinstance(message.content, list):
        texts = []
        for number, part in enumerate(message.content):
            kind, at = part.type, f"{where}.content[{number}]"
            if kind not in ("text", "input_text", "output_text", "refusal"):
                raise InputError(
                    f"{at}: {kind[:40]!r} is not supported: this model reads text, and nothing is fetched", param=at
                )
            text = part.refusal if kind == "refusal" else part.text
            if text is None:
                raise InputError(f"{at}.text is missing", param=f"{at}.text")
            texts.append(text)
        out["content"] = "\n".join(texts)
    else:
        out["content"] = message.content
    if message.tool_calls:
        out["tool_calls"] = [_plain_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)]
    if out["content"] is None and not message.tool_calls:
        if message.refusal is None:
            raise InputError(f"{where}.content is missing", param=f"{where}.content")
        out["content"] = message.refusal
    if out["content"] is None:
        out["content"] = ""
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            out[name] = getattr(message, name)
    return out


def _plain_call(call: Any, where: str) -> dict[str, Any]:
    """A tool call with its arguments as an object, as most templates expect."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}.function.arguments is not JSON", param=f"{where}.function.arguments") from error
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _plain(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.function.name, "description": tool.function.description or ""}
    return {"type": "function", "function": {**function, "parameters": tool.function.parameters or {"type": "object"}}}


def _with_source(tokenizer: Tokenizer, source: str) -> ChatTemplate:
    """The checkpoint's template variables, with another source."""
    from haomiao.text.template import ChatTemplate

    own = ChatTemplate.of(tokenizer)
    variables = dict(own._variables)
    return ChatTemplate(
        source, bos_token=variables.get("bos_token"), eos_token=variables.get("eos_token"), special_tokens=variables
    )
