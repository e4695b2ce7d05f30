"""What a run has done so far, on disk: `OUT.partial`, from which a killed run goes on and ends with the same bytes.

One file for every finished stage, complete under its name or absent: the matrices it solved, vectors that it changed,
and its line of the log. Later stages win over earlier ones. Knows no mathematics and no models.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from haomiao.errors import InputError, ModelError
from haomiao.kernels.pack import unpack
from haomiao.kernels.packed import ENCODINGS, TILE_ROWS, PackedTensor, tile_bytes
from haomiao.load.disk import disk_errors
from haomiao.load.jsonfile import parse_object
from haomiao.load.safetensors import SafetensorsFile
from haomiao.types import F32, I32

RUN_FILE = "run.json"
LOCK_FILE = "lock"
MAX_THREADS = 1024


class Workspace:
    """The folder of one run. `identity` is everything that decides the result; another run's folder is refused
    (`InputError`) unless `restart` discards it. Held by one process at a time; a context manager.

    `blas_threads` decides the last places too, but a run that goes on keeps the number it began with: the attribute
    says which.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], *, restart: bool = False, blas_threads: int = 1) -> None:
        self.folder = out.absolute().with_name(f"{out.absolute().name}.partial")
        self.resumed = False
        self.blas_threads = blas_threads
        with disk_errors(self.folder / LOCK_FILE, kept=True):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise InputError(f"{self.folder} is in use: another process is compressing into {out}") from None
        try:
            self._claim(dict(identity), restart)
            self._stages: dict[str, _Stage] = {}
            for path in sorted(self.folder.glob("*.stage")):
                self._stages[path.stem] = _Stage(path)
        except BaseException:
            os.close(self._lock)
            raise

    def _claim(self, identity: dict[str, Any], restart: bool) -> None:
        path = self.folder / RUN_FILE
        begun = _begun(path)
        if begun.get("identity") == json.loads(json.dumps(identity)) and not restart:
            self.resumed = True
            self.blas_threads = begun["blas_threads"]
            return
        if not restart and any(self.folder.glob("*.stage")):
            raise InputError(
                f"{self.folder} holds another run (other model, recipe or text); --restart discards it",
                code="other_run",
            )
        self._clear()
        with disk_errors(path, kept=True):
            part = path.with_suffix(".part")
            part.write_text(json.dumps({"identity": identity, "blas_threads": self.blas_threads}), encoding="utf-8")
            part.replace(path)

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.name != LOCK_FILE:
                path.unlink()

    # ---- stages

    def done(self, stage: str) -> bool:
        """True if the stage is finished."""
        return stage in self._stages

    def log(self, stage: str) -> dict[str, Any]:
        """What a finished stage said of itself."""
        log: dict[str, Any] = self._stages[stage].about["log"]
        return log

    def save(
        self,
        stage: str,
        tensors: Mapping[str, PackedTensor],
        vectors: Mapping[str, F32],
        log: Mapping[str, Any],
    ) -> None:
        """Finish a stage. Raises `UnavailableError` if the disk is full; nothing is half done then."""
        from safetensors.numpy import save_file

        arrays: dict[str, Any] = {}
        layout: dict[str, Any] = {}
        for name, tensor in tensors.items():
            arrays[f"hi/{name}"] = np.ascontiguousarray(tensor.hi)
            if tensor.lo is not None:
                arrays[f"lo/{name}"] = np.ascontiguousarray(tensor.lo)
            shape = (ENCODINGS.index(tensor.encoding), tensor.rows, tensor.cols, tensor.group, tensor.lo_shift)
            layout[name] = shape
        for name, vector in vectors.items():
            arrays[f"vector/{name}"] = np.ascontiguousarray(vector, np.float32)
        about = json.dumps({"layout": layout, "log": log}, allow_nan=False).encode()
        arrays["about"] = np.frombuffer(about, np.uint8)
        path = self.folder / f"{stage}.stage"
        part = path.with_suffix(".part")
        with disk_errors(path, kept=True):
            save_file(arrays, part)
            part.replace(path)
        self._stages[stage] = _Stage(path)

    def tensor(self, name: str) -> PackedTensor:
        """A matrix as the last stage left it: views of its file."""
        return next(s for s in reversed(self._ordered()) if name in s.tensors).tensors[name]

    def vector(self, name: str) -> F32:
        """A vector as the last stage left it."""
        return next(s for s in reversed(self._ordered()) if name in s.vectors).vectors[name]

    def rows(self, name: str, ids: I32) -> F32:
        """Rows [ids] of a table as it is stored, float32: only their tiles are unpacked."""
        table = self.tensor(name)
        tiles, where = np.unique(ids // TILE_ROWS, return_inverse=True)
        part = PackedTensor(
            table.encoding,
            len(tiles) * TILE_ROWS,
            table.cols,
            table.group,
            table.lo_shift,
            table.hi.reshape(table.tiles, -1)[tiles].reshape(-1),
            None if table.lo is None else table.lo.reshape(table.tiles, -1)[tiles].reshape(-1),
        )
        found: F32 = unpack(part)[where * TILE_ROWS + ids % TILE_ROWS]
        return found

    def logs(self) -> list[dict[str, Any]]:
        """The log lines of all stages that have one, in order."""
        return [stage.about["log"] for stage in self._ordered() if stage.about["log"]]

    def _ordered(self) -> list[_Stage]:
        return [self._stages[name] for name in sorted(self._stages)]

    # ---- life

    def remove(self) -> None:
        """The run is over: delete the folder."""
        self._stages = {}
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let another process have it; idempotent. A folder in which no stage was finished is removed."""
        if self._lock >= 0:
            if not self._stages:
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _begun(path: Path) -> dict[str, Any]:
    """What the run in this folder began with; empty if there is none or its file is damaged."""
    try:
        begun = parse_object(path.read_bytes(), str(path))
    except (OSError, ModelError):
        return {}
    threads = begun.get("blas_threads")
    return begun if isinstance(threads, int) and 1 <= threads <= MAX_THREADS else {}


class _Stage:
    """One stage's file, mapped and checked: it may have been touched since."""

    def __init__(self, path: Path) -> None:
        file = SafetensorsFile(path)
        self.about = parse_object(file.raw("about").tobytes(), str(path))
        self.tensors: dict[str, PackedTensor] = {}
        try:
            for name, (encoding, rows, cols, group, lo_shift) in self.about["layout"].items():
                lo = file.raw(f"lo/{name}") if f"lo/{name}" in file.entries else None
                hi = file.raw(f"hi/{name}")
                tensor = PackedTensor(ENCODINGS[encoding], rows, cols, group, lo_shift, hi, lo)
                sizes = tile_bytes(tensor.encoding, tensor.padded_cols, group)
                if hi.nbytes != tensor.tiles * sizes[0] or (lo is not None and lo.nbytes != tensor.tiles * sizes[1]):
                    raise ModelError(f"{path}: {name} has the wrong size")
                self.tensors[name] = tensor
        except (KeyError, TypeError, ValueError, IndexError):
            raise ModelError(f"{path} is damaged; --restart begins anew") from None
        names = [name for name in file.entries if name.startswith("vector/")]
        self.vectors = {name.removeprefix("vector/"): file.read(name) for name in names}


def digest(*parts: Any) -> str:
    """16 hex digits of arrays and texts."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.tobytes() if isinstance(part, np.ndarray) else str(part).encode())
    return total.hexdigest()[:16]
