"""Remove prepared models from the cache folder, by the names that `haomiao ls` prints. Downloads are not touched."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from haomiao.cli import terminal


def configure(parser: ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("names", nargs="+", metavar="NAME", help="as `haomiao ls` prints it")
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--quiet", action="store_true", help="say nothing")


def run(args: Namespace) -> int:
    """Remove each; a name that is not there is an error, and what came before it stays removed."""
    from haomiao.load.cache import remove

    freed = 0
    for name in args.names:
        freed += remove(name)
    if args.json:
        terminal.write_json({"removed": args.names, "bytes": freed})
    elif not args.quiet:
        terminal.note(f"{terminal.human_bytes(freed)} freed")
    return 0
