"""What a command writes: text as it comes, one JSON object last, one receipt line.

Knows nothing about models.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from haomiao.cli.options import decode_text
from haomiao.errors import EXIT_INTERRUPTED

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


def tell_learnt(
    args: Namespace, report: Mapping[str, Any] | None, told: Callable[[str, Mapping[str, Any]], list[str]]
) -> int:
    """How a training ends: stopped half-way (`report` is None), as one object, or in the lines that `told` makes of
    --output and report. Returns the exit code."""
    if report is None:
        note("stopped; the same command goes on")
        return EXIT_INTERRUPTED
    if args.json:
        write_json({"path": args.output, **report})
    elif not args.quiet:
        for line in told(args.output, report):
            note(line)
    return 0
