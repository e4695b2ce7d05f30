"""What a command writes: text as it comes, one JSON object last, progress bars on a terminal, one receipt line.

Knows nothing about models. rich is imported only when a bar is really drawn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from haomiao.cli.options import decode_text

# C0 and C1 controls, without newline and tab: a model's text must not drive the reader's terminal
_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def write_text(text: str) -> None:
    """Text of a model on standard output, at once; on a terminal without control characters."""
    if not text:
        return
    if sys.stdout.isatty():
        text = text.translate(_CONTROLS)
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:  # a terminal that cannot show it still gets the rest
        encoding = sys.stdout.encoding or "ascii"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def write_json(value: Mapping[str, Any]) -> None:
    """One object on one line, the last of the output. A number that JSON has no form for is refused, not invented."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False), flush=True)


def note(line: str) -> None:
    """One line for the person at the terminal, on stderr."""
    print(line, file=sys.stderr, flush=True)


def read_input(what: str) -> str:
    """All of standard input as UTF-8. Raises `InputError` if it is not."""
    from haomiao.cli.options import TEXT_FILE_LIMIT

    return decode_text(sys.stdin.buffer.read(TEXT_FILE_LIMIT + 1), what)


def receipt_line(receipt: Mapping[str, Any], finish_reason: str | None = None) -> str:
    """The account of an answer on one line: outcome, time to first token, rate, point, error."""
    tokens = int(receipt.get("completion_tokens") or 0)
    parts = [str(receipt.get("outcome") or "no budget")]
    if receipt.get("budget_ms") is not None:
        parts[0] += f" ({receipt.get('total_ms', 0.0):.1f} of {receipt['budget_ms']:.0f} ms"
        predicted = receipt.get("predicted_ms")
        parts[0] += f", predicted at most {predicted:.1f})" if predicted is not None else ")"
    parts.append(f"{tokens} token{'s' * (tokens != 1)}" + (f" ({finish_reason})" if finish_reason else ""))
    if receipt.get("ttft_ms") is not None:
        parts.append(f"ttft {receipt['ttft_ms']:.1f} ms")
    decode_ms = float(receipt.get("decode_ms") or 0.0)
    if tokens > 1 and decode_ms > 0:
        per_token = decode_ms / (tokens - 1)  # the first token belongs to prefill
        parts.append(f"{per_token:.2f} ms/token")
        parts.append(f"{1e3 / per_token:.1f} tok/s")
    points = list(dict.fromkeys(str(entry["point"]) for entry in receipt.get("schedule") or ()))
    if points:
        parts.append("point " + "+".join(points))
    error = receipt.get("estimated_error")
    parts.append(f"error {error:.4f} nats/token" if error is not None else "error not measured")
    return "[" + " · ".join(parts) + "]"


def model_line(about: Mapping[str, Any]) -> str:
    """A prepared model on one line."""
    points = " ".join(about["points"])
    return f"{about['path']}: {about['family']}, {human_bytes(about['bytes'])}, points {points}"


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns padded to their widest cell; the first is left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: tuple[str, ...]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), *(line(row) for row in rows)])


def human_bytes(count: float) -> str:
    """`1.2 GB`: powers of 1000, as memory and disks are sold."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


class ProgressBar:
    """A bar on stderr while work goes on; nothing where stderr is not a terminal or `quiet` is set.

    Used as a context manager and called with (what, done, total); the bar begins with the first call.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._shown = sys.stderr.isatty() and not quiet
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: str, done: float, total: float) -> None:
        if not self._shown:
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(what, total=total or None)
        self._bar.update(self._task, description=what, completed=done, total=total or None)
