"""Tokenized text on disk, and the batches that a run takes from it: a function of seed and step alone.

A folder holds `train-NNNNN.u16` (token ids, little-endian, documents ended by the end token, whole files of at most
16 MiB), `valid-LANGUAGE.u16`, the tokenizer's files and `manifest.json`. Sequences are windows of the whole stream
(packed: a window may hold the end of one document and the beginning of the next); every epoch begins at another offset
and takes every window once, in another order. So a run that resumes needs no state of its data.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from haomiao.errors import InputError, ModelError
from haomiao.load.jsonfile import parse_object

SHARD_TOKENS = 8 << 20
"""Tokens of a shard: 16 MiB."""
MANIFEST = "manifest.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

Ids = npt.NDArray[np.int64]


class Shards:
    """The prepared data of a folder, mapped. Raises `InputError` if it is none, `ModelError` if it is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / MANIFEST
        if not path.is_file():
            raise InputError(f"{folder} holds no prepared data: python -m haomiao.train.prepare makes it", param="data")
        self.manifest: dict[str, Any] = parse_object(path.read_bytes(), str(path))
        try:
            self.vocab_size = int(self.manifest["vocab_size"])
            self._train = [self._map(name, tokens) for name, tokens in self.manifest["train"]]
            self.valid = {language: self._map(*held["file"]) for language, held in self.manifest["valid"].items()}
            self.valid_bytes = {language: int(held["bytes"]) for language, held in self.manifest["valid"].items()}
        except (KeyError, TypeError, ValueError):
            raise ModelError(f"{path} is damaged: prepare the data again") from None
        self._starts = np.cumsum([0, *(len(shard) for shard in self._train)])
        self.tokens = int(self._starts[-1])

    @property
    def identity(self) -> str:
        """What decides the batches: the digest of the stream."""
        return str(self.manifest["sha256"])

    @property
    def files(self) -> dict[str, Path]:
        """The tokenizer's files."""
        return {name: self.folder / name for name in TOKENIZER_FILES if (self.folder / name).is_file()}

    def _map(self, name: str, tokens: int) -> npt.NDArray[np.uint16]:
        path = self.folder / Path(name).name
        try:
            found = np.memmap(path, dtype="<u2", mode="r")
        except (OSError, ValueError):
            raise ModelError(f"{path} is missing or empty: prepare the data again") from None
        if len(found) != tokens:
            raise ModelError(f"{path} holds {len(found)} tokens, the manifest says {tokens}")
        return found

    def batch(self, seed: int, index: int, size: int, length: int) -> Ids:
        """The `index`-th batch: int64 [size, length + 1], each row a window and the token after it."""
        count = (self.tokens - 1) // length - 1  # windows of an epoch, wherever it begins
        if count < 1:
            raise InputError(f"{self.tokens} tokens of text are too few for sequences of {length}", param="length")
        rows = np.empty((size, length + 1), np.int64)
        for row in range(size):
            epoch, place = divmod(index * size + row, count)
            offset, order = _epoch(seed, epoch, count, length)
            rows[row] = self._read(offset + int(order[place]) * length, length + 1)
        return rows

    def _read(self, begin: int, count: int) -> npt.NDArray[np.uint16]:
        """Tokens [begin, begin + count) of the stream, over the borders of shards."""
        parts = []
        shard = int(np.searchsorted(self._starts, begin, side="right")) - 1
        while count > 0:
            at = begin - int(self._starts[shard])
            part = self._train[shard][at : at + count]
            parts.append(part)
            begin, count, shard = begin + len(part), count - len(part), shard + 1
        return np.concatenate(parts) if len(parts) > 1 else parts[0]


_EPOCHS: dict[tuple[int, int, int, int], tuple[int, npt.NDArray[np.int64]]] = {}


def _epoch(seed: int, epoch: int, count: int, length: int) -> tuple[int, npt.NDArray[np.int64]]:
    """Where an epoch's windows begin, and their order. The last one is remembered."""
    key = (seed, epoch, count, length)
    if key not in _EPOCHS:
        if len(_EPOCHS) > 1:  # a batch may lie across two epochs
            _EPOCHS.pop(next(iter(_EPOCHS)))
        random = np.random.Generator(np.random.Philox([seed, epoch]))
        _EPOCHS[key] = int(random.integers(length)), random.permutation(count)
    return _EPOCHS[key]


def write_shards(folder: Path, name: str, parts: Sequence[npt.NDArray[np.uint16]]) -> list[tuple[str, int]]:
    """Write a stream as files of at most `SHARD_TOKENS`; returns their names and tokens."""
    stream = np.concatenate([np.asarray(part, "<u2") for part in parts])
    written = []
    for index, begin in enumerate(range(0, len(stream), SHARD_TOKENS)):
        shard = stream[begin : begin + SHARD_TOKENS]
        file = f"{name}-{index:05d}.u16"
        shard.tofile(folder / file)
        written.append((file, len(shard)))
    return written


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """The last file of a folder: with it the data are whole."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
