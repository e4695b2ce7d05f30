"""Convert a checkpoint into an artifact: weights in kernel layout, mapped and run without conversion.

SRC is a Hugging Face id or directory, or a GGUF file. Weights are rounded to nearest: `nested` keeps an int4 plane and
the plane that makes it int8; `full` keeps float32, `bf16` bfloat16, for reference.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from haomiao.cli import options, terminal
from haomiao.errors import InputError

SCHEMES = ("nested", "exact", "full", "bf16")
GROUPS = ("32", "64", "128")
LO_SHIFTS = ("3", "4")


def configure(parser: ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    options.add_model(parser, what="SRC")
    add("-o", "--output", required=True, metavar="OUT", help="directory to write; it must not exist or be empty")
    add("--scheme", type=options.one_of(SCHEMES), default="nested", help=f"{', '.join(SCHEMES)} (default nested)")
    add("--group", type=options.one_of(GROUPS), default="32", help="columns that share one scale (default 32)")
    add("--lo-shift", type=options.one_of(LO_SHIFTS), help="4: disjoint planes (default); 3: overlapping planes")
    add("--no-lo", action="store_true", help="leave the second plane out: an ordinary int4 model, half the size")
    add("--force", action="store_true", help="replace OUT if it is an artifact")
    add("--json", action="store_true", help="print one object about the artifact last")
    add("--quiet", action="store_true", help="no progress bar, no summary")


def run(args: Namespace) -> int:
    """Convert and say what became of it."""
    source = options.take_model(args)
    if args.no_lo and args.scheme != "nested":
        raise InputError("--no-lo belongs to --scheme nested", param="--no-lo")
    if args.lo_shift and args.scheme != "nested":
        raise InputError("--lo-shift belongs to --scheme nested", param="--lo-shift")

    from haomiao.cli.models import convert_model, describe

    chosen: dict[str, Any] = {"scheme": args.scheme, "group": int(args.group)}
    if args.lo_shift:
        chosen["lo_shift"] = int(args.lo_shift)
    if args.no_lo:
        chosen["lo"] = False
    with terminal.ProgressBar(quiet=args.quiet) as bar:
        out = convert_model(source, args.output, args, force=args.force, progress=bar, **chosen)
    about = describe(out)
    if args.json:
        terminal.write_json(about)
    elif not args.quiet:
        terminal.note(
            f"{out}: {about['family']}, {terminal.human_bytes(about['bytes'])}, points {' '.join(about['points'])}"
        )
    return 0
