"""From token ids to bytes: what each kind of decoder says a token stands for.

Decoding here is a property of single tokens: a token stands for bytes, text is the bytes of all tokens read as UTF-8
(each malformed part becomes U+FFFD, by the rule of the Unicode standard, section 3.9, "maximal subparts"), and at most
one space is dropped from the start. That is what makes incremental detokenization exact. The `tokenizers` library
differs from it only for text that is not valid UTF-8.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

SPACE = "\u2581"
"""SentencePiece's visible space, U+2581."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte (Radford et al. 2019, `bytes_to_unicode`), character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


class TokenBytes:
    """The bytes of a token's text, by the description of a decoder as tokenizer.json writes it."""

    def __init__(self, decoder: dict[str, Any] | None) -> None:
        self.strip_leading_space = False
        """One space is dropped from the very start of decoded text."""
        self._byte_level: dict[str, int] | None = None
        self._replacements: list[tuple[str, str]] = []
        self._byte_fallback = False
        self._prefix: str | None = None
        """A mark of word continuation (`##`); tokens without it begin a word."""
        self._suffix: str | None = None
        for step in _steps(decoder):
            self._add(step)

    def _add(self, step: dict[str, Any]) -> None:
        kind = step.get("type")
        if kind == "ByteLevel":
            self._byte_level = byte_alphabet()
        elif kind == "ByteFallback":
            self._byte_fallback = True
        elif kind == "Replace":
            pattern = step.get("pattern")
            wanted = pattern.get("String") if isinstance(pattern, dict) else None
            if isinstance(wanted, str) and wanted and isinstance(step.get("content"), str):
                self._replacements.append((wanted, step["content"]))
        elif kind == "Metaspace":
            mark = step.get("replacement")
            self._replacements.append((mark if isinstance(mark, str) and mark else SPACE, " "))
            never = step.get("prepend_scheme") == "never" or step.get("add_prefix_space") is False
            self.strip_leading_space |= not never
        elif kind == "Strip":
            self.strip_leading_space |= step.get("content") == " " and bool(step.get("start"))
        elif kind == "WordPiece":
            prefix = step.get("prefix")
            self._prefix = prefix if isinstance(prefix, str) and prefix else "##"
            self.strip_leading_space = True
        elif kind == "BPEDecoder":
            suffix = step.get("suffix")
            self._suffix = suffix if isinstance(suffix, str) and suffix else "</w>"

    def of(self, token: str) -> bytes:
        """Bytes of an ordinary token (an added token stands for its own text)."""
        if self._byte_level is not None:
            try:
                return bytes([self._byte_level[character] for character in token])
            except KeyError:
                return token.encode("utf-8", "replace")
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for wanted, replacement in self._replacements:
            token = token.replace(wanted, replacement)
        if self._prefix is not None:
            continues = token.startswith(self._prefix)
            token = token[len(self._prefix) :] if continues else " " + token
        if self._suffix is not None and token.endswith(self._suffix):
            token = token[: -len(self._suffix)] + " "
        return token.encode("utf-8", "replace")


def describe(part: Any) -> dict[str, Any] | None:
    """A decoder, normalizer or pre-tokenizer of the library as the object that tokenizer.json holds; None if absent."""
    if part is None:
        return None
    value = json.loads(part.__getstate__())
    return value if isinstance(value, dict) else None


def greatest_id(backend: Backend) -> int:
    """The greatest token id, -1 for an empty vocabulary. Asks for the whole vocabulary only where ids have gaps."""
    size = backend.get_vocab_size(with_added_tokens=False)
    own = size - 1
    if size and backend.id_to_token(own) is None:
        own = max(backend.get_vocab(with_added_tokens=False).values())
    return max(own, max(backend.get_added_tokens_decoder(), default=-1))


def rule_of(backend: Backend) -> TokenBytes:
    """The rule of the backend's decoder."""
    return TokenBytes(describe(backend.decoder))


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Decoders in order, sequences flattened (one level: the library refuses deeper files long before)."""
    if decoder is None:
        return []
    if decoder.get("type") != "Sequence":
        return [decoder]
    steps = decoder.get("decoders")
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
