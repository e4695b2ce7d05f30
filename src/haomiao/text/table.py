"""A byte-level BPE vocabulary as sorted arrays in a file that is mapped: the same as a tokenizer.json, ready at once.

The library takes half a second for a vocabulary of 150,000 tokens and lets no other thread run meanwhile; a cold start
has less than that altogether. So a conversion writes `tokenizer.table` beside tokenizer.json, and whoever needs ids
soon reads this. It names what it was made from, tokenizer.json and the added tokens of tokenizer_config.json, by size
and BLAKE2b; beside anything else it is not used.

Layout, little-endian: magic, u32 version, u32 bytes of JSON, JSON padded with spaces to 8, then u64 keys[merges]
(left << 32 | right, ascending), u32 ranks[merges], u32 merged[merges], u32 order[present] (ids by the UTF-8 of their
texts), u32 ends[tokens] (of each text in the blob), blob. Nothing in it is trusted further than Python checks bounds.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
import sys
from array import array
from bisect import bisect_left
from pathlib import Path
from typing import Any, Literal

from haomiao.errors import ModelError
from haomiao.text.decoding import byte_alphabet
from haomiao.text.parts import MAX_TOKEN_ID

FILE = "tokenizer.table"
MAGIC = b"HAOTOKEN"
VERSION = 1
MAX_MERGES = 1 << 24
_HEAD = struct.Struct("<8sII")
_PLAIN = ("continuing_subword_prefix", "end_of_word_suffix", "unk_token", "fuse_unk", "byte_fallback", "dropout")


class Table:
    """A mapped table. Immutable; valid as long as it is held."""

    def __init__(self, data: memoryview, name: str) -> None:
        """Raises `ModelError` if the parts do not add up to the file."""
        if len(data) < _HEAD.size:
            raise ModelError(f"{name}: too short")
        magic, version, size = _HEAD.unpack_from(data)
        if magic != MAGIC or version != VERSION:
            raise ModelError(f"{name}: not a token table of version {VERSION}")
        about = _object(bytes(data[_HEAD.size : _HEAD.size + size]), name)
        merges, tokens = _count(about, "merges", MAX_MERGES, name), _count(about, "tokens", MAX_TOKEN_ID + 1, name)
        present, blob = _count(about, "present", tokens, name), _count(about, "blob", 1 << 30, name)
        at = _HEAD.size + size
        if at % 8 or len(data) != at + 16 * merges + 4 * (present + tokens) + blob:
            raise ModelError(f"{name}: {len(data)} bytes are not what its counts say")

        def take(count: int, kind: Literal["Q", "I", "B"]) -> memoryview[int]:
            nonlocal at
            begin, at = at, at + count * {"Q": 8, "I": 4, "B": 1}[kind]
            return data[begin:at].cast(kind)

        self.name = name
        self.about = about
        self._keys = take(merges, "Q")
        self._ranks, self._merged = take(merges, "I"), take(merges, "I")
        self._order, self._ends = take(present, "I"), take(tokens, "I")
        self._blob = take(blob, "B")
        self.tokens = tokens
        """One more than the greatest id of the vocabulary, added tokens apart."""

    def merge(self, left: int, right: int) -> tuple[int, int] | None:
        """(rank, id of the merged token) of a pair, or None."""
        key = left << 32 | right
        at = bisect_left(self._keys, key)
        if at == len(self._keys) or self._keys[at] != key:
            return None
        return self._ranks[at], self._merged[at]

    def spelling(self, id_: int) -> bytes:
        """UTF-8 of a token's text; empty where no token has this id."""
        begin = self._ends[id_ - 1] if id_ else 0
        return bytes(self._blob[begin : self._ends[id_]])

    def text_of(self, id_: int) -> str | None:
        """A token's text, None where no token has this id."""
        if not 0 <= id_ < self.tokens:
            return None
        return self.spelling(id_).decode("utf-8", "replace") or None

    def id_of(self, text: str) -> int | None:
        """The id of a token's text, or None."""
        wanted = text.encode("utf-8", "surrogatepass")
        at = bisect_left(self._order, wanted, key=self.spelling)
        if at == len(self._order) or self.spelling(self._order[at]) != wanted:
            return None
        return self._order[at]


def open_table(path: Path, source: bytes, config: bytes) -> Table | None:
    """Map a table, if it was made from these two files; None if from others. Raises `ModelError`."""
    if sys.byteorder != "little":
        return None
    try:
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be mapped: {error}") from error
    table = Table(data, path.name)
    return table if table.about.get("source") == identity(source, config) else None


def identity(source: bytes, config: bytes) -> list[dict[str, Any]]:
    """What says that a table belongs to a tokenizer.json and its tokenizer_config.json (empty if there is none)."""
    return [
        {"bytes": len(data), "blake2b": hashlib.blake2b(data, digest_size=32).hexdigest()} for data in (source, config)
    ]


def make_table(source: bytes, config: bytes) -> bytes | None:
    """The table of a tokenizer.json and the tokenizer_config.json beside it (empty if there is none).

    None for a tokenizer of another kind than plain byte-level BPE, or a broken one: whoever loads it will say what is
    wrong.
    """
    from haomiao.text.directory import add_declared, from_json, surround
    from haomiao.text.parts import Parts

    if sys.byteorder != "little":
        return None
    try:
        backend = from_json(source, "tokenizer.json")
        add_declared(backend, _object(config, "tokenizer_config.json") if config else {})
        parts = Parts(backend)
        surround(parts, backend)
        described = _object(source, "tokenizer.json")
    except ModelError:
        return None
    model = described.get("model", {})
    alphabet = [character for character, _ in sorted(byte_alphabet().items(), key=lambda item: item[1])]
    vocabulary: dict[str, int] = model.get("vocab", {})
    plain = model.get("type", "BPE") == "BPE" and not any(model.get(key) for key in _PLAIN)
    if not plain or not all(character in vocabulary for character in alphabet):
        return None
    if not _ends_in_bytes(described.get("pre_tokenizer")):
        return None
    added = backend.get_added_tokens_decoder()
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    about: dict[str, Any] = {
        "source": identity(source, config),
        "alphabet": [vocabulary[character] for character in alphabet],
        "whole_words": bool(model.get("ignore_merges")),
        "prefix": list(parts.prefix),
        "suffix": list(parts.suffix),
        "added": [
            {"id": id_, "content": token.content, **{flag: bool(getattr(token, flag)) for flag in flags}}
            for id_, token in sorted(added.items())
        ],
        **{key: described.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")},
    }
    return _pack(about, vocabulary, model["merges"])


def _pack(about: dict[str, Any], vocabulary: dict[str, int], merges: list[Any]) -> bytes:
    """The file's bytes."""
    found: dict[int, tuple[int, int]] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        found[vocabulary[left] << 32 | vocabulary[right]] = rank, vocabulary[left + right]
    keys = sorted(found)
    count = max(vocabulary.values()) + 1
    texts = [b""] * count
    for token, id_ in vocabulary.items():
        texts[id_] = token.encode("utf-8", "surrogatepass")
    order = sorted((id_ for id_ in range(count) if texts[id_]), key=texts.__getitem__)
    ends, end = array("I"), 0
    for text in texts:
        end += len(text)
        ends.append(end)
    about |= {"merges": len(keys), "tokens": count, "present": len(order), "blob": end}
    packed = json.dumps(about, separators=(",", ":")).encode("ascii")
    packed += b" " * (-len(packed) % 8)
    numbers = [
        array("Q", keys),
        array("I", (found[key][0] for key in keys)),
        array("I", (found[key][1] for key in keys)),
    ]
    numbers += [array("I", order), ends]
    head = _HEAD.pack(MAGIC, VERSION, len(packed))
    return b"".join([head, packed, *(each.tobytes() for each in numbers), *texts])


def _ends_in_bytes(pre_tokenizer: Any) -> bool:
    """True if every word that reaches the model is spelled in the byte alphabet."""
    if not isinstance(pre_tokenizer, dict):
        return False
    if pre_tokenizer.get("type") == "Sequence":
        steps = pre_tokenizer.get("pretokenizers")
        return isinstance(steps, list) and bool(steps) and _ends_in_bytes(steps[-1])
    return pre_tokenizer.get("type") == "ByteLevel"


def _object(data: bytes, name: str) -> dict[str, Any]:
    from haomiao.text.files import parse_object

    return parse_object(data, name)


def _count(about: dict[str, Any], key: str, most: int, name: str) -> int:
    value = about.get(key)
    if type(value) is not int or not 0 <= value <= most:
        raise ModelError(f"{name}: {key} is {value!r:.40}")
    return value
