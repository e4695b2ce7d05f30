"""Sets of token ids as bits: uint32 words, bit `id % 32` of word `id // 32` (`types.TokenConstraint.mask`).

Knows nothing about grammars. Masks may be shorter than the vocabulary (the rest is not allowed) or longer (ignored).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from haomiao.types import U32


def contains(mask: U32, token_id: int) -> bool:
    """True if the token is in the set."""
    word = token_id >> 5
    return word < mask.shape[0] and bool((int(mask[word]) >> (token_id & 31)) & 1)


def with_tokens(mask: U32, token_ids: Iterable[int], allowed: bool, vocab_size: int) -> U32:
    """A copy with the tokens put in, or taken out; it covers the vocabulary."""
    words = (vocab_size + 31) // 32
    out = np.zeros(words, dtype=np.uint32)
    out[: mask.shape[0]] = mask[:words]
    if vocab_size % 32:
        out[-1] &= (1 << (vocab_size % 32)) - 1
    for token_id in token_ids:
        bit = np.uint32(1 << (token_id & 31))
        out[token_id >> 5] = out[token_id >> 5] | bit if allowed else out[token_id >> 5] & ~bit
    return out


def only_token(mask: U32) -> int | None:
    """The token of a set of one, else None."""
    words = np.flatnonzero(mask)
    if words.shape[0] != 1:
        return None
    word = int(mask[words[0]])
    return int(words[0]) * 32 + word.bit_length() - 1 if word & (word - 1) == 0 else None


def is_empty(mask: U32) -> bool:
    """True if no token is in the set."""
    return not mask.any()


def to_bool(mask: U32, vocab_size: int) -> npt.NDArray[np.bool_]:
    """The set as bool [vocab]."""
    bits = np.unpackbits(np.ascontiguousarray(mask, dtype="<u4").view(np.uint8), bitorder="little")[:vocab_size]
    if bits.shape[0] < vocab_size:
        bits = np.pad(bits, (0, vocab_size - bits.shape[0]))
    return bits.view(np.bool_)
