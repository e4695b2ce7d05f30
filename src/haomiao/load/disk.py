"""What a full or unwritable disk means to whoever writes: one clear line. Knows nothing about what is written."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from haomiao.errors import HaomiaoError, UnavailableError

FULL = (errno.ENOSPC, errno.EDQUOT)
KEPT = "; what was done is kept: make room and run the same command"


@contextlib.contextmanager
def disk_errors(path: Path, *, kept: bool = False) -> Iterator[None]:
    """Errors of the disk at `path` as `UnavailableError`; `kept`: the run that meets one can go on later."""
    try:
        yield
    except HaomiaoError:
        raise
    except OSError as wrong:
        if wrong.errno in FULL:
            raise UnavailableError(f"no room on the disk for {path}{KEPT if kept else ''}") from None
        raise UnavailableError(f"{path} cannot be written ({wrong.strerror or wrong})") from None
