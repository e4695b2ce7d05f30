"""Download a model from the Hugging Face hub, or take one from disk, and prepare it: the first run then starts at once.

An interrupted download goes on where it stopped. HF_TOKEN gives access to gated models.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from haomiao.cli import options, terminal
from haomiao.progress import ProgressBar


def configure(parser: ArgumentParser) -> None:
    """Declare the flags."""
    options.add_model(parser)
    parser.add_argument(
        "--point", type=options.one_of(options.POINT_NAMES), help="prepare it for this point [HAOMIAO_POINT]"
    )
    parser.add_argument("--json", action="store_true", help="print one object about the prepared model")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def run(args: Namespace) -> int:
    """Download, convert, say where it is."""
    model = options.require_model(args)

    from haomiao.cli.models import describe_artifact, origin
    from haomiao.models.open import open_model

    with ProgressBar(quiet=args.quiet) as bar:
        opened = open_model(model, point=args.point, progress=bar, **origin(args))
    about = describe_artifact(opened.files_dir)
    if args.json:
        terminal.write_json(about)
    elif not args.quiet:
        terminal.note(terminal.model_line(about))
    return 0
