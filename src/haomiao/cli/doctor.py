"""What this machine has, and what would run how fast on it.

Memory bandwidth and the int8 peak are measured (about two seconds). The table gives upper bounds from bytes and
operations alone: decoding cannot be faster than memory delivers the weights, nor prefill faster than the
cores multiply.
"""

from __future__ import annotations

import platform
from argparse import ArgumentParser, Namespace
from typing import Any

from haomiao import __version__
from haomiao.cli import options, terminal

ROWS = ("qwen2.5-0.5b", "llama-3.2-1b", "llama-2-7b")


def configure(parser: ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--threads", type=options.positive, help="default: the cores this process may use [HAOMIAO_THREADS]"
    )
    parser.add_argument("--seconds", type=options.number, default=1.0, help="for each measurement (default 1)")
    parser.add_argument("--json", action="store_true", help="print one object")


def run(args: Namespace) -> int:
    """Look, measure, print."""
    options.take_environment(args)
    report = examine(args.threads, args.seconds)
    if args.json:
        terminal.write_json(report)
    else:
        print(render(report))
    return 0


def examine(threads: int | None, seconds: float) -> dict[str, Any]:
    """Everything `doctor` knows, JSON-ready."""
    from haomiao.config import cache_dir
    from haomiao.kernels import isa
    from haomiao.measure.machine import default_threads, describe_machine
    from haomiao.metrics.ceilings import measure_ceilings

    machine = describe_machine()
    ceilings = measure_ceilings(threads or default_threads(), seconds=seconds)
    return {
        "version": __version__,
        "python": platform.python_version(),
        "machine": machine.as_dict(),
        "isa": {"available": list(isa.available()), "selected": isa.selected()},
        "cache": str(cache_dir()),
        "ceilings": ceilings.as_dict(),
        "estimates": estimates(ceilings.read_gb_s, ceilings.int8_gops),
    }


def estimates(read_gb_s: float, int8_gops: float) -> list[dict[str, Any]]:
    """Upper bounds for well-known shapes at both integer points, group 32, one stream, short context."""
    from haomiao.measure.shapes import SHAPES

    return [
        {
            "model": name,
            "point": point,
            "weights_gb": SHAPES[name].bytes_per_step(point) / 1e9,
            "decode_tok_s": 1e9 * read_gb_s / SHAPES[name].bytes_per_step(point),
            "prefill_tok_s": 1e9 * int8_gops / SHAPES[name].operations_per_token(),
        }
        for name in ROWS
        for point in ("int4", "int8")
    ]


def render(report: dict[str, Any]) -> str:
    """The report for a person."""
    machine, ceilings = report["machine"], report["ceilings"]
    size = terminal.human_bytes

    def known(value: float | None) -> str:
        return "unknown" if value is None else size(value)

    quota = "no quota" if machine["quota"] is None else f"quota {machine['quota']:.2f}"
    limit = "no limit" if machine["memory_limit_bytes"] is None else f"limit {size(machine['memory_limit_bytes'])}"
    facts = [
        ("haomiao", f"{report['version']}, Python {report['python']}, {machine['system']} {machine['architecture']}"),
        ("processor", machine["processor"] or "unknown"),
        ("features", " ".join(machine["features"]) or "none that kernels use"),
        ("kernels", f"{report['isa']['selected']} (available: {' '.join(report['isa']['available'])})"),
        ("cores", f"{machine['cores']}, allowed {machine['allowed']}, {quota}"),
        ("memory", f"{known(machine['memory_bytes'])}, available {known(machine['available_bytes'])}, {limit}"),
        ("huge pages", machine["huge_pages"] or "unknown"),
        ("cache", report["cache"]),
        ("read", f"{ceilings['read_gb_s']:.1f} GB/s with {ceilings['threads']} threads"),
        ("int8 peak", f"{ceilings['int8_gops']:.0f} Gop/s with {ceilings['threads']} threads"),
    ]
    rows = [
        (
            f"{row['model']} {row['point']}",
            size(1e9 * row["weights_gb"]),
            f"{row['decode_tok_s']:.1f}",
            f"{row['prefill_tok_s']:.0f}",
        )
        for row in report["estimates"]
    ]
    lines = [f"{name:<12}{text}" for name, text in facts]
    header = ("at most, one stream", "reads a token", "decode tok/s", "prefill tok/s")
    return "\n".join([*lines, "", terminal.table(header, rows)])
