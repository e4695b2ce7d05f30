"""Convert a checkpoint into an artifact: weights in kernel layout, mapped and run without conversion.

SRC is a Hugging Face id or directory, or a GGUF file. `nested` keeps an int4 plane and the plane that makes it int8,
rounded to nearest; what SRC has in codes that fit four bits (GGUF Q4_0, int4 checkpoints) keeps them. `exact` keeps
eight-bit codes too (GGUF Q8_0, int8 checkpoints), which then have no int4 plane of their own. `full` keeps the weights
as loaded, `bf16` rounds them to bfloat16.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

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
    model = options.require_model(args)
    if args.no_lo and args.scheme != "nested":
        raise InputError("--no-lo belongs to --scheme nested", param="--no-lo")
    if args.lo_shift and args.scheme != "nested":
        raise InputError("--lo-shift belongs to --scheme nested", param="--lo-shift")

    from haomiao.cli.models import describe_artifact, open_checkpoint
    from haomiao.models.convert import convert

    with terminal.ProgressBar(quiet=args.quiet) as bar:
        source = open_checkpoint(model, args, bar)
        try:
            out = convert(
                source,
                Path(args.output),
                scheme=args.scheme,
                group=int(args.group),
                lo_shift=int(args.lo_shift or 4),
                with_lo=not args.no_lo,
                overwrite=args.force,
                progress=bar,
            )
        finally:
            source.close()
    about = describe_artifact(out)
    if args.json:
        terminal.write_json(about)
    elif not args.quiet:
        terminal.note(terminal.model_line(about))
    return 0
