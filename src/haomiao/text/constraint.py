"""Grammars over token ids: JSON schema, JSON object, regular expression, Lark grammar, choice.

Implements `types.TokenConstraint` on llguidance. Knows nothing about models or sampling. A source is checked against
our own limits before it is compiled (a list of 100,000 alternatives costs llguidance a second to refuse), then compiled
under lowered limits of llguidance, in fuel rather than time, so that the outcome does not depend on the machine. The
tokenizer's trie is built once per `Tokenizer`, compiled grammars are kept in a small LRU and forked.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np

from haomiao.errors import ConstraintError, InputError
from haomiao.text.closing import Closer
from haomiao.text.tokenizer import Tokenizer, check_text
from haomiao.types import U32

Kind: TypeAlias = Literal["json_schema", "json_object", "regex", "grammar", "choice"]
KINDS = ("json_schema", "json_object", "regex", "grammar", "choice")
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,16}"
"""Between JSON tokens; bounded, or a model could write white space for ever."""


@dataclass(frozen=True, slots=True)
class ConstraintLimits:
    """What a source and its compiled form may cost. Fuel figures are llguidance's own units (its documentation: about
    50,000 a millisecond while compiling, 14,000 a millisecond per step)."""

    source_bytes: int = 64 << 10
    depth: int = 64
    """Nesting of a JSON schema, and of groups in a regular expression."""
    nodes: int = 16384
    """Objects, lists and scalars in a JSON schema."""
    choices: int = 1024
    """Options of a choice, or values of one `enum`."""
    regex_characters: int = 4096
    compile_fuel: int = 500_000
    step_fuel: int = 60_000
    step_items: int = 20_000
    lexer_states: int = 50_000
    grammar_symbols: int = 50_000
    row_items: int = 1000
    cached: int = 128
    """Compiled grammars that are kept per tokenizer."""


DEFAULT_LIMITS = ConstraintLimits()


class GrammarConstraint:
    """One sequence's position in a grammar. Not safe for use from two threads at once."""

    def __init__(self, grammars: _Grammars, matcher: Any, vocab_size: int) -> None:
        self._grammars = grammars
        self._matcher = matcher
        self._vocab = vocab_size
        self._accepted: list[int] = []
        self._mask: U32 | None = None
        self._close: list[int] | None = None

    def mask(self) -> U32:
        """Allowed next tokens, uint32 [(vocab + 31) // 32]. Raises `ConstraintError` if the grammar became too complex.

        Where the answer may end, the tokens that end it are allowed; after one of them nothing else is.
        """
        if self._mask is None:
            self._mask = self._compute_mask()
        return self._mask.copy()

    def _compute_mask(self) -> U32:
        words = np.zeros((self._vocab + 31) // 32, dtype=np.uint32)
        complete = self.is_complete()
        if not self._ended() and not self._matcher.is_stopped():
            found = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint32)
            self._check()
            words[: self._grammars.words] = found[: self._grammars.words]  # llguidance rounds up generously
        for id_ in self._grammars.eos_ids:
            bit = np.uint32(1 << (id_ % 32))
            words[id_ // 32] = words[id_ // 32] | bit if complete else words[id_ // 32] & ~bit
        return words

    def accept(self, token_id: int) -> bool:
        """Advance. False, and no change, if the token is not allowed."""
        if not 0 <= token_id < self._grammars.vocab_size or self._ended():
            return False
        if token_id in self._grammars.eos_ids:
            if not self.is_complete():
                return False
        elif self._matcher.is_stopped() or self._matcher.try_consume_tokens([token_id]) != 1:
            self._check()
            return False
        self._accepted.append(token_id)
        self._mask = self._close = None
        return True

    def rollback(self, tokens: int) -> None:
        """Take the last `tokens` accepted tokens back. Raises `ConstraintError` if there are not so many."""
        if not 0 <= tokens <= len(self._accepted):
            raise ConstraintError(f"cannot take {tokens} tokens back of {len(self._accepted)}")
        if tokens == 0:
            return
        taken = self._accepted[-tokens:]
        del self._accepted[-tokens:]
        inner = sum(id_ not in self._grammars.eos_ids for id_ in taken)
        if inner and not self._matcher.rollback(inner):
            self._check()
        self._mask = self._close = None

    def tokens_to_close(self) -> Sequence[int]:
        """A short continuation that completes the answer validly; empty if it may end here.

        Found by a bounded search over single characters, then written in as few tokens as the tokenizer knows. Raises
        `ConstraintError` if the search finds none (a required text too long to be worth writing).
        """
        if self._close is None:
            self._close = [] if self.is_complete() else self._grammars.closer.close(self._matcher)
        return list(self._close)

    def is_complete(self) -> bool:
        """True if the answer may end here."""
        return self._ended() or bool(self._matcher.is_accepting())

    def takes(self, token_ids: Sequence[int]) -> bool:
        """True if these tokens, none of which ends the answer, complete it from here. Advances nothing."""
        trial = self._matcher.deep_copy()
        return bool(trial.try_consume_tokens(list(token_ids)) == len(token_ids) and trial.is_accepting())

    def longest_tokens(self, text: str) -> list[int]:
        """A text in the longest tokens there are, without what the tokenizer puts in front of a text."""
        return list(self._grammars.trie.greedy_tokenize(text))

    def fork(self) -> GrammarConstraint:
        """An independent copy at the same position."""
        copy = GrammarConstraint(self._grammars, self._matcher.deep_copy(), self._vocab)
        copy._accepted = list(self._accepted)
        copy._mask, copy._close = self._mask, self._close
        return copy

    def _ended(self) -> bool:
        return bool(self._accepted) and self._accepted[-1] in self._grammars.eos_ids

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(f"the constraint cannot go on: {_first_line(self._matcher.get_error())}")


class _Grammars:
    """llguidance's view of one tokenizer, and the grammars compiled for it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from llguidance import LLTokenizer
        from llguidance._tokenizer import TokenizerWrapper

        self.vocab_size = tokenizer.vocab_size
        self.words = (tokenizer.vocab_size + 31) // 32
        self.eos_ids = frozenset(tokenizer.eos_ids)
        tokens = [tokenizer.token_bytes(id_) for id_ in range(tokenizer.vocab_size)]
        if not self.eos_ids:
            raise ConstraintError("this tokenizer has no end-of-sequence token, so an answer could not end")
        wrapper = TokenizerWrapper(_Words(tokens, tokenizer))
        try:
            self.trie = LLTokenizer(wrapper, n_vocab=self.vocab_size, eos_token=list(tokenizer.eos_ids))
        except (ValueError, RuntimeError, TypeError) as error:
            raise ConstraintError(f"this tokenizer cannot be constrained: {_first_line(str(error))}") from error
        special = tokenizer.special_ids
        single = {
            data: id_ for id_, data in enumerate(tokens) if len(data) == 1 and data[0] < 0x80 and id_ not in special
        }
        self.closer = Closer(single, self.trie.greedy_tokenize)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[tuple[str, str, ConstraintLimits], Any] = OrderedDict()

    def matcher(self, kind: str, source: str, limits: ConstraintLimits) -> Any:
        """A fresh matcher at the start of the grammar."""
        key = (kind, source, limits)
        with self._lock:
            found = self._compiled.get(key)
            if found is not None:
                self._compiled.move_to_end(key)
                return found.deep_copy()
        made = _compile(self.trie, kind, source, limits)
        with self._lock:
            self._compiled[key] = made
            while len(self._compiled) > limits.cached:
                self._compiled.popitem(last=False)
        return made.deep_copy()


class _Words:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, tokens: list[bytes], tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.eos_ids[0]
        self.bos_token_id = tokenizer.bos_id
        self.tokens = tokens
        self.special_token_ids = sorted(tokenizer.special_ids | set(tokenizer.eos_ids))
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("text, not bytes")
        return self._tokenizer.encode(text)


_known: WeakKeyDictionary[Tokenizer, _Grammars] = WeakKeyDictionary()
_known_lock = threading.Lock()


def prepare(tokenizer: Tokenizer) -> None:
    """Build what constraints need of a tokenizer now: about a second for 150,000 tokens, that no request waits for."""
    _grammars_of(tokenizer)


def compile_constraint(
    tokenizer: Tokenizer,
    kind: Kind,
    value: Any = None,
    *,
    limits: ConstraintLimits = DEFAULT_LIMITS,
    vocab_size: int | None = None,
) -> GrammarConstraint:
    """A constraint at its start.

    `value` by kind: json_schema a schema (object or JSON text), json_object nothing, regex a pattern that the whole
    answer matches, grammar a Lark grammar, choice a list of strings. `vocab_size` is the width of the model's head
    where it exceeds the tokenizer's vocabulary; ids beyond the vocabulary are never allowed. Raises `ConstraintError`
    for what is malformed, unsupported (look-around, remote `$ref`) or beyond `limits`.
    """
    source = _source(kind, value, limits)
    grammars = _grammars_of(tokenizer)
    return GrammarConstraint(
        grammars, grammars.matcher(kind, source, limits), max(vocab_size or 0, grammars.vocab_size)
    )


def _grammars_of(tokenizer: Tokenizer) -> _Grammars:
    with _known_lock:
        found = _known.get(tokenizer)
        if found is None:
            found = _known[tokenizer] = _Grammars(tokenizer)
        return found


# ---- sources --------------------------------------------------------------------------------------------------------


def _source(kind: str, value: Any, limits: ConstraintLimits) -> str:
    """The text that is compiled, checked against the limits."""
    if kind == "json_object":
        return '{"type": "object"}'
    if kind == "json_schema":
        return _schema(value, limits)
    if kind == "choice":
        return _choice(value, limits)
    if kind not in ("regex", "grammar"):
        raise ConstraintError(f"unknown kind of constraint {str(kind)[:40]!r}; it is one of {', '.join(KINDS)}")
    if not isinstance(value, str) or not value:
        raise ConstraintError(f"a {kind} must be a non-empty string")
    _check_text(value, limits.source_bytes, f"the {kind}")
    if kind == "regex":
        if len(value) > limits.regex_characters:
            raise ConstraintError(f"the regex has {len(value)} characters, more than {limits.regex_characters}")
        _check_groups(value, limits.depth)
    return value


def _schema(value: Any, limits: ConstraintLimits) -> str:
    if isinstance(value, (str, bytes)):
        if len(value) > limits.source_bytes:
            raise ConstraintError(f"the schema is longer than {limits.source_bytes} bytes")
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ConstraintError(f"the schema is not valid JSON: {_first_line(str(error))}") from error
    if not isinstance(value, (Mapping, bool)):
        raise ConstraintError("the schema must be a JSON object")
    _check_tree(value, limits)
    try:
        source = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConstraintError(f"the schema is not JSON: {_first_line(str(error))}") from error
    _check_text(source, limits.source_bytes, "the schema")
    return source


def _check_tree(value: Any, limits: ConstraintLimits) -> None:
    """Depth, size and lengths of a schema, without recursion."""
    nodes = 0
    level: list[Any] = [value]
    for depth in range(limits.depth + 1):
        if not level:
            return
        nodes += len(level)
        if nodes > limits.nodes:
            raise ConstraintError(f"the schema has more than {limits.nodes} parts")
        following: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                following += item.values()
            elif isinstance(item, (list, tuple)):
                if len(item) > limits.choices:
                    raise ConstraintError(f"the schema holds a list of {len(item)} values, more than {limits.choices}")
                following += item
            elif isinstance(item, str) and len(item) > limits.regex_characters:
                raise ConstraintError(f"the schema holds a string longer than {limits.regex_characters} characters")
        level = following
        if depth == limits.depth and level:
            raise ConstraintError(f"the schema is nested deeper than {limits.depth}")


def _choice(value: Any, limits: ConstraintLimits) -> str:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not value:
        raise ConstraintError("a choice must be a non-empty list of strings")
    if len(value) > limits.choices:
        raise ConstraintError(f"a choice of {len(value)} options, more than {limits.choices}")
    for option in value:
        if not isinstance(option, str) or not option:
            raise ConstraintError("every option of a choice must be a non-empty string")
    source = "start: OPTION\nOPTION: " + " | ".join(json.dumps(option, ensure_ascii=False) for option in value)
    _check_text(source, limits.source_bytes, "the choice")
    return source


def _check_text(text: str, limit: int, what: str) -> None:
    try:
        check_text(text)
    except InputError as error:
        raise ConstraintError(f"{what}: {error}") from error
    if len(text.encode("utf-8")) > limit:
        raise ConstraintError(f"{what} is longer than {limit} bytes")


def _check_groups(pattern: str, limit: int) -> None:
    depth = 0
    for character in pattern:
        depth += (character == "(") - (character == ")")
        if depth > limit:
            raise ConstraintError(f"the regex nests groups deeper than {limit}")


def _compile(trie: Any, kind: str, source: str, limits: ConstraintLimits) -> Any:
    from llguidance import LLMatcher, LLParserLimits

    lowered = LLParserLimits(
        max_items_in_row=limits.row_items,
        initial_lexer_fuel=limits.compile_fuel,
        step_lexer_fuel=limits.step_fuel,
        step_max_items=limits.step_items,
        max_lexer_states=limits.lexer_states,
        max_grammar_size=limits.grammar_symbols,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )
    try:
        if kind in ("json_schema", "json_object"):
            grammar = LLMatcher.grammar_from_json_schema(source, overrides={"whitespace_pattern": WHITESPACE})
        elif kind == "regex":
            grammar = LLMatcher.grammar_from_regex(source)
        else:
            grammar = LLMatcher.grammar_from_lark(source)
        matcher = LLMatcher(trie, grammar, log_level=0, limits=lowered)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ConstraintError(f"{kind}: {_first_line(str(error))}") from error
    if matcher.is_error():
        raise ConstraintError(f"{kind}: {_first_line(matcher.get_error())}")
    if not matcher.is_accepting() and matcher.is_stopped():
        raise ConstraintError(f"{kind}: nothing can satisfy it")
    return matcher


def _first_line(message: str) -> str:
    return " ".join(message.split())[:200] or "refused"
