"""Checkpoints of a run: everything that decides what comes next, in files that are whole or absent.

`state-NNNNNNNN/` holds `state.json` (step, identity of the run, what the loop remembers, digests) and the tensors as
one safetensors file cut into parts, so that a large one travels in small files. No pickle. The two newest are kept.
Knows nothing about what the tensors are.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from haomiao.errors import InputError, ModelError
from haomiao.load.disk import disk_errors
from haomiao.load.jsonfile import parse_object

KEPT = 2
LOCK_FILE = "lock"


@dataclass(frozen=True)
class State:
    """What was saved: the step that comes next, tensors, and the loop's own memory."""

    step: int
    tensors: dict[str, Tensor]
    memory: dict[str, Any]


class RunFolder:
    """The folder of one run, held by one process at a time; a context manager. `identity` is what decides the numbers:
    another run's folder is refused (`InputError`) unless `restart` discards its checkpoints."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, part_mib: int = 16, restart: bool = False) -> None:
        self.folder, self._part = folder, part_mib << 20
        self._identity = json.loads(json.dumps(identity, sort_keys=True))
        with disk_errors(folder / LOCK_FILE, kept=True):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise InputError(f"{folder} is in use: another process is training in it", param="out") from None
        for left in folder.glob(".state-*"):
            shutil.rmtree(left, ignore_errors=True)
        if restart:
            for path in self._states():
                shutil.rmtree(path)

    def _states(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("state-*") if (p / "state.json").is_file())

    def save(self, state: State) -> None:
        """Write a checkpoint and remove the oldest. Raises `UnavailableError` if the disk is full; nothing is lost."""
        from safetensors.torch import save

        name = f"state-{state.step:08d}"
        temporary = self.folder / f".{name}"
        with disk_errors(temporary, kept=True):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            data = save({key: value.detach().cpu().contiguous() for key, value in state.tensors.items()})
            parts = []
            for index, begin in enumerate(range(0, len(data), self._part)):
                part = data[begin : begin + self._part]
                (temporary / f"tensors.{index:03d}").write_bytes(part)
                parts.append(hashlib.sha256(part).hexdigest())
            about = {"step": state.step, "identity": self._identity, "memory": state.memory, "parts": parts}
            (temporary / "state.json").write_text(json.dumps(about), encoding="utf-8")
            shutil.rmtree(self.folder / name, ignore_errors=True)
            temporary.rename(self.folder / name)
        for old in self._states()[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self) -> State | None:
        """The newest checkpoint, None if there is none. Raises `InputError` for another run's, `ModelError` for a
        damaged one."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        states = self._states()
        if not states:
            return None
        path = states[-1]
        about = parse_object((path / "state.json").read_bytes(), str(path))
        if about.get("identity") != self._identity:
            differs = [k for k, v in self._identity.items() if (about.get("identity") or {}).get(k) != v]
            raise InputError(
                f"{self.folder} holds another run ({', '.join(differs) or 'other keys'} differ); --restart discards it",
                code="other_run",
            )
        try:
            parts = [(path / f"tensors.{i:03d}").read_bytes() for i in range(len(about["parts"]))]
            if [hashlib.sha256(part).hexdigest() for part in parts] != about["parts"]:
                raise ValueError
            return State(int(about["step"]), load(b"".join(parts)), dict(about["memory"]))
        except (OSError, KeyError, TypeError, ValueError, SafetensorError):
            raise ModelError(f"{path} is damaged; remove it to go on from an older one") from None

    def close(self) -> None:
        """Let another process have it; idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
