"""Where a text may end when its time runs out: at the end of a sentence. Implements `types.SentenceClose`.

By punctuation, in the scripts that close sentences with it: a full stop that a digit or a single letter precedes does
not count. Knows nothing about time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from haomiao.text.tokenizer import Tokenizer
from haomiao.types import U32

ENDS = ".!?\u2026\u3002\uff01\uff1f\uff0e\u0964\u061f\u06d4"
"""Full stops, exclamation and question marks, ellipsis; Chinese, Japanese, Hindi, Arabic and Urdu ones."""
CLOSERS = "\"')]}\u00bb\u201d\u2019\u300d\u300f\uff09\u3011\u300b*_`"
"""What may follow them."""
CANDIDATES = tuple(
    before + end + after
    for before in ("", " ")
    for end in (".", "!", "?", "\u3002", "\uff01", "\uff1f", "\u2026")
    for after in ("", '"', "\u201d", "\n", "\n\n")
)


class SentenceEnds:
    """The sentence ends of one tokenizer; `vocab_size` is the model's, which may be greater."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._mask: U32 | None = None

    def is_complete(self, token_ids: Sequence[int]) -> bool:
        """True if the text of `token_ids` ends with a sentence."""
        known = [token_id for token_id in token_ids if 0 <= token_id < self._tokenizer.vocab_size]
        return ends_sentence(self._tokenizer.decode(known))

    def mask(self) -> U32:
        """Tokens that end a sentence by themselves, uint32 [(vocab + 31) // 32]."""
        if self._mask is None:
            words = np.zeros((self._vocab_size + 31) // 32, dtype=np.uint32)
            for text in CANDIDATES:
                ids = self._tokenizer.encode_part(text, False)
                if len(ids) == 1 and ids[0] < self._vocab_size:
                    words[ids[0] // 32] |= np.uint32(1 << (ids[0] % 32))
            self._mask = words
        return self._mask


def ends_sentence(text: str) -> bool:
    """True if `text` ends with a sentence, closing quotes, brackets and white space aside."""
    bare = text.rstrip()
    bare = bare.rstrip(CLOSERS)
    if not bare or bare[-1] not in ENDS:
        return False
    word = bare[:-1].split()[-1] if bare[:-1].split() else ""
    if bare[-1] == "." and not text[len(text.rstrip()) :].count("\n"):
        # 3. and J. go on more often than not; so does an abbreviation such as e.g.
        return not (word[-1:].isdigit() or (len(word) == 1 and word.isalpha() and word.isascii()) or "." in word[:-1])
    return True
