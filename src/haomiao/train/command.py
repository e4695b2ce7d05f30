"""What the commands of `python -m haomiao.train.*` share: an error of ours is one line and its exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

from haomiao.errors import EXIT_INTERRUPTED, HaomiaoError


def run_command(main: Callable[[], int]) -> int:
    """Run a command; returns its exit code."""
    try:
        return main()
    except HaomiaoError as error:
        print(f"haomiao: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
