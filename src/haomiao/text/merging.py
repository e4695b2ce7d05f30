"""Byte-level BPE over a `Table`: the library's own cutting and added tokens, our merging.

The library cuts text into words with the tokenizer's own normalizer, pre-tokenizer and added tokens, over a vocabulary
of the 256 bytes alone, which costs it nothing to load; what it would do with each word then (Sennrich et al. 2016:
merge the pair of lowest rank, the leftmost of several, until none is left) is done here on the mapped table. Ids are
those of the library; tests compare them. Knows nothing about files.
"""

from __future__ import annotations

import json
import threading
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from haomiao.errors import InputError, ModelError
from haomiao.text.decoding import byte_alphabet
from haomiao.text.parts import MAX_TOKEN_ID, guarded
from haomiao.text.table import Table

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

CACHED_WORDS = 1 << 14
MAX_WORD_BYTES = 512
"""Merging here is quadratic in a word's length; a longer word is the library's."""
MAX_CHARACTERS = 1 << 16
"""The library takes about 1 us a character less, and half a second to load: it is worth its load for longer texts."""


class TooLong(Exception):
    """Text that the library is better at."""


class MergeEncoder:
    """`parts.Encoder` for plain byte-level BPE. Raises `ModelError` for a table that contradicts itself."""

    def __init__(self, table: Table) -> None:
        self._table = table
        about = table.about
        with guarded(table.name):
            self.added = {token["id"]: _added_token(token) for token in about["added"]}
            self._alphabet: list[int] = [int(id_) for id_ in about["alphabet"]]
            self._cutter = _cutter(about)
            self._added_ids = _add(self._cutter, self.added)
            known = (*self._alphabet, *self.added)
            if len(self._alphabet) != 256 or not all(type(id_) is int and 0 <= id_ <= MAX_TOKEN_ID for id_ in known):
                raise ModelError("its alphabet or its added tokens are wrong")
            self.around = tuple(about["prefix"]), tuple(about["suffix"])
            """What the tokenizer's post-processor puts first and last."""
            if not all(self.text_of(id_) is not None for ids in self.around for id_ in ids):
                raise ModelError("it puts tokens first or last that do not exist")
        self._by_text = {token.content: id_ for id_, token in self.added.items()}
        self._whole_words = about.get("whole_words") is True
        self._spell = {byte: character for character, byte in byte_alphabet().items()}
        self._lock = threading.Lock()  # `encode_special_tokens` is a switch of the shared cutter
        self._word = lru_cache(CACHED_WORDS)(self._merge)

    @property
    def vocab_size(self) -> int:
        """One more than the greatest id."""
        return max(self._table.tokens, max(self.added, default=-1) + 1)

    def id_of(self, text: str) -> int | None:
        """The id of a token's text, added or not."""
        id_ = self._by_text.get(text)
        return self._table.id_of(text) if id_ is None else id_

    def text_of(self, id_: int) -> str | None:
        """A token's text, None where no token has this id."""
        token = self.added.get(id_)
        return self._table.text_of(id_) if token is None else str(token.content)

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of `text` without BOS or EOS; special tokens in it are recognised only if `special`. Raises `TooLong`."""
        if len(text) > MAX_CHARACTERS:
            raise TooLong
        with self._lock, guarded("the tokenizer cannot encode this text", InputError):
            self._cutter.encode_special_tokens = not special
            cut = self._cutter.encode(text, add_special_tokens=False)
            units, words = cut.ids, cut.word_ids
        ids: list[int] = []
        begin, count = 0, len(units)
        try:
            while begin < count:
                if units[begin] > 255:
                    ids.append(self._added_ids[units[begin]])
                    begin += 1
                    continue
                end = begin + 1
                while end < count and words[end] == words[begin] and units[end] <= 255:
                    end += 1
                ids += self._word(bytes(units[begin:end]))
                begin = end
        except (IndexError, KeyError) as error:
            raise ModelError(f"{self._table.name}: an id is beyond its vocabulary") from error
        return ids

    def _merge(self, word: bytes) -> tuple[int, ...]:
        """The ids of one word."""
        if self._whole_words:
            whole = self._table.id_of("".join(map(self._spell.__getitem__, word)))
            if whole is not None:
                return (whole,)
        if len(word) > MAX_WORD_BYTES:
            raise TooLong
        merge = self._table.merge
        ids = [self._alphabet[byte] for byte in word]
        pairs = [merge(left, right) for left, right in pairwise(ids)]
        while True:
            best, at = None, -1
            for index, found in enumerate(pairs):
                if found is not None and (best is None or found[0] < best[0]):
                    best, at = found, index
            if best is None:
                return tuple(ids)
            ids[at : at + 2] = [best[1]]
            del pairs[at]
            if at:
                pairs[at - 1] = merge(ids[at - 1], ids[at])
            if at < len(pairs):
                pairs[at] = merge(ids[at], ids[at + 1])


def _cutter(about: dict[str, Any]) -> Backend:
    """The library's tokenizer over single bytes: unit `b` stands for byte `b`."""
    from tokenizers import Tokenizer as Backend

    model = {"type": "BPE", "vocab": byte_alphabet(), "merges": []}
    parts = {key: about.get(key) for key in ("normalizer", "pre_tokenizer")}
    return Backend.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model, **parts}))


def _added_token(token: dict[str, Any]) -> AddedToken:
    from tokenizers import AddedToken

    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(token["content"], **{flag: bool(token[flag]) for flag in flags})


def _add(cutter: Backend, added: dict[int, AddedToken]) -> dict[int, int]:
    """Give the cutter its added tokens, in the order of their ids; its id -> theirs."""
    run: list[AddedToken] = []
    for token in [*added.values(), None]:
        if run and (token is None or token.special != run[-1].special):
            (cutter.add_special_tokens if run[-1].special else cutter.add_tokens)(run)
            run = []
        if token is not None:
            run.append(token)
    # a single character of the byte alphabet that is also an added token keeps the id of its byte
    units = ((cutter.token_to_id(token.content), id_) for id_, token in added.items())
    return {unit: id_ for unit, id_ in units if unit is not None}
