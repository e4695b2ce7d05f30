"""The artifact: a model in kernel layout, mapped and run without conversion (docs/ARCHITECTURE.md, section 5).

The header is read and distrusted in C++ (native/runtime/artifact.cc); this module turns its sections into views of the
mapped file. Knows nothing about plans, families or kernels' arithmetic. Writing lives in `artifact_writer`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from haomiao import _core
from haomiao.errors import ArtifactError, ModelNotFoundError
from haomiao.kernels.packed import ENCODINGS, PackedTensor, pack_mask
from haomiao.load.artifact_writer import MASK_SUFFIX, MODEL_FILE, ArtifactWriter, finite_scales
from haomiao.load.jsonfile import parse_object
from haomiao.load.mapping import map_file
from haomiao.types import F32, U8

__all__ = ["MODEL_FILE", "Artifact", "ArtifactWriter", "Section", "is_artifact"]

META, MATRIX, VECTOR, TILES = 1, 2, 3, 4
MAX_COMPANIONS = 64
VERIFY_CHUNK = 16 << 20


@dataclass(frozen=True, slots=True)
class Section:
    """One entry of the section table, checked. Sizes in bytes; `offset` from the file's start."""

    kind: int
    name: str
    offset: int
    bytes: int
    crc: int
    encoding: int
    plane: int
    group: int
    lo_shift: int
    rows: int
    cols: int
    stored: int
    """Of a tile mask: how many groups the tiles of its matrix store."""


def is_artifact(path: Path) -> bool:
    """True if `path` is a directory that holds `model.haomiao`."""
    return (path / MODEL_FILE).is_file()


class Artifact:
    """An open artifact. Tensors and vectors are read-only views; they stay valid after `close` while someone holds
    them, and the memory is given back with the last one."""

    directory: Path
    meta: dict[str, Any]
    """The meta section: `config`, `family`, `points`, `default_point`, `provenance`, `recipe`, `errors`."""
    tensors: dict[str, PackedTensor]
    vectors: dict[str, F32]
    files: dict[str, Path]
    """The regular files beside `model.haomiao`, by name."""
    sections: list[Section]
    nbytes: int
    """Bytes of `model.haomiao`."""

    def __init__(self, directory: Path, data: U8) -> None:
        """Use `Artifact.open`."""
        self.directory = directory
        self.nbytes = int(data.nbytes)
        self._data: U8 | None = data
        path = directory / MODEL_FILE
        try:
            self.sections = [Section(**section) for section in _core.parse_artifact(data, self.nbytes)]
        except ValueError as wrong:
            raise ArtifactError(f"{path}: {wrong}") from None
        bodies = {(s.name, s.plane): data[s.offset : s.offset + s.bytes] for s in self.sections}
        masks = {s.name.removesuffix(MASK_SUFFIX): s for s in self.sections if s.kind == TILES}
        self.meta, self.tensors, self.vectors = {}, {}, {}
        for section in self.sections:
            body = bodies[section.name, section.plane]
            if section.kind == META:
                self.meta = parse_object(body.tobytes(), f"{path}: meta", error=ArtifactError)
            elif section.kind == VECTOR:
                self.vectors[section.name] = vector = body.view("<f4")
                if not np.isfinite(vector).all():
                    raise ArtifactError(f"{path}: section '{section.name}': a value is NaN or infinite")
            elif section.kind == MATRIX and section.plane == 0:
                self.tensors[section.name] = tensor = PackedTensor(
                    encoding=ENCODINGS[section.encoding],
                    rows=section.rows,
                    cols=section.cols,
                    group=section.group,
                    lo_shift=section.lo_shift,
                    hi=body,
                    lo=bodies.get((section.name, 1)),
                    kept=bodies.get((section.name + MASK_SUFFIX, 0)) if section.name in masks else None,
                )
                if tensor.kept is not None and not _agrees(tensor, masks[section.name].stored):
                    raise ArtifactError(f"{path}: section '{section.name}{MASK_SUFFIX}' contradicts itself")
        self.files = _companions(directory)

    @classmethod
    def open(cls, directory: Path | str, hugepages: bool = False) -> Artifact:
        """Map the artifact in `directory` and check its header (bodies: `verify`).

        `hugepages` copies the file into huge pages instead of sharing its pages. Raises `ModelNotFoundError` if there
        is no artifact, `ArtifactError` if it is wrong in any way.
        """
        directory = Path(directory)
        if directory.name == MODEL_FILE:
            directory = directory.parent
        if not is_artifact(directory):
            raise ModelNotFoundError(f"{directory}: no {MODEL_FILE} there")
        return cls(directory, map_file(directory / MODEL_FILE, error=ArtifactError, hugepages=hugepages))

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read every body: CRC-32 and finite scales. `progress(done, total)` in bytes. Raises `ArtifactError`."""
        if self._data is None:
            raise ArtifactError(f"{self.directory}: the artifact is closed")
        total, done = sum(section.bytes for section in self.sections), 0
        for section in self.sections:
            body = self._data[section.offset : section.offset + section.bytes]
            crc = 0
            for begin in range(0, section.bytes, VERIFY_CHUNK):
                chunk = body[begin : begin + VERIFY_CHUNK]
                crc = zlib.crc32(chunk.data, crc)
                done += chunk.nbytes
                if progress is not None:
                    progress(done, total)
            where = f"{self.directory / MODEL_FILE}: section '{section.name}'"
            if crc != section.crc:
                raise ArtifactError(f"{where}: the checksum is wrong")
            if section.kind == MATRIX and section.plane == 0 and not finite_scales(self.tensors[section.name]):
                raise ArtifactError(f"{where}: a scale or weight is NaN or infinite")

    def close(self) -> None:
        """Let go of the mapping; idempotent."""
        self._data = None
        self.tensors = {}
        self.vectors = {}

    def __enter__(self) -> Artifact:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _agrees(tensor: PackedTensor, stored: int) -> bool:
    """True if the tile mask names that many groups, and none that does not exist."""
    bits = pack_mask(tensor.stored)
    return tensor.kept is not None and np.count_nonzero(tensor.stored) == stored and np.array_equal(bits, tensor.kept)


def _companions(directory: Path) -> dict[str, Path]:
    """Regular files beside the model; symbolic links are not followed (an artifact is whole by itself)."""
    found: dict[str, Path] = {}
    for path in sorted(directory.iterdir()):
        if path.name != MODEL_FILE and not path.name.startswith(".") and path.is_file() and not path.is_symlink():
            found[path.name] = path
        if len(found) > MAX_COMPANIONS:
            raise ArtifactError(f"{directory}: more than {MAX_COMPANIONS} files beside {MODEL_FILE}")
    return found
