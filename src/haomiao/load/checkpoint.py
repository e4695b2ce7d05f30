"""A Hugging Face model directory: config.json, safetensors (single or sharded), and the text files beside them.

Every name that the directory or its index mentions is distrusted: only plain names of regular files inside the
directory are opened (the blobs of a hub snapshot count as inside). Pickled weights and remote code are never loaded:
`auto_map` in a config is not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from haomiao.errors import ModelError, ModelNotFoundError
from haomiao.load.jsonfile import read_object
from haomiao.load.safetensors import FLOATS, SafetensorsFile
from haomiao.load.source import QuantizedTensor
from haomiao.types import F32

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+-]{0,254}")
MAX_SHARDS = 4096
PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
"""How checkpoints of multimodal models name their text model -> how a text model does."""


class Checkpoint:
    """A `TensorSource` over a model directory. `weights` names one file of it, else the usual names are looked for."""

    def __init__(self, directory: Path, weights: Path | None = None) -> None:
        self.directory = directory
        self.name = directory.resolve().name
        self._roots = _roots(directory)
        self.config: Mapping[str, Any] = self._read_config()
        self.files: Mapping[str, Path | bytes] = {
            name: path for name in TEXT_FILES if (path := self._inside(name, must_exist=False)) is not None
        }
        shards, weight_map = self._find_weights(weights)
        self._shards = {shard: SafetensorsFile(path) for shard, path in shards.items()}
        self._where = self._place(weight_map)
        stats = [("config.json", self._require("config.json")), *shards.items(), *self.files.items()]
        self.identity = "|".join([str(directory.resolve()), *(_fingerprint(n, p) for n, p in stats)])

    # ---- TensorSource

    def names(self) -> Sequence[str]:
        """Names in Hugging Face's manner, in the files' order."""
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape. Raises `ModelError` if there is no such tensor."""
        file, stored = self._find(name)
        return file.entries[stored].shape

    def dtype(self, name: str) -> str:
        """`f32`, `f16`, `bf16`, or the file's own word in lower case."""
        file, stored = self._find(name)
        dtype = file.entries[stored].dtype
        return FLOATS.get(dtype, dtype.lower())

    def read(self, name: str) -> F32:
        """The tensor as float32 (maybe a read-only view). Raises `ModelError` for types that are not floats."""
        file, stored = self._find(name)
        return file.read(stored)

    def raw(self, name: str) -> Any:
        """An integer tensor as stored (read-only view), for the readers of quantized checkpoints."""
        file, stored = self._find(name)
        return file.raw(stored)

    def quantized(self, name: str) -> QuantizedTensor | None:
        """None: this checkpoint is not quantized."""
        return None

    def close(self) -> None:
        """Let go of the mapped files; idempotent."""
        self._shards, self._where = {}, {}

    # ---- how it is found

    def _find(self, name: str) -> tuple[SafetensorsFile, str]:
        try:
            shard, stored = self._where[name]
            return self._shards[shard], stored
        except KeyError:
            raise ModelError(f"{self.directory}: no tensor '{name}'") from None

    def _read_config(self) -> dict[str, Any]:
        config = read_object(self._require("config.json"))
        generation = self._inside("generation_config.json", must_exist=False)
        if generation is not None:
            config["generation_config"] = read_object(generation)
        return config

    def _require(self, name: str) -> Path:
        path = self._inside(name, must_exist=True)
        if path is None:
            raise ModelError(f"{self.directory}: no {name}")
        return path

    def _inside(self, name: str, *, must_exist: bool) -> Path | None:
        """The regular file `name` of the directory. Raises `ModelError` for names and links that lead elsewhere."""
        if not PLAIN_NAME.fullmatch(name):
            raise ModelError(f"{self.directory}: {name[:128]!r} is not a plain file name")
        path = self.directory / name
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError):
            if path.is_symlink() or must_exist:
                raise ModelError(f"{self.directory}: no {name}") from None
            return None
        if not any(real.is_relative_to(root) for root in self._roots):
            raise ModelError(f"{path}: a link that leads out of the model's directory")
        if not real.is_file():
            raise ModelError(f"{path}: not a regular file")
        return path

    def _find_weights(self, weights: Path | None) -> tuple[dict[str, Path], dict[str, str] | None]:
        """Shards by name, and tensor -> shard if an index says so."""
        present = sorted(path.name for path in self.directory.iterdir())
        single = weights.name if weights is not None else SINGLE if SINGLE in present else None
        if single is None and INDEX in present:
            weight_map = self._read_index()
            return {shard: self._require(shard) for shard in sorted(set(weight_map.values()))}, weight_map
        tensors = [name for name in present if name.endswith(".safetensors")]
        if single is None and len(tensors) == 1:
            single = tensors[0]
        if single is not None:
            return {single: self._require(single)}, None
        if tensors:
            raise ModelError(f"{self.directory}: {len(tensors)} safetensors files and no {INDEX}")
        for name in present:
            if name.endswith(PICKLES):
                raise ModelError(f"{self.directory}: only pickled weights ({name}), which are never loaded")
        raise ModelError(f"{self.directory}: no safetensors weights")

    def _read_index(self) -> dict[str, str]:
        path = self._require(INDEX)
        weight_map = read_object(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{path}: no weight_map")
        for tensor, shard in weight_map.items():
            if not isinstance(shard, str):
                raise ModelError(f"{path}: the shard of '{tensor[:128]}' is not a name")
            if not shard.endswith(".safetensors"):
                raise ModelError(f"{path}: shard {shard[:128]!r} is not a safetensors file; others are never loaded")
        if len(set(weight_map.values())) > MAX_SHARDS:
            raise ModelError(f"{path}: more than {MAX_SHARDS} shards")
        return weight_map

    def _place(self, weight_map: dict[str, str] | None) -> dict[str, tuple[str, str]]:
        """Name as seen from outside -> (shard, name as stored)."""
        if weight_map is None:
            weight_map = {name: shard for shard, file in self._shards.items() for name in file.entries}
        for name, shard in weight_map.items():
            if name not in self._shards[shard].entries:
                raise ModelError(f"{self.directory}: the index places '{name[:128]}' in {shard}, which lacks it")
        placed = {canonical(name, weight_map): (shard, name) for name, shard in weight_map.items()}
        if len(placed) != len(weight_map):
            raise ModelError(f"{self.directory}: two tensors mean the same weight")
        return placed


def canonical(name: str, names: Mapping[str, Any]) -> str:
    """The name that a causal language model's own checkpoint uses, for those saved as a bare or multimodal model."""
    for prefix, replacement in PREFIXES:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    bare = "transformer." if "wte.weight" in names else "model." if "embed_tokens.weight" in names else ""
    if bare and not name.startswith((bare, "lm_head.")):
        return bare + name
    return name


def _roots(directory: Path) -> tuple[Path, ...]:
    """Where files may really lie: the directory, and the blobs of the hub's cache if it is a snapshot there
    (models--org--name/snapshots/<commit>/file -> ../../blobs/<hash>)."""
    if not directory.is_dir():
        raise ModelNotFoundError(f"{directory}: no such directory")
    real = directory.resolve()
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        return real, real.parent.parent / "blobs"
    return (real,)


def _fingerprint(name: str, path: Path | bytes) -> str:
    if isinstance(path, bytes):
        return f"{name}:{len(path)}"
    status = path.stat()
    return f"{name}:{status.st_size}:{status.st_mtime_ns}"
