"""Segmentation of text into pieces with scores: SentencePiece's BPE and unigram algorithms.

Knows nothing about files. The `tokenizers` library has both models but not exactly: its BPE ranks merges where
SentencePiece scores the merged piece (a difference wherever scores are equal or a character is no piece), and its
unigram model matches control tokens in text. Both algorithms here work on chunks that no piece can cross, so that
common words are looked up rather than segmented.

Sources: Sennrich et al. 2016 and the greedy merge order of SentencePiece `bpe_model.cc` (highest score first, leftmost
among equals), which llama.cpp's SPM follows; Kudo 2018 (unigram; Viterbi), with SentencePiece's penalty of 10 for
unknown characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from typing import Protocol

from haomiao.text.decoding import SPACE
from haomiao.text.vocabulary import PieceType, Vocabulary

UNKNOWN_PENALTY = 10.0
_CACHED_CHUNKS = 1 << 16
_CACHED_LENGTH = 48
_WORDS = re.compile(f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+")
_SUFFIXED_WORDS = re.compile(f"[^{SPACE}]*{SPACE}+|[^{SPACE}]+")


class Segmenter(Protocol):
    """Normalized text to ids; -1 stands for a character that no piece covers."""

    def segment(self, text: str) -> list[int]: ...


class _Chunked:
    """Cuts text where no piece can cross, and remembers what common chunks became."""

    def __init__(self, pieces: Iterable[str], as_suffix: bool) -> None:
        mark = re.compile(f"{SPACE}[^{SPACE}]" if as_suffix else f"[^{SPACE}]{SPACE}")
        crosses = any(SPACE in piece and mark.search(piece) for piece in pieces)
        self._chunks = None if crosses else (_SUFFIXED_WORDS if as_suffix else _WORDS)
        self._known: dict[str, list[int]] = {}

    def segment(self, text: str) -> list[int]:
        """Ids of normalized text."""
        if self._chunks is None:
            return self._segment(text)
        ids: list[int] = []
        known = self._known
        for chunk in self._chunks.findall(text):
            found = known.get(chunk)
            if found is None:
                found = self._segment(chunk)
                if len(chunk) <= _CACHED_LENGTH:
                    if len(known) >= _CACHED_CHUNKS:
                        known.clear()
                    known[chunk] = found
            ids += found
        return ids

    def _segment(self, text: str) -> list[int]:
        raise NotImplementedError


class MergeSegmenter(_Chunked):
    """SentencePiece BPE: merge the neighbours whose union is the piece of highest score, leftmost first."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        types = vocabulary.types
        usable = (PieceType.NORMAL, PieceType.USER_DEFINED, PieceType.UNUSED, PieceType.UNDEFINED)
        self._pieces = {
            token: (-vocabulary.scores[id_], id_) for id_, token in enumerate(vocabulary.tokens) if types[id_] in usable
        }
        self._unused = frozenset() if vocabulary.raw_user_defined else frozenset(vocabulary.of_type(PieceType.UNUSED))
        super().__init__(self._pieces, vocabulary.whitespace_as_suffix)

    def _segment(self, text: str) -> list[int]:
        whole = self._pieces.get(text)
        if len(text) == 1:
            return [-1 if whole is None else whole[1]]
        symbols = self._merge(text)
        ids: list[int] = []
        for symbol, split in symbols:
            if split is None:
                found = self._pieces.get(symbol)
                ids.append(-1 if found is None else found[1])
            else:
                ids += split
        return ids

    def _merge(self, text: str) -> list[tuple[str, list[int] | None]]:
        """Symbols that remain after all merges; with the ids they are made of where the piece itself is unused."""
        pieces = self._pieces
        symbols: list[str] = list(text)
        count = len(symbols)
        following = list(range(1, count + 1))
        before = list(range(-1, count - 1))
        heap: list[tuple[float, int, int, int]] = []
        made_of: dict[str, tuple[str, str]] = {}

        for left in range(count - 1):
            union = symbols[left] + symbols[left + 1]
            found = pieces.get(union)
            if found is not None:
                heap.append((found[0], left, left + 1, 2))
                if found[1] in self._unused:
                    made_of[union] = (symbols[left], symbols[left + 1])
        heapify(heap)
        while heap:
            _, left, right, size = heappop(heap)
            first, second = symbols[left], symbols[right]
            if not first or not second or len(first) + len(second) != size:
                continue  # one of the two has been merged since
            merged = first + second
            symbols[left], symbols[right] = merged, ""
            after = following[right]
            following[left] = after
            if after < count:
                before[after] = left
            for start, end in ((before[left], left), (left, after)):
                if start < 0 or end >= count:
                    continue
                union = symbols[start] + symbols[end]
                found = pieces.get(union)
                if found is not None:
                    heappush(heap, (found[0], start, end, len(union)))
                    if found[1] in self._unused:
                        made_of[union] = (symbols[start], symbols[end])
        return [(symbol, self._taken_apart(symbol, made_of)) for symbol in symbols if symbol]

    def _taken_apart(self, symbol: str, made_of: dict[str, tuple[str, str]]) -> list[int] | None:
        """Ids of the halves of an unused piece, recursively without recursion; None for any other symbol."""
        if symbol not in made_of:
            return None
        ids: list[int] = []
        stack = [symbol]
        while stack:
            part = stack.pop()
            halves = made_of.get(part)
            if halves is not None:
                stack += (halves[1], halves[0])
                continue
            found = self._pieces.get(part)
            ids.append(-1 if found is None else found[1])
        return ids


class UnigramSegmenter(_Chunked):
    """The likeliest segmentation under independent pieces, by Viterbi."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        usable = {int(PieceType.NORMAL), int(PieceType.USER_DEFINED), int(PieceType.UNDEFINED)}
        if vocabulary.raw_user_defined:  # llama.cpp matches unused pieces too
            usable.add(int(PieceType.UNUSED))
        types, scores = vocabulary.types, vocabulary.scores
        normal = [scores[id_] for id_ in range(len(types)) if types[id_] == PieceType.NORMAL]
        self._unknown = min(normal, default=0.0) - UNKNOWN_PENALTY
        self._pieces = {
            token: (0.0 if types[id_] == PieceType.USER_DEFINED else float(scores[id_]), id_)
            for id_, token in enumerate(vocabulary.tokens)
            if types[id_] in usable
        }
        # For each first character the lengths that occur, so that no other substring is looked up.
        lengths: dict[str, set[int]] = {}
        for piece in self._pieces:
            if piece:
                lengths.setdefault(piece[0], set()).add(len(piece))
        self._lengths = {first: sorted(sizes) for first, sizes in lengths.items()}
        super().__init__(self._pieces, vocabulary.whitespace_as_suffix)

    def _segment(self, text: str) -> list[int]:
        pieces, lengths, count = self._pieces, self._lengths, len(text)
        best = [float("-inf")] * (count + 1)
        came: list[tuple[int, int]] = [(0, -1)] * (count + 1)
        best[0] = 0.0
        for start in range(count):
            base = best[start]
            single = False
            for length in lengths.get(text[start], ()):
                end = start + length
                if end > count:
                    break
                found = pieces.get(text[start:end])
                if found is None:
                    continue
                single |= length == 1
                score = base + found[0]
                if score > best[end]:
                    best[end], came[end] = score, (start, found[1])
            if not single and base + self._unknown > best[start + 1]:
                best[start + 1], came[start + 1] = base + self._unknown, (start, -1)
        ids: list[int] = []
        end = count
        while end > 0:
            end, id_ = came[end]
            ids.append(id_)
        ids.reverse()
        return ids
