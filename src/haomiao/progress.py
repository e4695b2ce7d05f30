"""The bar on a terminal while work goes on: how far it is, what it is at, the time left. Knows nothing about the work.

Any room above may show one; rich is imported only when a bar is really drawn.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class ProgressBar:
    """A bar on stderr while work goes on; nothing where stderr is not a terminal or `quiet` is set.

    Used as a context manager and called with (what, done, total) and words to stand beside them; the bar begins with
    the first call. `counted` shows done and total instead of a percentage, and leaves the bar where it ended.
    """

    def __init__(self, *, quiet: bool = False, counted: bool = False) -> None:
        self._shown = sys.stderr.isatty() and not quiet
        self._counted = counted
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: str, done: float, total: float, words: str = "") -> None:
        if not self._shown:
            return
        if self._bar is None:
            self._bar = self._begun()
            self._task = self._bar.add_task(what, total=total or None, words=words)
        self._bar.update(self._task, description=what, completed=done, total=total or None, words=words)

    def _begun(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn() if self._counted else TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[words]}", markup=False),
            console=Console(stderr=True),
            transient=not self._counted,
        )
        bar.start()
        return bar
