"""What this machine is: processor, cores this process may use, memory, huge pages. Reads files; measures nothing.

Linux tells through /proc and /sys, macOS through sysctl; what cannot be found out is None, never a guess.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from haomiao.config import threads_from_environment

CPU_FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_vbmi2"),
    *("amx_tile", "amx_int8", "amx_bf16", "avx_vnni", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
"""What kernels use or may come to use, in /proc/cpuinfo's words."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A description that can stand beside a measurement."""

    system: str
    architecture: str
    processor: str | None
    features: tuple[str, ...]
    cores: int
    """Logical processors of the machine."""
    allowed: int
    """Those this process may run on (affinity)."""
    quota: float | None
    """Processors' worth of time that the cgroup grants; None if there is no limit."""
    memory_bytes: int | None
    available_bytes: int | None
    memory_limit_bytes: int | None
    """The cgroup's limit; None if there is none."""
    huge_pages: str | None
    """Transparent huge pages: always, madvise or never."""

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return asdict(self)


def describe_machine(root: Path = Path("/")) -> Machine:
    """Look around. `root` lets tests bring their own /proc and /sys."""
    memory = _meminfo(root)
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        architecture=platform.machine(),
        processor=_processor(root),
        features=_features(root),
        cores=os.cpu_count() or 1,
        allowed=_allowed(),
        quota=_cpu_quota(root),
        memory_bytes=memory.get("MemTotal") or _sysctl_number("hw.memsize"),
        available_bytes=memory.get("MemAvailable"),
        memory_limit_bytes=_memory_limit(root),
        huge_pages=_bracketed(_read(root / "sys/kernel/mm/transparent_hugepage/enabled")),
    )


def default_threads() -> int:
    """Threads that `LLM` takes when it is not told: `HAOMIAO_THREADS`, or one per physical core that affinity and quota
    permit."""
    from haomiao import _core

    return threads_from_environment() or _core.default_threads()


def _allowed() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Folders whose limits bind this process, innermost first: cgroup v2, then v1."""
    own = _read(root / "proc/self/cgroup")
    folders: list[Path] = []
    for line in own.splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names == "":
            base = root / "sys/fs/cgroup"
        elif controller in names.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        here = base / path.strip("/")
        while here != base:
            folders.append(here)
            here = here.parent
        folders.append(base)
    return folders or [root / "sys/fs/cgroup", root / "sys/fs/cgroup" / controller]


def _cpu_quota(root: Path) -> float | None:
    quotas: list[float] = []
    for folder in _cgroup_folders(root, "cpu"):
        words = _read(folder / "cpu.max").split()
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
        quota, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas) if quotas else None


def _memory_limit(root: Path) -> int | None:
    limits: list[int] = []
    for folder in _cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name).strip()
            if text.isdigit() and int(text) < 1 << 60:  # v1 writes a number near 2^63 for "no limit"
                limits.append(int(text))
    return min(limits) if limits else None


def _meminfo(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    found = re.findall(r"^(\w+):\s+(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE)
    return {name: int(value) * 1024 for name, value in found}


def _processor(root: Path) -> str | None:
    named = re.search(r"^model name\s*:\s*(.+)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return named.group(1).strip() if named else _sysctl("machdep.cpu.brand_string") or platform.processor() or None


def _features(root: Path) -> tuple[str, ...]:
    listed = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    have = set(listed.group(1).split()) if listed else set()
    return tuple(name for name in CPU_FEATURES if name in have)


def _bracketed(text: str) -> str | None:
    """The chosen word of `always [madvise] never`."""
    chosen = re.search(r"\[(\w+)\]", text)
    return chosen.group(1) if chosen else None


def _sysctl(name: str) -> str | None:
    if platform.system() != "Darwin":
        return None
    try:
        asked = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout.strip() or None


def _sysctl_number(name: str) -> int | None:
    text = _sysctl(name)
    return int(text) if text and text.isdigit() else None
