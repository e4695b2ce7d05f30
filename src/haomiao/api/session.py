"""`Session`: text that is computed as it arrives, so that the first token after the last word costs one small step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from haomiao.api.answers import AnswerStream, Choice, Chunk, Completion
from haomiao.api.requests import shared_beginning
from haomiao.engine.driver import Ticket
from haomiao.engine.request import EngineRequest
from haomiao.errors import InputError

if TYPE_CHECKING:
    from haomiao.api.llm import LLM


@dataclass(slots=True)
class _Part:
    """A stretch of the session: text that was fed, or an answer, whose ids are kept as they were generated."""

    text: str
    ids: list[int] | None = None


class Session:
    """A growing prompt. One request at a time; several sessions of one `LLM` may be used from several threads.

    Text that is fed is tokenized together with the text before it, so that an answer is exactly that of
    `llm.generate(session.token_ids)`; where a new piece changes earlier tokens, only those are computed again.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._maker = llm._requests
        self._maker.need_tokenizer()
        self._parts: list[_Part] = []
        self._id: int | None = llm._driver.alone(lambda engine: engine.open_session())

    @property
    def text(self) -> str:
        """Everything so far, answers included."""
        return "".join(part.text for part in self._parts)

    @property
    def token_ids(self) -> list[int]:
        """What the model has read so far."""
        return self._ids_with("")

    def feed(self, text: str, *, compute: bool = True) -> int:
        """Add text and compute it now. Returns the tokens of the whole session. If it is refused, nothing was added.

        Without `compute` it is left to the next request: of the last words before an answer the first token then comes
        out of the very step that reads them."""
        if not compute:
            self._add(text)
            return len(self.token_ids)
        before = [_Part(part.text, part.ids) for part in self._parts]
        self._add(text)
        try:
            return self._compute()
        except BaseException:
            self._parts = before
            raise

    def truncate(self, length: int) -> None:
        """Keep the first `length` characters; what follows is forgotten. Computed again is only what changes."""
        if type(length) is not int or not 0 <= length <= len(self.text):
            raise InputError(
                f"a session of {len(self.text)} characters cannot be cut to {length!r:.20}", param="length"
            )
        kept: list[_Part] = []
        for part in self._parts:
            if length <= 0:
                break
            kept.append(part if len(part.text) <= length else _Part(part.text[:length]))
            length -= len(part.text)
        self._parts = kept

    def rewind(self, characters: int) -> None:
        """Forget the last `characters` characters."""
        if type(characters) is not int or characters < 0:
            raise InputError(f"characters must be a whole number, not {characters!r:.20}", param="characters")
        self.truncate(max(0, len(self.text) - characters))

    def replace(self, text: str) -> int:
        """Make `text` the whole session: a correction. Returns its tokens; only those after the first difference are
        computed."""
        self._parts = []
        return self.feed(text)

    def generate(self, *, remember: bool = True, **options: Any) -> Completion:
        """Answer what was fed. Options as in `LLM.generate`, without `n`. `remember` makes the answer part of the
        session, so that what is fed next follows it."""
        (answer,) = self._llm._run([self._request(options)])
        completion: Completion = answer
        if remember:
            self._remember(completion.text, completion.token_ids, completion.finish_detail)
        return completion

    def stream(self, *, remember: bool = True, **options: Any) -> AnswerStream:
        """As `generate`, yielding chunks. Of an answer that is closed early, what was yielded is remembered."""
        ticket = self._llm._driver.submit(self._request(options))
        return _SessionStream(ticket, self._remember if remember else None)

    def choose(
        self, options: Sequence[str], *, normalize: bool = False, point: str | None = None, **budget: Any
    ) -> Choice:
        """The option that the model finds likeliest after what was fed (`LLM.choose`)."""
        fields = self._maker.budget_of_choice(budget)
        if isinstance(options, str) or not options or not all(isinstance(each, str) and each for each in options):
            raise InputError("options must be a sequence of strings that are not empty", param="options")
        codes = self._maker.need_tokenizer().codes(options)
        if codes is not None:
            prompt, tails = self.token_ids, [tuple(code) for code in codes]
        else:
            prompt, tails = shared_beginning(self.token_ids, [self._ids_with(option) for option in options])
        session = self._open_id()
        return self._llm._choose(prompt, tails, options, normalize=normalize, point=point, session=session, **fields)

    def close(self) -> None:
        """Give its memory back; idempotent."""
        session, self._id = self._id, None
        if session is not None:
            self._llm._driver.alone(lambda engine: engine.close_session(session))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_id(self) -> int:
        if self._id is None:
            raise InputError("the session was closed", code="closed")
        return self._id

    def _request(self, options: dict[str, Any]) -> EngineRequest:
        request = self._maker.generation(self.token_ids, options, session=self._open_id())
        if request.sampling.n != 1:
            raise InputError("a session gives one answer at a time", param="n")
        return request

    def _compute(self) -> int:
        ids = self.token_ids
        if ids:
            self._llm._done(EngineRequest(ids, work="prefill", session=self._open_id()))
        return len(ids)

    def _add(self, text: str) -> None:
        if self._parts and self._parts[-1].ids is None:
            self._parts[-1].text += text
        elif text:
            self._parts.append(_Part(text))

    def _ids_with(self, more: str) -> list[int]:
        """Ids of the session with `more` text at its end."""
        tokenizer = self._maker.need_tokenizer()
        parts = [_Part(part.text, part.ids) for part in self._parts]
        if parts and parts[-1].ids is None:
            parts[-1].text += more
        elif more:
            parts.append(_Part(more))
        ids = list(tokenizer.prefix_ids)
        for part in parts:
            ids += tokenizer.encode_part(part.text, True) if part.ids is None else part.ids
        return ids

    def _remember(self, text: str, token_ids: list[int], detail: str | None) -> None:
        """Make an answer part of the session: as ids, unless a stop string cut its text."""
        if detail == "stop_string":
            self._add(text)
        elif token_ids:
            ended = detail in ("eos", "stop_token")
            self._parts.append(_Part(text, token_ids[:-1] if ended else list(token_ids)))


class _SessionStream(AnswerStream):
    """A stream that leaves its answer with the session when it ends or is closed."""

    def __init__(self, ticket: Ticket, remember: Callable[[str, list[int], str | None], None] | None) -> None:
        super().__init__(ticket)
        self._remember = remember
        self._text: list[str] = []
        self._ids: list[int] = []

    def __next__(self) -> Chunk:
        chunk = super().__next__()
        self._text.append(chunk.text)
        self._ids += chunk.token_ids
        if chunk.finish_reason is not None:
            self._tell(chunk.finish_detail)
        return chunk

    def close(self) -> None:
        super().close()
        self._tell("stop_string")  # what was shown is text; ids may reach beyond it

    def _tell(self, detail: str | None) -> None:
        remember, self._remember = self._remember, None
        if remember is not None:
            remember("".join(self._text), self._ids, detail)
