"""Instruction sets: what this machine can run, and which one is used. Knows nothing about kernels."""

from __future__ import annotations

import os

from haomiao.errors import UnavailableError


def available() -> tuple[str, ...]:
    """Instruction sets that are compiled in and that processor and operating system can run, best first."""
    from haomiao import _core

    return tuple(_core.isas())


def selected() -> str:
    """The best instruction set, or the one that `HAOMIAO_ISA` forces. Raises `UnavailableError` if it cannot run."""
    forced = os.environ.get("HAOMIAO_ISA")
    names = available()
    if not forced:
        return names[0]
    if forced not in names:
        raise UnavailableError(f"HAOMIAO_ISA={forced}: this machine can run {', '.join(names)}", param="HAOMIAO_ISA")
    return forced


def allowed_cores() -> tuple[int, ...]:
    """Cores that this process may run on, ascending; where the system does not say, as many as there are."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))
