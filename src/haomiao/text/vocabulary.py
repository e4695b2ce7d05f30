"""A vocabulary as GGUF and SentencePiece files state it: pieces with scores and types, and how text is normalized.

Knows nothing about either format, nor about how text is segmented. Both formats use the same numbers for types.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from haomiao.errors import ModelError
from haomiao.text.parts import MAX_TOKEN_ID

MAX_TOKEN_CHARACTERS = 2048


class PieceType(IntEnum):
    """SentencePiece's `ModelProto.SentencePiece.Type`; GGUF's `tokenizer.ggml.token_type` is the same list."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(slots=True)
class Vocabulary:
    """Pieces by id. `check` must have passed before anyone trusts it."""

    tokens: list[str]
    types: Sequence[int]
    scores: Sequence[float] = ()
    """Empty for vocabularies that have merges instead."""
    unk_id: int | None = None
    charsmap: bytes = b""
    """SentencePiece's `precompiled_charsmap`; empty for none."""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    whitespace_as_suffix: bool = False
    raw_user_defined: bool = False
    """User-defined pieces are matched in the text as written (llama.cpp), not after normalization (SentencePiece)."""
    rstrip_ids: frozenset[int] = field(default_factory=frozenset)
    """Special tokens that swallow the white space after them (Phi-3)."""

    def check(self, name: str) -> None:
        """Refuse what contradicts itself. Raises `ModelError`."""
        count = len(self.tokens)
        if count == 0:
            raise ModelError(f"{name}: the vocabulary is empty")
        if count - 1 > MAX_TOKEN_ID:
            raise ModelError(f"{name}: {count} tokens are more than {MAX_TOKEN_ID + 1}")
        for what, size in (("token types", len(self.types)), ("scores", len(self.scores) or count)):
            if size != count:
                raise ModelError(f"{name}: {count} tokens but {size} {what}")
        if not all(map(math.isfinite, self.scores)):
            raise ModelError(f"{name}: a score is not a finite number")
        if self.unk_id is not None and not 0 <= self.unk_id < count:
            raise ModelError(f"{name}: the unknown token's id {self.unk_id} is outside the vocabulary")
        seen: set[str] = set()
        for token in self.tokens:
            if len(token) > MAX_TOKEN_CHARACTERS:
                raise ModelError(f"{name}: a token of {len(token)} characters, more than {MAX_TOKEN_CHARACTERS}")
            if token in seen:
                raise ModelError(f"{name}: token {token[:80]!r} appears twice in the vocabulary")
            seen.add(token)

    def of_type(self, *types: PieceType) -> list[int]:
        """Ids of the pieces of these types, ascending."""
        wanted = {int(type_) for type_ in types}
        return [id_ for id_, type_ in enumerate(self.types) if type_ in wanted]
