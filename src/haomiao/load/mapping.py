"""Files as read-only memory: mapped and shared between processes, or copied into huge pages.

Knows nothing about formats. Only regular files are opened, so that a pipe or device under a model's name cannot hang
or flood the reader.
"""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path

import numpy as np

from haomiao.errors import ModelError
from haomiao.types import U8

HUGE_PAGE = 2 << 20
COPY_CHUNK = 16 << 20


def map_file(path: Path, *, error: type[ModelError] = ModelError, hugepages: bool = False) -> U8:
    """The bytes of a file, uint8 [size], not writable. The memory lives as long as any view of the array does.

    `hugepages` copies them into anonymous memory advised to use huge pages: fewer TLB misses, no sharing between
    processes. Raises `error` for what is missing, empty or not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as wrong:
        raise error(f"{path}: cannot be opened ({wrong.strerror})") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path}: not a regular file")
        if status.st_size == 0:
            raise error(f"{path}: the file is empty")
        if hugepages:
            return _copy(descriptor, status.st_size, path, error)
        return np.frombuffer(mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ), dtype=np.uint8)
    except OSError as wrong:
        raise error(f"{path}: cannot be mapped ({wrong.strerror})") from None
    finally:
        os.close(descriptor)


def _copy(descriptor: int, size: int, path: Path, error: type[ModelError]) -> U8:
    memory = mmap.mmap(-1, size + HUGE_PAGE)  # room to begin at a huge page's boundary
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, dtype=np.uint8)
    begin = -whole.ctypes.data % HUGE_PAGE
    copy = whole[begin : begin + size]
    done = 0
    while done < size:
        got = os.preadv(descriptor, [copy[done : done + COPY_CHUNK].data], done)
        if got == 0:
            raise error(f"{path}: the file became shorter while it was read")
        done += got
    copy.flags.writeable = False
    return copy
