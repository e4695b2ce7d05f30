"""From what a caller writes to what the engine is asked: prompts, sampling parameters, constraints and budgets.

Every refusal names the argument. Knows a tokenizer and no engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from haomiao.engine.request import EngineRequest
from haomiao.errors import InputError
from haomiao.types import SamplingParams, SentenceClose, StopMatcher

if TYPE_CHECKING:
    from haomiao.text.template import ChatTemplate
    from haomiao.text.tokenizer import Tokenizer

CONSTRAINTS = ("json_schema", "regex", "grammar", "choice", "json_object")
BUDGETS = ("budget_ms", "ttft_ms", "on_budget", "min_point", "max_kl")
OTHERS = ("point", "sampling", "prompt_logprobs", "salt", "speculate", *BUDGETS)
SAMPLING = tuple(field.name for field in fields(SamplingParams))
DEFAULT_MAX_TOKENS = SamplingParams().max_tokens
MAX_BUDGET_MS = 86_400_000


class RequestMaker:
    """Makes the requests of one model."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        max_context: int,
        before_budget: Callable[[], object] | None = None,
    ) -> None:
        """`before_budget` is called before the clock of a request with a budget starts."""
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_context = max_context
        self._before_budget = before_budget
        self._close: SentenceClose | None = None

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Ids of a prompt: text is encoded with the model's BOS, ids are taken as they are."""
        if isinstance(prompt, str):
            tokenizer = self.need_tokenizer()
            return [*tokenizer.prefix_ids, *tokenizer.encode_part(prompt, True)]
        return token_ids("prompt", prompt)

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises `InputError` if the checkpoint has none."""
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer: give token ids instead of text", param="prompt")
        return self.tokenizer

    def generation(self, prompt_ids: list[int], options: Mapping[str, Any], **more: Any) -> EngineRequest:
        """A request to generate. `options` are the keyword arguments of `LLM.generate`.

        Raises `InputError` for a name that is not known, and whatever the constraint's compiler refuses.
        """
        for name in options:
            if name not in SAMPLING and name not in CONSTRAINTS and name not in OTHERS:
                raise InputError(f"{name!r:.60} is not a parameter", param=str(name)[:60])
        budget = self.budget(options)
        sampling = self._sampling(options, len(prompt_ids))
        return EngineRequest(
            prompt_ids,
            sampling=sampling,
            point=options.get("point"),
            stop=self.matcher(sampling.stop, prompt_ids),
            prompt_logprobs=options.get("prompt_logprobs"),
            close=self.sentence_close() if budget.get("deadline_ns") is not None else None,
            salt=options.get("salt", b""),
            speculate=options.get("speculate"),
            **self._constraint(options),
            **budget,
            **more,
        )

    def budget(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What `options` say about time, as fields of an `EngineRequest`. The clock starts here."""
        if self._before_budget is not None and any(options.get(name) is not None for name in ("budget_ms", "ttft_ms")):
            self._before_budget()
        arrival = time.monotonic_ns()
        fields: dict[str, Any] = {
            "arrival_ns": arrival,
            "deadline_ns": _deadline("budget_ms", options.get("budget_ms"), arrival),
            "ttft_deadline_ns": _deadline("ttft_ms", options.get("ttft_ms"), arrival),
        }
        given = {name: options[name] for name in ("on_budget", "min_point", "max_kl") if options.get(name) is not None}
        return fields | given

    def budget_of_choice(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """As `budget` for a choice, whose first token is its whole answer. Raises `InputError` for any other name."""
        return self._whole_budget(options, "a choice")

    def embedding(self, text: str | Sequence[int], point: str | None, budget: Mapping[str, Any]) -> EngineRequest:
        """A request to embed a text, in which special tokens are text; `budget` as for a choice."""
        if isinstance(text, str):
            tokenizer = self.need_tokenizer()
            ids = [*tokenizer.prefix_ids, *tokenizer.encode_part(text, False)]
        else:
            ids = token_ids("text", text)
        return EngineRequest(ids, work="embed", point=point, **self._whole_budget(budget, "an embedding"))

    def _whole_budget(self, options: Mapping[str, Any], what: str) -> dict[str, Any]:
        for name in options:
            if name not in BUDGETS or name == "ttft_ms":
                raise InputError(f"{name!r:.60} is not a parameter of {what}", param=str(name)[:60])
        return self.budget(options)

    def sentence_close(self) -> SentenceClose | None:
        """Where an answer may end when its time runs out; None without a tokenizer."""
        if self._close is None and self.tokenizer is not None:
            from haomiao.text.sentence import SentenceEnds

            self._close = SentenceEnds(self.tokenizer, self.vocab_size)
        return self._close

    def _sampling(self, options: Mapping[str, Any], prompt_tokens: int) -> SamplingParams:
        """`sampling` and the single parameters, which win; max_tokens defaults to what fits."""
        base = options.get("sampling")
        if base is not None and not isinstance(base, SamplingParams):
            raise InputError("sampling must be a SamplingParams", param="sampling")
        single = {name: value for name, value in options.items() if name in SAMPLING}
        if isinstance(single.get("stop"), str):
            single["stop"] = (single["stop"],)
        for name in ("stop", "stop_token_ids"):
            if isinstance(single.get(name), list):
                single[name] = tuple(single[name])
        if base is None and "max_tokens" not in single:
            single["max_tokens"] = max(1, min(DEFAULT_MAX_TOKENS, self.max_context - prompt_tokens))
        return replace(base or SamplingParams(), **single)

    def matcher(self, stops: Sequence[str], prompt_ids: list[int]) -> Callable[[], StopMatcher] | None:
        """Makes what turns tokens into text and finds the stop strings in it."""
        if self.tokenizer is None:
            return None
        from haomiao.text.detokenize import Detokenizer
        from haomiao.text.stops import StopStrings

        tokenizer = self.tokenizer
        if self.vocab_size <= tokenizer.vocab_size:
            return lambda: StopStrings(Detokenizer(tokenizer, after=prompt_ids), stops)
        known = [token_id for token_id in prompt_ids if token_id < tokenizer.vocab_size]
        return lambda: _Padded(StopStrings(Detokenizer(tokenizer, after=known), stops), tokenizer.vocab_size)

    def _constraint(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What the answer must look like; at most one of the ways to say it."""
        asked = [name for name in CONSTRAINTS if options.get(name) not in (None, False)]
        if not asked:
            return {}
        if len(asked) > 1:
            raise InputError(f"only one of {' and '.join(asked)} can be asked for", param=asked[1])
        return self.constrained(asked[0], None if asked[0] == "json_object" else options[asked[0]])

    def constrained(self, kind: Any, value: Any) -> dict[str, Any]:
        """A constraint of `text.constraint.compile_constraint`, as fields of an `EngineRequest`. Raises what that
        refuses."""
        from haomiao.text.constraint import compile_constraint
        from haomiao.text.finite import all_answers

        tokenizer = self.need_tokenizer()
        constraint = compile_constraint(tokenizer, kind, value, vocab_size=self.vocab_size)
        return {
            "constraint": constraint,
            "all_answers": lambda: all_answers(tokenizer, constraint, kind, value),
        }

    def options_of(
        self, prompt: str | Sequence[int], options: Sequence[str]
    ) -> tuple[list[int], list[tuple[int, ...]]]:
        """Token ids of a prompt and of its possible continuations.

        Each continuation is encoded together with the prompt, as the model would have seen it; where that changes the
        prompt's last tokens, the prompt is cut back to what all of them share. Labels that the model was fine-tuned to
        choose among are their codes.
        """
        if isinstance(options, str) or not all(isinstance(option, str) and option for option in options):
            raise InputError("options must be a sequence of strings that are not empty", param="options")
        if not options:
            raise InputError("options is empty", param="options")
        tokenizer = self.need_tokenizer()
        codes = tokenizer.codes(options)
        if codes is not None:
            return self.prompt_ids(prompt), [tuple(code) for code in codes]
        if not isinstance(prompt, str):
            return self.prompt_ids(prompt), [tuple(tokenizer.encode_part(option, False)) for option in options]
        return shared_beginning(self.prompt_ids(prompt), [self.prompt_ids(prompt + option) for option in options])


def shared_beginning(prompt: list[int], wholes: list[list[int]]) -> tuple[list[int], list[tuple[int, ...]]]:
    """The longest beginning of `prompt` that all of `wholes` begin with, and the rest of each."""
    common = len(prompt)
    for whole in wholes:
        common = min(common, len(whole) - 1)
        while prompt[:common] != whole[:common]:
            common -= 1
    return prompt[:common], [tuple(whole[common:]) for whole in wholes]


def token_ids(name: str, ids: Any) -> list[int]:
    """A list of plain ints out of any sequence or array of whole numbers. Raises `InputError`."""
    if isinstance(ids, (str, bytes, Mapping)) or not hasattr(ids, "__iter__"):
        raise InputError(f"{name} must be text or a sequence of token ids, not {type(ids).__name__}", param=name)
    out = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if not isinstance(out, list) or not all(type(each) is int for each in out):
        converted = [_plain(name, each) for each in (out if isinstance(out, list) else [out])]
        return converted
    return out


def _plain(name: str, value: Any) -> int:
    import operator

    if isinstance(value, bool):
        raise InputError(f"{name} holds {value}, which is not a token id", param=name)
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name} holds {value!r:.40}, which is not a token id", param=name) from None


def _deadline(name: str, milliseconds: Any, arrival: int) -> int | None:
    """An absolute deadline out of a budget."""
    if milliseconds is None:
        return None
    fine = isinstance(milliseconds, (int, float)) and not isinstance(milliseconds, bool)
    if not fine or not 0 < milliseconds <= MAX_BUDGET_MS:
        raise InputError(f"{name} must be a number of milliseconds more than 0, not {milliseconds!r:.40}", param=name)
    return arrival + int(milliseconds * 1e6)


class _Padded:
    """A matcher for a model whose head is wider than the vocabulary: what lies beyond stands for no text."""

    def __init__(self, inner: StopMatcher, vocab_size: int) -> None:
        self._inner = inner
        self._vocab_size = vocab_size

    def push(self, token_id: int) -> str:
        """As `StopMatcher.push`."""
        return self._inner.push(token_id) if token_id < self._vocab_size else ""

    def flush(self) -> str:
        """As `StopMatcher.flush`."""
        return self._inner.flush()

    @property
    def stopped(self) -> str | None:
        """As `StopMatcher.stopped`."""
        return self._inner.stopped


class ChatPrompts:
    """Prompts of conversations, as the checkpoint's own template writes them (ChatML if it has none)."""

    def __init__(self, maker: RequestMaker) -> None:
        self._maker = maker
        self._template: ChatTemplate | None = None

    def ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
    ) -> list[int]:
        """Ids of a conversation, up to where the answer begins. Raises `InputError` and `TemplateError`."""
        from haomiao.text.template import ChatTemplate, encode_chat

        tokenizer = self._maker.need_tokenizer()
        if self._template is None:
            self._template = ChatTemplate.of(tokenizer)
        return encode_chat(tokenizer, self._template, messages, tools=tools, **dict(variables or {}))
