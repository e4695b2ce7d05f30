"""Writing of artifacts: sections are streamed into a hidden directory beside the target, renamed when it is whole.

Knows the layout (docs/ARCHITECTURE.md, section 5) and nothing about where the weights come from. An artifact is whole
or absent: an exception, a full disk or a kill leaves nothing under the target's name.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import struct
import weakref
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from haomiao.errors import ArtifactError, InputError
from haomiao.kernels.pack import without_empty
from haomiao.kernels.packed import ENCODINGS, TILE_ROWS, PackedTensor, tile_bytes
from haomiao.load.disk import disk_errors
from haomiao.load.jsonfile import MAX_BYTES as MAX_META_BYTES
from haomiao.types import U8

MODEL_FILE = "model.haomiao"
MASK_SUFFIX = ".tiles"
"""A matrix's name and this: the section of its tile mask."""
MAGIC = b"HAOMIAO\0"
MAJOR, MINOR = 1, 0
ALIGN = 64
FIXED = struct.Struct("<8sHHIQIII28x")  # magic, major, minor, header bytes, file bytes, sections, flags, crc
ENTRY = struct.Struct("<IIIIQQIIIIIIIIQ56x")
"""kind, flags, name offset, name bytes, offset, bytes, crc, encoding, plane, group, lo_shift, rows, cols, padded_cols,
tile bytes (of a tile mask: groups that are stored)."""
CRC_OFFSET = 32
REQUIRED = 1
META, MATRIX, VECTOR, TILES = 1, 2, 3, 4
WRITE_CHUNK = 8 << 20
RESERVED_HEADER = 256 << 10
"""Room left for the header, a hole in the file: about 1,400 sections. A longer header moves the bodies once."""
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


class ArtifactWriter:
    """Streams a model into `directory`. Use as a context manager: what is not finished is removed.

        with ArtifactWriter(directory) as writer:
            writer.add_tensor("layers.0.qkv", packed)
            writer.add_vector("layers.0.norm", weight)
            writer.add_file("tokenizer.json", path)
            writer.finish(meta)

    Raises `InputError` if `directory` holds something already (`overwrite` replaces an artifact, and nothing else),
    `UnavailableError` if the disk is full or not writable.
    """

    def __init__(
        self, directory: Path | str, *, overwrite: bool = False, reserved_header: int = RESERVED_HEADER
    ) -> None:
        self.directory = Path(directory).absolute()
        self._overwrite = overwrite
        self._check_target()
        self._entries: list[tuple[int, str, int, int, int, tuple[int, ...]]] = []
        self._names: set[str] = set()
        self._body_start = -(-reserved_header // ALIGN) * ALIGN
        with disk_errors(self.directory):
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.directory.parent, self.directory.name)
            self._temporary, self._lock = _locked_temporary(self.directory)
            self._cleanup = weakref.finalize(self, _discard, self._temporary, self._lock)
            self._file: BinaryIO = (self._temporary / MODEL_FILE).open("wb+")
        self._position = self._body_start

    # ---- what goes in

    def add_tensor(self, name: str, tensor: PackedTensor) -> None:
        """A matrix; its lo plane becomes a section of its own. Blocks of 32 rows x `group` columns that hold only zero
        codes are left out under a tile mask where there are enough of them. Raises `ArtifactError` for sizes that
        contradict the shape, and for scales (f32, bf16: weights) that are NaN or infinite."""
        for plane, size in zip([tensor.hi, tensor.lo], tensor.sizes, strict=True):
            if plane is not None and (size == 0 or plane.nbytes != size):
                raise ArtifactError(f"{name}: {plane.nbytes} bytes, its shape implies {size}")
        if tensor.lo is None and tensor.lo_shift:
            raise ArtifactError(f"{name}: lo_shift without a lo plane")
        if not finite_scales(tensor):
            raise ArtifactError(f"{name}: a scale or weight is NaN or infinite")
        self._claim(name)
        tensor = without_empty(tensor)
        encoding, shape = ENCODINGS.index(tensor.encoding), (tensor.rows, tensor.cols, tensor.padded_cols)
        if tensor.kept is not None:  # first, so that a reader that knows no masks says what it misses
            stored = int(np.count_nonzero(tensor.stored))
            self._claim(name + MASK_SUFFIX)
            self._write(TILES, name + MASK_SUFFIX, tensor.kept, (encoding, 0, tensor.group, 0, *shape, stored))
        planes = [tensor.hi] if tensor.lo is None else [tensor.hi, tensor.lo]
        sizes = tile_bytes(tensor.encoding, tensor.padded_cols, tensor.group)
        for index, (plane, size) in enumerate(zip(planes, sizes, strict=False)):
            self._write(MATRIX, name, plane, (encoding, index, tensor.group, tensor.lo_shift, *shape, size))

    def add_vector(self, name: str, values: npt.NDArray[np.float32]) -> None:
        """A norm or bias, float32 [n]. Raises `ArtifactError` if a value is NaN or infinite."""
        flat = np.ascontiguousarray(values, dtype="<f4").reshape(-1)
        if flat.size == 0 or not np.isfinite(flat).all():
            raise ArtifactError(f"{name}: empty, or a value is NaN or infinite")
        self._claim(name)
        self._write(VECTOR, name, flat.view(np.uint8), (0, 0, 0, 0, flat.size, 1, 1, 0))

    def add_file(self, name: str, content: bytes | Path) -> None:
        """A file beside `model.haomiao` (tokenizer.json, chat_template.jinja, ...), replacing one of that name."""
        if not PLAIN_NAME.fullmatch(name) or name == MODEL_FILE:
            raise ArtifactError(f"{name!r} is not a name for a file of an artifact")
        with disk_errors(self.directory), (self._temporary / name).open("wb") as out:
            if isinstance(content, bytes):
                out.write(content)
            else:
                with content.open("rb") as source:
                    shutil.copyfileobj(source, out)
            _flush(out)

    def finish(self, meta: Mapping[str, Any]) -> Path:
        """Write the meta section and the header, make all of it durable and give it its name. Returns `directory`."""
        try:
            text = json.dumps(meta, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        except ValueError as wrong:
            raise ArtifactError(f"meta: {wrong}") from None
        if len(text) > MAX_META_BYTES:
            raise ArtifactError(f"meta: {len(text)} bytes of JSON, at most {MAX_META_BYTES} are allowed")
        self._claim("meta")
        self._write(META, "meta", np.frombuffer(text, dtype=np.uint8), (0,) * 8)
        with disk_errors(self.directory):
            self._write_header()
            _flush(self._file)
            self._file.close()
            _sync_directory(self._temporary)
            self._publish()
        self._cleanup.detach()
        os.close(self._lock)
        return self.directory

    def abort(self) -> None:
        """Remove what was written; idempotent, and harmless after `finish`."""
        self._file.close()
        self._cleanup()

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    # ---- how it gets there

    def _check_target(self) -> None:
        if not self.directory.is_dir():
            if self.directory.exists() or self.directory.is_symlink():
                raise InputError(f"{self.directory} exists and is not a directory")
        elif any(self.directory.iterdir()) and not (self._overwrite and (self.directory / MODEL_FILE).is_file()):
            reason = "is not an artifact" if self._overwrite else "exists already"
            raise InputError(f"{self.directory} {reason}; nothing was written")

    def _claim(self, name: str) -> None:
        if name in self._names:
            raise ArtifactError(f"{name}: added twice")
        if not 1 <= len(name.encode()) <= 255 or not name.isprintable():
            raise ArtifactError(f"{name[:64]!r} is not a name for a section")
        self._names.add(name)

    def _write(self, kind: int, name: str, body: U8, shape: tuple[int, ...]) -> None:
        crc = 0
        with disk_errors(self.directory):
            self._position += -self._position % ALIGN
            self._file.seek(self._position)
            for begin in range(0, body.nbytes, WRITE_CHUNK):
                chunk = np.ascontiguousarray(body[begin : begin + WRITE_CHUNK])
                crc = zlib.crc32(chunk.data, crc)
                self._file.write(chunk.data)
        self._entries.append((kind, name, self._position, body.nbytes, crc, shape))
        self._position += body.nbytes

    def _write_header(self) -> None:
        names = [entry[1].encode() for entry in self._entries]
        table_end = FIXED.size + ENTRY.size * len(names)
        header_bytes = table_end + sum(map(len, names))
        header_bytes += -header_bytes % ALIGN
        shift = max(0, header_bytes - self._body_start)
        if shift:
            self._move_bodies(shift)
        file_bytes = self._position + shift
        header = bytearray(FIXED.pack(MAGIC, MAJOR, MINOR, header_bytes, file_bytes, len(names), 0, 0))
        at = table_end
        for (kind, _, offset, size, crc, shape), name in zip(self._entries, names, strict=True):
            header += ENTRY.pack(kind, REQUIRED, at, len(name), offset + shift, size, crc, *shape)
            at += len(name)
        header += b"".join(names)
        header += bytes(header_bytes - len(header))
        struct.pack_into("<I", header, CRC_OFFSET, zlib.crc32(header))
        self._file.seek(0)
        self._file.write(header)
        self._file.truncate(file_bytes)

    def _move_bodies(self, shift: int) -> None:
        """Copy the file with its bodies `shift` bytes further down (a multiple of 64, as both ends are)."""
        moved = (self._temporary / (MODEL_FILE + ".moved")).open("wb+")
        self._file.seek(self._body_start)
        moved.seek(self._body_start + shift)
        shutil.copyfileobj(self._file, moved, WRITE_CHUNK)
        self._file.close()
        (self._temporary / (MODEL_FILE + ".moved")).replace(self._temporary / MODEL_FILE)
        self._file = moved

    def _publish(self) -> None:
        old: Path | None = None
        if self._overwrite and (self.directory / MODEL_FILE).is_file():
            old = temporary_name(self.directory)
            self.directory.rename(old)
        try:
            self._temporary.rename(self.directory)  # replaces an empty directory, fails on any other
        except OSError:
            if old is not None:
                old.rename(self.directory)
            raise
        _sync_directory(self.directory.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def finite_scales(tensor: PackedTensor) -> bool:
    """True if no scale (f32, bf16: no weight) is NaN or infinite. Reads the hi plane in bounded chunks."""
    if tensor.encoding == "f32":
        unit, limit = 4, None
    elif tensor.encoding == "bf16":
        unit, limit = 2, None
    else:
        size, _ = tile_bytes(tensor.encoding, tensor.group, tensor.group)
        unit, limit = size, 2 * TILE_ROWS
    step = max(1, WRITE_CHUNK // unit) * unit
    for begin in range(0, tensor.hi.nbytes, step):
        chunk = tensor.hi[begin : begin + step].reshape(-1, unit)[:, :limit]
        if tensor.encoding == "bf16":
            exponents = chunk.view("<u2") & 0x7F80
            if (exponents == 0x7F80).any():
                return False
        elif not np.isfinite(chunk.view("<f4" if tensor.encoding == "f32" else "<f2")).all():
            return False
    return True


# ---- temporary directories: hidden, beside the target, locked while their writer lives ------------------------------


def remove_leftovers(parent: Path, name: str = "*") -> list[Path]:
    """Remove what killed writers of `name` (default: of anything) left in `parent`. A writer that still runs holds a
    lock on its directory and is left alone."""
    removed = []
    for path in parent.glob(f".{name}.*.tmp"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
                removed.append(path)
            finally:
                os.close(descriptor)
    return removed


def temporary_name(target: Path) -> Path:
    """A fresh hidden name beside `target`, of the kind that `remove_leftovers` cleans up."""
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")


def _locked_temporary(target: Path) -> tuple[Path, int]:
    while True:
        path = temporary_name(target)
        path.mkdir()
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:  # a cleaner came between; its lock is on a directory that is gone
            continue
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists():
            return path, descriptor
        os.close(descriptor)


def _discard(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.close(lock)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
