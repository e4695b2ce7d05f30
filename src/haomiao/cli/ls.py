"""List the models that are prepared in the cache folder (HAOMIAO_CACHE)."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from haomiao.cli import terminal


def configure(parser: ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--json", action="store_true", help="print one object")


def run(args: Namespace) -> int:
    """List, newest first."""
    from haomiao.cli.models import listed

    models = listed()
    if args.json:
        terminal.write_json({"models": models})
    elif not models:
        terminal.note("no prepared models; `haomiao pull MODEL` prepares one")
    else:
        rows = [
            (model["name"], model["family"] or "?", " ".join(model["points"]), terminal.human_bytes(model["bytes"]))
            for model in models
        ]
        print(terminal.table(("model", "family", "points", "size"), rows))
    return 0
