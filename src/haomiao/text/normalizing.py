"""How SentencePiece prepares text: its table of replacements, its white space rules, and the visible space.

Knows nothing about pieces or ids. The table (`precompiled_charsmap`) is a Darts double array (Aoe 1989; layout of
darts-clone: a unit holds label, leaf flag and offset) from UTF-8 prefixes to NUL-terminated replacements; the longest
matching prefix is replaced. Every index read from it is checked.
"""

from __future__ import annotations

import re
import struct
from array import array

from haomiao.errors import ModelError
from haomiao.text.decoding import SPACE
from haomiao.text.vocabulary import Vocabulary

_SPACES = re.compile(" {2,}")


class CharsMap:
    """A table of replacements. Raises `ModelError` if its sizes contradict each other."""

    def __init__(self, blob: bytes) -> None:
        if len(blob) < 4:
            raise ModelError("precompiled charsmap: shorter than its header")
        (size,) = struct.unpack_from("<I", blob)
        if size % 4 or size == 0 or size > len(blob) - 4:
            raise ModelError(f"precompiled charsmap: a trie of {size} bytes in {len(blob)}")
        self._units = array("I", struct.unpack_from(f"<{size // 4}I", blob, 4))
        self._texts = blob[4 + size :]
        self._found: dict[int, str] = {}

    def replace(self, text: str, verbatim: re.Pattern[str] | None = None) -> str:
        """`text` with every longest match replaced; what `verbatim` matches is left as it is."""
        if verbatim is None:
            return self._replace(text)
        parts: list[str] = []
        start = 0
        for match in verbatim.finditer(text):
            parts += (self._replace(text[start : match.start()]), match[0])
            start = match.end()
        parts.append(self._replace(text[start:]))
        return "".join(parts)

    def _replace(self, text: str) -> str:
        data = text.encode("utf-8")
        parts: list[str] = []
        at = kept = 0
        while at < len(data):
            length, replacement = self._longest(data, at)
            if length:
                parts += (data[kept:at].decode("utf-8", "replace"), replacement)
                at += length
                kept = at
            else:
                first = data[at]
                at += 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
        parts.append(data[kept:].decode("utf-8", "replace"))
        return "".join(parts)

    def _longest(self, data: bytes, at: int) -> tuple[int, str]:
        """Length of the longest prefix of `data[at:]` in the table, and what replaces it; 0 if there is none."""
        units, count = self._units, len(self._units)
        length, value = 0, 0
        node = _offset(units[0])
        for end in range(at, len(data)):
            byte = data[end]
            node ^= byte
            if byte == 0 or node >= count:
                break
            unit = units[node]
            if unit & 0x800000FF != byte:
                break
            node ^= _offset(unit)
            if unit >> 8 & 1:
                if node >= count:
                    break
                length, value = end + 1 - at, units[node] & 0x7FFFFFFF
        return length, self._text(value) if length else ""

    def _text(self, at: int) -> str:
        found = self._found.get(at)
        if found is None:
            end = self._texts.find(b"\0", at)
            if at >= len(self._texts) or end < 0:
                raise ModelError("precompiled charsmap: a replacement lies outside the table")
            found = self._texts[at:end].decode("utf-8", "replace")
            self._found[at] = found
        return found


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 0x200) >> 6)


class Normalizer:
    """The preparation that a vocabulary asks for."""

    def __init__(self, vocabulary: Vocabulary, verbatim: re.Pattern[str] | None = None) -> None:
        self._map = CharsMap(vocabulary.charsmap) if vocabulary.charsmap else None
        self._prefix = vocabulary.add_dummy_prefix
        self._collapse = vocabulary.remove_extra_whitespaces
        self._suffix = vocabulary.whitespace_as_suffix
        self._verbatim = verbatim

    def __call__(self, text: str) -> str:
        """`text` with spaces made visible."""
        if self._map is not None:
            text = self._map.replace(text, self._verbatim)
        if self._collapse:
            text = _SPACES.sub(" ", text.lstrip(" "))
        if not text:
            return ""
        if self._prefix and not self._suffix:
            text = " " + text
        text = text.replace(" ", SPACE)
        if self._collapse:  # a visible space that was in the text is stripped as well, the dummy included
            text = text.rstrip(SPACE)
        return text + SPACE if self._prefix and self._suffix else text
