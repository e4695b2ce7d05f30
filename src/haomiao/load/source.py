"""What a checkpoint looks like to the rest: Hugging Face names, Hugging Face config terms, whatever the file was.

Readers (`checkpoint`, `gguf`, `quantized`) implement `TensorSource`; `models.convert` consumes it. `open_source` finds
the reader for a name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from haomiao.errors import InputError, ModelError, ModelNotFoundError
from haomiao.types import F32

Progress: TypeAlias = Callable[[str, int, int], None]
"""progress(what, bytes done, bytes in all), called now and then from the thread that works."""


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A matrix stored in integer codes: w[r, c] = scales[r, c // group] * codes[r, c]. Offsets are already applied."""

    codes: npt.NDArray[np.int8]  # [rows, cols]
    scales: F32  # [rows, cols / group], each exactly representable in float16
    group: int
    bits: int
    """4: codes in [-8, 7], an exact hi plane. 5: in [-15, 15] (4 bits with zero-points). 8: in [-128, 127]."""


class TensorSource(Protocol):
    """A checkpoint. Reading is lazy: nothing is allocated beyond the tensor asked for."""

    name: str
    """Human name, for progress and provenance."""
    config: Mapping[str, Any]
    """config.json in Hugging Face terms (GGUF metadata are translated to it); `generation_config` nested in it."""
    files: Mapping[str, Path | bytes]
    """Text files to carry along: tokenizer.json, tokenizer.model, tokenizer_config.json, generation_config.json,
    chat_template.jinja, or `tokenizer.gguf` (the GGUF file itself, whose metadata hold the tokenizer)."""
    identity: str
    """What the cache key hashes: changes whenever the checkpoint does."""

    def names(self) -> Sequence[str]:
        """Names in Hugging Face's manner (`model.layers.0.self_attn.q_proj.weight`)."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str:
        """`f32`, `f16`, `bf16`, or the quantized type's own name (`q4_0`, `gptq-int4`, ...)."""
        ...

    def read(self, name: str) -> F32:
        """The tensor as float32 in Hugging Face's orientation, dequantized if need be. Raises `ModelError`."""
        ...

    def quantized(self, name: str) -> QuantizedTensor | None:
        """The tensor's own codes where they can be kept exactly, else None."""
        ...

    def close(self) -> None: ...


def open_source(
    name: str | Path,
    *,
    revision: str | None = None,
    offline: bool | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> TensorSource:
    """The checkpoint that `name` means: a model directory, a .gguf or .safetensors file, or a Hugging Face id.

    An id may choose a GGUF file of its repository: `org/repo:Q4_K_M` or `org/repo/file.gguf`. `revision`, `offline`
    (None: `HAOMIAO_OFFLINE`, `HF_HUB_OFFLINE`), `token` (None: `HF_TOKEN`) and `progress` matter to ids only.

    Raises `ModelNotFoundError` if there is no such thing, `ModelError` if it is not a model that can be read,
    `DownloadError` if the hub does not deliver. Nothing pickled and no remote code is ever loaded.
    """
    text = str(name)
    if not text or "\0" in text:
        raise InputError("the model's name is empty or holds a NUL", param="model")
    path = Path(text).expanduser()
    try:
        exists = path.exists()
    except OSError as wrong:  # a name that is too long, a directory that may not be searched
        raise ModelNotFoundError(f"{text[:256]}: {wrong.strerror}") from None
    if exists:
        return open_path(path)
    from haomiao.load import hub

    if isinstance(name, Path) or not hub.is_id(text):
        raise ModelNotFoundError(f"{text[:256]}: no such file or directory, and not a Hugging Face id")
    return open_path(hub.download(text, revision=revision, offline=offline, token=token, progress=progress))


def open_path(path: Path) -> TensorSource:
    """The checkpoint in a file or directory of this machine. Errors as `open_source`."""
    try:
        return _open_path(path)
    except OSError as wrong:  # a directory that may not be listed, a file that vanishes while it is read
        raise ModelError(f"{path}: {wrong.strerror or wrong}") from None


def _open_path(path: Path) -> TensorSource:
    from haomiao.load.checkpoint import PICKLES, Checkpoint
    from haomiao.load.quantized.source import with_quantization

    if path.suffix.lower() in PICKLES:
        raise ModelError(f"{path}: pickled weights are never loaded; convert them to safetensors")
    if path.is_dir():
        if (path / "model.haomiao").is_file():
            raise InputError(f"{path} is an artifact, already converted", param="model")
        ggufs = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return open_path(ggufs[0])
        if ggufs:
            raise ModelError(f"{path}: {len(ggufs)} GGUF files; name one of them")
        return with_quantization(Checkpoint(path))
    if path.suffix == ".safetensors":
        sharded = (path.parent / "model.safetensors.index.json").exists()
        return with_quantization(Checkpoint(path.parent, None if sharded else path))
    if path.suffix.lower() == ".gguf":
        from haomiao.load.gguf.source import GgufSource

        return GgufSource(path)
    raise ModelError(f"{path}: neither a model directory nor a .gguf or .safetensors file")
