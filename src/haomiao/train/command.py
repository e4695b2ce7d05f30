"""What the commands of `python -m haomiao.train.*` share: errors in one line, and what is shown while they work.

The live line stands on stderr where that is a terminal: what is done, loss, throughput, time left. Everything in it
also goes to the log.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from haomiao.errors import HaomiaoError

EXIT_INTERRUPTED = 130


def run_command(main: Callable[[], int]) -> int:
    """Run a command; an error of ours is one line and its exit code."""
    try:
        return main()
    except HaomiaoError as error:
        print(f"haomiao: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED


class Live:
    """A bar with words beside it, on a terminal; nothing elsewhere. A context manager, called with
    (what, done, total, words)."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._shown = sys.stderr.isatty() and not quiet
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: str, done: int, total: int, words: str = "") -> None:
        if not self._shown:
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
            words_column = TextColumn("{task.fields[words]}", markup=False)
            self._bar = Progress(*columns, TimeRemainingColumn(), words_column, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(what, total=total, words=words)
        self._bar.update(self._task, description=what, completed=done, total=total, words=words)
