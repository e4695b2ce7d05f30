"""A GGUF file as a `TensorSource`: Hugging Face names, orientations and config over the file's own tensors.

What llama.cpp's converter did to a checkpoint is undone on reading: the rotary permutation of Llama's q and k rows,
the one added to Gemma's norms, the transposition of GPT-2's Conv1D.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from haomiao.errors import ModelError, UnsupportedModelError
from haomiao.load.gguf.blocks import DEQUANTIZERS, TYPES, codes_q4_0, codes_q4_1, codes_q8_0, dequantize
from haomiao.load.gguf.config import translate_config
from haomiao.load.gguf.names import ROPE_TENSORS, translate
from haomiao.load.gguf.reader import GgufFile, TensorInfo
from haomiao.load.safetensors import to_f32
from haomiao.load.source import QuantizedTensor
from haomiao.types import F32, U8

FLOATS = ("f32", "f16", "bf16")
CODED: Mapping[str, tuple[int, Callable[[U8], tuple[npt.NDArray[np.int8], F32] | None]]] = {
    "q4_0": (4, codes_q4_0),
    "q4_1": (5, codes_q4_1),
    "q8_0": (8, codes_q8_0),
}
"""Types whose codes are kept: bits of a code, and how they are read."""
MAX_ROPE_CHANNELS = 4096


class GgufSource:
    """A `TensorSource` over one GGUF file. Raises `ModelError` (`UnsupportedModelError` for other architectures)."""

    def __init__(self, path: Path) -> None:
        self._file: GgufFile | None = GgufFile(path)
        file = self._file
        self.name = path.stem
        if file.integer("split.count", 1, least=0) > 1:
            raise UnsupportedModelError(f"{path}: one part of a split GGUF; merge the parts first")
        if not file.tensors:
            raise ModelError(f"{path}: a GGUF file without tensors (a vocabulary only)")
        self._architecture = file.text("general.architecture")
        tables = {name: self._rope_table(name) for name in ROPE_TENSORS if name in file.tensors}
        tied = "output.weight" not in file.tensors
        self.config: Mapping[str, Any] = translate_config(file, tables, tied)
        self._tensors = self._translate()
        self.files: Mapping[str, Path | bytes] = self._text_files()
        status = path.stat()
        self.identity = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"

    # ---- TensorSource

    def names(self) -> Sequence[str]:
        """Hugging Face names, in the file's order; the head is absent where it is tied to the embedding."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in Hugging Face's orientation. Raises `ModelError` if there is no such tensor."""
        info = self._find(name)
        return info.shape[::-1] if self._is_conv1d(name) else info.shape

    def dtype(self, name: str) -> str:
        """`f32`, `f16`, `bf16` or the block type in lower case (`q4_k`)."""
        return TYPES[self._find(name).type].name

    def read(self, name: str) -> F32:
        """The tensor as float32 (maybe a read-only view of the file). Raises `ModelError` for unreadable types."""
        info = self._find(name)
        values = self._values(info)
        if (heads := self._permuted_heads(name)) is not None:
            return values[self._row_order(info, heads)]
        if self._architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            return values - np.float32(1)
        return values.T if self._is_conv1d(name) else values

    def quantized(self, name: str) -> QuantizedTensor | None:
        """Codes and scales of Q4_0 (4 bits), Q4_1 with whole zero-points (5 bits) and Q8_0 (8 bits), group 32; None for
        all else and for Conv1D weights, whose groups run along the other axis."""
        info = self._find(name)
        kind = TYPES[info.type].name
        if kind not in CODED or len(info.shape) != 2 or self._is_conv1d(name):
            return None
        bits, read = CODED[kind]
        found = read(self._open().bytes(info))
        if found is None:
            return None
        codes, scales = found
        rows, cols = info.shape
        codes, scales = codes.reshape(rows, cols), scales.reshape(rows, cols // 32)
        if (heads := self._permuted_heads(name)) is not None:
            order = self._row_order(info, heads)
            codes, scales = codes[order], scales[order]
        return QuantizedTensor(codes, scales, group=32, bits=bits)

    def close(self) -> None:
        """Let go of the mapped file; idempotent."""
        self._file = None
        self._tensors = {}

    # ---- reading

    def _open(self) -> GgufFile:
        if self._file is None:
            raise ModelError(f"{self.name}: the file is closed")
        return self._file

    def _find(self, name: str) -> TensorInfo:
        try:
            return self._tensors[name]
        except KeyError:
            raise ModelError(f"{self.name}: no tensor '{name}'") from None

    def _values(self, info: TensorInfo) -> F32:
        kind = TYPES[info.type].name
        data = self._open().bytes(info)
        if kind in FLOATS:
            return to_f32(data, kind).reshape(info.shape)
        if kind not in DEQUANTIZERS:
            raise UnsupportedModelError(f"{self.name}: tensor '{info.name}' has type {kind}, which is not read")
        return dequantize(data, kind).reshape(info.shape)

    def _rope_table(self, name: str) -> F32:
        file = self._open()
        info = file.tensors[name]
        if len(info.shape) != 1 or info.shape[0] > MAX_ROPE_CHANNELS:
            raise ModelError(f"{file.path}: '{name}' must be a vector")
        table = self._values(info)
        if not (np.isfinite(table).all() and (table > 0).all()):
            raise ModelError(f"{file.path}: '{name}' must hold positive numbers")
        return table

    # ---- what llama.cpp's converter did

    def _is_conv1d(self, name: str) -> bool:
        """GPT-2's linear layers are stored [in, out] on the hub."""
        return self._architecture == "gpt2" and ".h." in name and ".ln_" not in name and name.endswith(".weight")

    def _permuted_heads(self, name: str) -> int | None:
        """Heads of a tensor whose rows the converter permuted from halves to pairs (architecture `llama` only)."""
        if self._architecture != "llama":
            return None
        if ".q_proj." in name:
            return int(self.config["num_attention_heads"])
        return int(self.config["num_key_value_heads"]) if ".k_proj." in name else None

    def _row_order(self, info: TensorInfo, heads: int) -> npt.NDArray[np.int64]:
        """Hugging Face row -> row of the file: pair member p of channel c is row 2c + p there, p * dim/2 + c here."""
        rows = info.shape[0]
        if rows % (2 * heads):
            raise ModelError(f"{self.name}: '{info.name}' has {rows} rows, which {heads} heads do not divide in pairs")
        return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)

    # ---- opening

    def _translate(self) -> dict[str, TensorInfo]:
        file = self._open()
        layers = int(self.config.get("num_hidden_layers", self.config.get("n_layer", 0)))
        found: dict[str, TensorInfo] = {}
        for name, info in file.tensors.items():
            if name in ROPE_TENSORS:
                continue
            translated = translate(self._architecture, name)
            if translated is None:
                raise UnsupportedModelError(f"{file.path}: {self._architecture} has no tensor '{name}'")
            if name.startswith("blk.") and int(name.split(".")[1]) >= layers:
                raise ModelError(f"{file.path}: tensor '{name}' in a model of {layers} layers")
            found[translated] = info
        return found

    def _text_files(self) -> dict[str, Path | bytes]:
        file = self._open()
        # a file may hold weights alone
        files: dict[str, Path | bytes] = {"tokenizer.gguf": file.path} if "tokenizer.ggml.model" in file else {}
        template = file.metadata.get("tokenizer.chat_template")
        if isinstance(template, str):
            files["chat_template.jinja"] = template.encode("utf-8", "replace")
        return files
