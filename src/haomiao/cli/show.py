"""What a model is: family, size, operating points and their measured errors, provenance.

--verify reads every byte of an artifact and compares checksums.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

from haomiao.cli import options, terminal
from haomiao.errors import InputError
from haomiao.progress import ProgressBar


def configure(parser: ArgumentParser) -> None:
    """Declare the flags."""
    options.add_model(parser)
    parser.add_argument("--tensors", action="store_true", help="list every section")
    parser.add_argument("--verify", action="store_true", help="check every byte")
    parser.add_argument("--json", action="store_true", help="print one object")


def run(args: Namespace) -> int:
    """Describe, and verify if asked; a wrong checksum is an `ArtifactError` that names the section."""
    model = options.take_model(args)

    from haomiao.cli.models import describe, find_artifact, sections, verify

    path = find_artifact(model)
    if path is None and (args.tensors or args.verify):
        raise InputError(f"{model} is no artifact; --tensors and --verify are for artifacts", param="model")
    about = describe(model, args)
    if path is not None and args.tensors:
        about["tensors"] = sections(path)
    if path is not None and args.verify:
        with ProgressBar(quiet=args.json) as bar:
            verify(path, bar)
        about["verified"] = True
    if args.json:
        terminal.write_json(about)
        return 0
    for key, value in about.items():
        if key != "tensors" and value is not None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            print(f"{key:<14}{terminal.human_bytes(value) if key == 'bytes' else text}")
    for row in about.get("tensors", ()):
        shape = f"{row['rows']} x {row['cols']}"
        left = "" if row.get("tiles_left", 1) == 1 else f"  {row['tiles_left']:.0%} of the tiles left"
        print(f"  {row['name']:<32} {row['encoding']:<10} {shape:<16} {terminal.human_bytes(row['bytes'])}{left}")
    return 0
