"""Encodes texts that begin like earlier ones: pieces of them are looked up instead of encoded.

A text is cut from its beginning, about every `PIECE` characters, between an ASCII letter and a space that another
letter follows. Where the tokenizer's pre-tokenizer parts words there whatever stands around (`parts_words` looks at its
pattern, and knows those of GPT-2, Qwen2, Llama 3 and o200k), the ids of the pieces are the ids of the text. Equal
beginnings are cut alike, so only what is new is encoded. For any other tokenizer nothing is cut.

Pieces are remembered per salt: how long an encoding takes tells a caller nothing about the texts of another one.
Knows nothing about prompts.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from typing import Any

from haomiao.text.pretokenizers import PART_AT_WORDS
from haomiao.text.tokenizer import Tokenizer

PIECE = 256
"""Characters that a piece has at least; what is left at the end is encoded every time."""
MAX_CHARACTERS = 8 << 20
_CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")


class Beginnings:
    """What the pieces of recent texts were encoded to; the oldest are forgotten. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cuts = parts_words(tokenizer)
        self._known: OrderedDict[tuple[bytes, bool, str], list[int]] = OrderedDict()
        self._characters = 0
        self._lock = threading.Lock()

    def encode(self, text: str, special: bool, salt: bytes) -> list[int]:
        """As `Tokenizer.encode_part`."""
        if not self._cuts or len(text) <= PIECE:
            return self._tokenizer.encode_part(text, special)
        ids: list[int] = []
        start = 0
        while (cut := _CUT.search(text, start + PIECE)) is not None:
            ids += self._piece(salt, special, text[start : cut.start()])
            start = cut.start()
        return ids + self._tokenizer.encode_part(text[start:], special)

    def _piece(self, salt: bytes, special: bool, text: str) -> list[int]:
        key = (salt, special, text)
        with self._lock:
            found = self._known.get(key)
            if found is not None:
                self._known.move_to_end(key)
                return found
        found = self._tokenizer.encode_part(text, special)
        with self._lock:
            if key not in self._known:
                self._characters += len(text)
            self._known[key] = found
            while self._characters > MAX_CHARACTERS:
                (_, _, oldest), _ = self._known.popitem(last=False)
                self._characters -= len(oldest)
        return found


def parts_words(tokenizer: Tokenizer) -> bool:
    """True if a letter and a space that a letter follows never share a token, and each side is encoded as it would be
    alone."""
    if tokenizer.segments_itself:
        return False
    about = json.loads(tokenizer.backend.to_str())
    for added in about["added_tokens"]:
        if added["lstrip"] or added["rstrip"] or added["single_word"] or " " in added["content"]:
            return False
    normalizer = about["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":  # an ASCII letter and a space compose with nothing
        return False
    return about["model"]["type"] == "BPE" and not about["model"].get("dropout") and _parts(about["pre_tokenizer"])


def _parts(about: dict[str, Any] | None) -> bool:
    """The pre-tokenizer cuts there, and its last stage is one of bytes."""
    stages = [] if about is None else about["pretokenizers"] if about["type"] == "Sequence" else [about]
    if not stages or stages[-1]["type"] != "ByteLevel" or any(stage.get("add_prefix_space") for stage in stages):
        return False
    cuts = bool(stages[-1].get("use_regex"))  # GPT-2's pattern
    for stage in stages[:-1]:
        if stage["type"] == "Split" and stage["behavior"] == "Isolated" and not stage["invert"]:
            pattern = stage["pattern"].get("Regex")
            if pattern not in PART_AT_WORDS:
                return False
            cuts = True
        elif stage["type"] != "Digits":
            return False
    return cuts
