"""Where converted models live: `HAOMIAO_CACHE/artifacts/<name>-<key>`, one directory each.

Knows artifacts and their names, not how they are made. Two processes that want the same model wait for each other;
what killed conversions left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haomiao.config import cache_dir
from haomiao.errors import HaomiaoError, InputError, ModelNotFoundError, UnavailableError
from haomiao.load.artifact import Artifact, is_artifact
from haomiao.load.artifact_writer import MAJOR, MINOR, remove_leftovers, temporary_name

MAX_SLUG = 80
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A converted model. `name` is the directory's; `last_used` is in seconds since the epoch."""

    name: str
    path: Path
    bytes: int
    points: tuple[str, ...]
    source: str
    """What it was made from; empty if the artifact cannot be read (it can still be removed)."""
    last_used: float


def artifacts_dir() -> Path:
    """The directory of all converted models; it may not exist yet."""
    return cache_dir() / "artifacts"


def key(identity: str, **scheme: Any) -> str:
    """16 hex digits that change with the checkpoint, the scheme and the artifact's format."""
    text = json.dumps([MAJOR, MINOR, identity, sorted(scheme.items())], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def artifact_path(name: str, identity: str, **scheme: Any) -> Path:
    """Where the conversion of a checkpoint by a scheme belongs. `name` may be anything; only its plain part is used."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-_")[:MAX_SLUG] or "model"
    return artifacts_dir() / f"{slug}-{key(identity, **scheme)}"


@contextlib.contextmanager
def conversion_lock(target: Path) -> Iterator[None]:
    """Hold the one right to make or remove `target`; waits for whoever holds it. Look again whether it exists."""
    locks = target.parent / ".locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(locks / f"{target.name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as wrong:
        raise UnavailableError(
            f"the cache {target.parent} cannot be written ({wrong.strerror}); set HAOMIAO_CACHE to a directory that can"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        remove_leftovers(target.parent, target.name)
        yield
    finally:
        os.close(descriptor)  # and with it the lock


def touch(target: Path) -> None:
    """Remember that the model was used now. A cache that cannot be written is no error."""
    with contextlib.suppress(OSError):
        os.utime(target)


def list_models() -> list[CachedModel]:
    """The converted models, last used first."""
    directory = artifacts_dir()
    if not directory.is_dir():
        return []
    found = [
        _describe(path)
        for path in directory.iterdir()
        if NAME.fullmatch(path.name) and not path.is_symlink() and is_artifact(path)
    ]
    return sorted(found, key=lambda model: (-model.last_used, model.name))


def remove(name: str) -> int:
    """Delete a converted model by its name in `list_models`; returns the bytes freed. The source is not touched.

    Raises `InputError` for what cannot be a name, `ModelNotFoundError` for what is not there.
    """
    if not NAME.fullmatch(name):
        raise InputError(f"{name[:128]!r} is not the name of a converted model", param="name")
    path = artifacts_dir() / name
    if path.is_symlink() or not is_artifact(path):
        raise ModelNotFoundError(f"no converted model named {name}")
    with conversion_lock(path):
        freed = _size(path)
        doomed = temporary_name(path)
        try:
            path.rename(doomed)  # gone at once; a kill from here on leaves what the next conversion removes
            shutil.rmtree(doomed)
        except OSError as wrong:
            raise UnavailableError(f"{path} cannot be removed ({wrong.strerror})") from None
    return freed


def _describe(path: Path) -> CachedModel:
    points: tuple[str, ...] = ()
    source = ""
    with contextlib.suppress(HaomiaoError), Artifact.open(path) as artifact:
        provenance = artifact.meta.get("provenance")
        source = str(provenance.get("source", "")) if isinstance(provenance, dict) else ""
        offered = artifact.meta.get("points")
        points = tuple(str(point) for point in offered) if isinstance(offered, list) else ()
    return CachedModel(path.name, path, _size(path), points, source, path.stat().st_mtime)


def _size(path: Path) -> int:
    return sum(item.stat().st_size for item in path.iterdir() if item.is_file() and not item.is_symlink())
