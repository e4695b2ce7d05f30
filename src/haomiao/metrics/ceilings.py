"""The machine's ceilings, measured: how fast memory can be read and how many int8 operations the cores can do.

Every speed this project prints stands beside one of these. Knows nothing about models; the measuring loops are native
(`_core.read_bandwidth`, `_core.int8_peak`).
"""

from __future__ import annotations

from dataclasses import dataclass

from haomiao.errors import UnavailableError


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What `threads` cores of this machine reach together."""

    threads: int
    read_gb_s: float
    """Sequential reads from memory, 10^9 bytes per second, on a buffer larger than the caches."""
    int8_gops: float
    """Multiplications and additions of int8 dot products, 10^9 per second (a multiply-add counts as two)."""

    def as_dict(self) -> dict[str, float | int]:
        """A JSON-ready copy."""
        return {"threads": self.threads, "read_gb_s": self.read_gb_s, "int8_gops": self.int8_gops}


def measure_ceilings(threads: int, *, megabytes: int = 256, seconds: float = 0.5) -> Ceilings:
    """Measure both, for about `seconds` each; the buffer takes `megabytes` and should exceed the last-level cache.

    Raises `UnavailableError` where the compiled core is missing.
    """
    try:
        from haomiao import _core
    except ImportError as error:
        raise UnavailableError(f"the compiled core cannot be loaded: {error}") from error
    return Ceilings(
        threads=threads,
        read_gb_s=float(_core.read_bandwidth(threads, megabytes, seconds)),
        int8_gops=float(_core.int8_peak(threads, seconds)),
    )
