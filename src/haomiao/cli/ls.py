"""List the models that are prepared in the cache folder (HAOMIAO_CACHE), last used first."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace

from haomiao.cli import terminal


def configure(parser: ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--json", action="store_true", help="print one object")


def run(args: Namespace) -> int:
    """List them."""
    from haomiao.load.cache import list_models

    models = list_models()
    if args.json:
        listed = [
            {
                "name": model.name,
                "source": model.source,
                "points": list(model.points),
                "bytes": model.bytes,
                "path": str(model.path),
                "last_used": model.last_used,
            }
            for model in models
        ]
        terminal.write_json({"models": listed, "bytes": sum(model.bytes for model in models)})
    elif not models:
        terminal.note("no prepared models; `haomiao pull MODEL` prepares one")
    else:
        rows = [
            (
                model.name,
                " ".join(model.points) or "unreadable",
                terminal.human_bytes(model.bytes),
                time.strftime("%Y-%m-%d %H:%M", time.localtime(model.last_used)),
            )
            for model in models
        ]
        print(terminal.table(("model", "points", "size", "last used"), rows))
    return 0
