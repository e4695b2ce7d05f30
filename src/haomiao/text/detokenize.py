"""Token ids to text, one at a time: whole characters only, and the same text as decoding all ids at once.

Knows nothing about how the ids came to be.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from haomiao.text.tokenizer import Tokenizer

_DECODER = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Incremental decoding of one sequence.

    The concatenation of everything that `push` and `flush` return equals `tokenizer.decode(ids)`, where `ids` are the
    ids pushed. A character is emitted with the token that completes it; malformed bytes become U+FFFD as soon as they
    are known to be malformed. Constant time per token.

    `after` are ids that stand before the first one pushed (a prompt). They emit nothing; only the rule about the
    leading space looks at them: the space between a prompt and its continuation is kept.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, after: Iterable[int] = ()) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._skipped: frozenset[int] = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = _DECODER("replace")
        self._drop_space = tokenizer.strips_leading_space and not any(
            id_ not in self._skipped and self._token_bytes(id_) for id_ in after
        )

    def push(self, token_id: int) -> str:
        """Text that is now certain; often empty in the middle of a character. Raises `InputError` for an unknown id."""
        data = self._token_bytes(token_id)
        if token_id in self._skipped or not data:
            return ""
        if self._drop_space:
            self._drop_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What an unfinished character leaves (U+FFFD), when no further token will come."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
