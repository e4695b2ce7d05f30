"""The encoder of vocabularies made of scored pieces: special tokens, normalization, segmentation, byte fallback.

Knows nothing about files. Two manners exist, and a vocabulary says which it follows (`raw_user_defined`): SentencePiece
normalizes first and then finds user-defined pieces; llama.cpp finds them in the text as written, and puts the dummy
space after every special token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from haomiao.errors import ModelError
from haomiao.text import library
from haomiao.text.decoding import SPACE, TokenBytes
from haomiao.text.normalizing import Normalizer
from haomiao.text.parts import Parts
from haomiao.text.segmenting import MergeSegmenter, Segmenter, UnigramSegmenter
from haomiao.text.sentencepiece_model import SentencePieceModel, serialize
from haomiao.text.vocabulary import PieceType, Vocabulary


class PieceEncoder:
    """`parts.Encoder` for SentencePiece BPE (`unigram=False`) and unigram vocabularies."""

    def __init__(self, vocabulary: Vocabulary, unigram: bool) -> None:
        tokens = vocabulary.tokens
        controls = vocabulary.of_type(PieceType.CONTROL, PieceType.UNKNOWN)
        defined = vocabulary.of_type(PieceType.USER_DEFINED)
        self._ids = {tokens[id_]: id_ for id_ in (*controls, *defined)}
        self._rstrip = vocabulary.rstrip_ids
        self._raw = vocabulary.raw_user_defined
        always = _alternation(tokens[id_] for id_ in defined)
        asked = _alternation(tokens[id_] for id_ in (controls + defined if self._raw else controls))
        self._in_content = always if self._raw else None
        self._in_prompts = asked
        self._in_normalized = None if self._raw else always
        self._normalize = Normalizer(vocabulary, self._in_normalized)
        self._segmenter: Segmenter = UnigramSegmenter(vocabulary) if unigram else MergeSegmenter(vocabulary)
        self._bytes = _byte_ids(vocabulary)
        self._lengths = [len(token) for token in tokens]
        self._unk = vocabulary.unk_id
        if self._bytes is None and self._unk is None:
            raise ModelError("the vocabulary has neither byte tokens nor an unknown token")

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of `text`, without BOS and EOS. Control tokens are recognised only if `special`."""
        pattern = self._in_prompts if special else self._in_content
        ids: list[int] = []
        start = 0
        for match in pattern.finditer(text) if pattern is not None else ():
            if match.start() > start:
                self._plain(text[start : match.start()], ids)
            id_ = self._ids[match[0]]
            ids.append(id_)
            start = match.end()
            if id_ in self._rstrip:
                while start < len(text) and text[start] in " \t\n\v\f\r":
                    start += 1
        if start < len(text):
            self._plain(text[start:], ids)
        return ids

    def _plain(self, text: str, ids: list[int]) -> None:
        """Append the ids of text without special tokens."""
        normalized = self._normalize(text)
        start = 0
        for match in self._in_normalized.finditer(normalized) if self._in_normalized is not None else ():
            self._segment(normalized[start : match.start()], ids)
            ids.append(self._ids[match[0]])
            start = match.end()
        self._segment(normalized[start:], ids)

    def _segment(self, text: str, ids: list[int]) -> None:
        if not text:
            return
        found = self._segmenter.segment(text)
        if -1 not in found:
            ids += found
            return
        ids += self._fall_back(text, found)

    def _fall_back(self, text: str, found: list[int]) -> list[int]:
        """Replace each -1 by the bytes of its character, or runs of them by one unknown token."""
        lengths = self._lengths
        ids: list[int] = []
        at = 0
        unknown_before = False
        for id_ in found:
            if id_ >= 0:
                ids.append(id_)
                at += lengths[id_]
                unknown_before = False
                continue
            if self._bytes is not None:
                ids += [self._bytes[byte] for byte in text[at].encode("utf-8")]
            elif not unknown_before and self._unk is not None:
                ids.append(self._unk)
            unknown_before = True
            at += 1
        return ids


def _alternation(texts: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that finds any of `texts`, the longest where several begin; None if there are none."""
    ordered = sorted((text for text in texts if text), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _byte_ids(vocabulary: Vocabulary) -> list[int] | None:
    """Byte -> id of its token; None unless all 256 exist."""
    byte_of = TokenBytes({"type": "ByteFallback"}).of
    found: dict[int, int] = {}
    for id_ in vocabulary.of_type(PieceType.BYTE):
        value = byte_of(vocabulary.tokens[id_])
        if len(value) == 1:
            found[value[0]] = id_
    return [found[byte] for byte in range(256)] if len(found) == 256 else None


def bytes_of_pieces(vocabulary: Vocabulary) -> dict[int, bytes]:
    """What each piece stands for: bytes, text with visible spaces made plain, or a special token's own text."""
    byte_of = TokenBytes({"type": "ByteFallback"}).of
    values: dict[int, bytes] = {}
    for id_, (token, type_) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if type_ == PieceType.BYTE:
            values[id_] = byte_of(token)
        elif type_ in (PieceType.CONTROL, PieceType.UNKNOWN) or (
            type_ == PieceType.USER_DEFINED and vocabulary.raw_user_defined
        ):
            values[id_] = token.encode("utf-8", "replace")
        else:
            values[id_] = token.replace(SPACE, " ").encode("utf-8", "replace")
    return values


def scored_parts(model: SentencePieceModel) -> Parts:
    """Everything about a vocabulary of scored pieces but BOS and EOS."""
    vocabulary = model.vocabulary
    return Parts(
        build=lambda: library.scored(vocabulary, model.unigram),
        tokens=vocabulary.tokens,
        encoder=PieceEncoder(vocabulary, model.unigram),
        special_ids=frozenset(vocabulary.of_type(PieceType.CONTROL, PieceType.UNKNOWN)),
        matched_ids=frozenset(vocabulary.of_type(PieceType.USER_DEFINED)),
        token_bytes=bytes_of_pieces(vocabulary),
        strip_leading_space=vocabulary.add_dummy_prefix and not vocabulary.whitespace_as_suffix,
        exact_model=lambda: serialize(model),
        exact_flags={"raw_user_defined": vocabulary.raw_user_defined, "rstrip_ids": sorted(vocabulary.rstrip_ids)},
    )
