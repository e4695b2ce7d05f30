"""How large the KV pool is, and with it the context: arithmetic on a plan and on the memory there is.

Knows nothing about executors; their own layouts differ from these counts by padding at most.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from haomiao.engine.state import blocks_for
from haomiao.errors import InputError
from haomiao.models.plan import Plan
from haomiao.types import KV_BLOCK_TOKENS, KvType

GIB = 1 << 30
DEFAULT_SEQUENCES = 8
"""Sequences of full length that a pool has room for, if memory permits."""
_KV_BYTES: dict[KvType, int] = {"f32": 4, "bf16": 2, "int8": 1}


@dataclass(frozen=True, slots=True)
class PoolSize:
    """What was decided."""

    max_context: int
    blocks: int


def kv_bytes_per_block(plan: Plan, kv: KvType) -> int:
    """Bytes of one block over all layers. int8 has a float32 scale for K and one for V, per token and head."""
    scales = 8 if kv == "int8" else 0
    per_token = sum(
        heads * (2 * dim * _KV_BYTES[kv] + scales) for heads, dim in zip(plan.kv_heads, plan.head_dims, strict=True)
    )
    return per_token * KV_BLOCK_TOKENS


def size_pool(plan: Plan, kv: KvType, *, max_context: int | None, kv_memory: int | None) -> PoolSize:
    """Context and blocks for a model. `max_context` None: the plan's, or as much of it as fits.

    `kv_memory` is in bytes; None is a quarter of what is available, at most 2 GiB, or more if `max_context` needs it.
    The pool is touched only as it is used. Raises `InputError` saying what to change if it cannot be.
    """
    if max_context is not None and (type(max_context) is not int or not 1 <= max_context <= plan.max_context):
        raise InputError(f"max_context must be 1 to {plan.max_context} for this model", param="max_context")
    if kv_memory is not None and (type(kv_memory) is not int or kv_memory < 1):
        raise InputError(f"kv_memory must be a positive number of bytes, not {kv_memory!r:.40}", param="kv_memory")
    per_block = kv_bytes_per_block(plan, kv)
    needed = blocks_for(max_context if max_context is not None else plan.max_context)
    available = available_memory()
    if kv_memory is not None:
        memory = kv_memory
    elif max_context is not None:
        memory = max(min(available // 4, 2 * GIB), min(needed * per_block, available))
    else:
        memory = min(available // 4, 2 * GIB)
    fitting = memory // per_block
    if fitting < 1 or (max_context is not None and fitting < needed):
        wanted = needed if max_context is not None else 1
        raise InputError(
            f"K and V of {wanted * KV_BLOCK_TOKENS} tokens take {_mib(wanted * per_block)} MiB as {kv} and "
            f"{_mib(memory)} MiB are allowed: raise kv_memory, lower max_context or choose a smaller kv",
            param="kv_memory",
        )
    blocks = int(min(fitting, max(DEFAULT_SEQUENCES * needed, 256)))
    context = max_context if max_context is not None else min(plan.max_context, blocks * KV_BLOCK_TOKENS)
    return PoolSize(context, blocks)


def available_memory() -> int:
    """Bytes that can be allocated without swapping: the machine's or the control group's, whichever is less."""
    found = [_meminfo(), _cgroup()]
    known = [bytes_ for bytes_ in found if bytes_ is not None]
    if known:
        return min(known)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError, AttributeError):
        return 4 * GIB


def _meminfo() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return None


def _cgroup() -> int | None:
    """What is left of the control group's limit (version 2; the root of the own namespace)."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        return None if limit == "max" else max(0, int(limit) - used)
    except (OSError, ValueError):
        return None


def _mib(bytes_: int) -> int:
    return -(-bytes_ // (1 << 20))
