"""What a model is: family, size, operating points and their measured errors, provenance.

--verify reads every byte of an artifact and compares checksums.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

from haomiao.cli import options, terminal


def configure(parser: ArgumentParser) -> None:
    """Declare the flags."""
    options.add_model(parser)
    parser.add_argument("--tensors", action="store_true", help="list every section")
    parser.add_argument("--verify", action="store_true", help="check every byte")
    parser.add_argument("--json", action="store_true", help="print one object")


def run(args: Namespace) -> int:
    """Describe, and verify if asked; a wrong checksum is an `ArtifactError` that names the section."""
    model = options.take_model(args, needed=False)

    from haomiao.cli.models import describe, find_artifact, tensors, verify

    path = find_artifact(model, args)
    about = describe(path)
    if args.tensors:
        about["tensors"] = tensors(path)
    if args.verify:
        verify(path)
        about["verified"] = True
    if args.json:
        terminal.write_json(about)
        return 0
    for key, value in about.items():
        if key == "tensors":
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        print(f"{key:<14}{terminal.human_bytes(value) if key == 'bytes' else text}")
    for row in about.get("tensors", ()):
        print(
            f"  {row['name']:<40} {row['encoding']:<8} {row['rows']} x {row['cols']}",
            terminal.human_bytes(row["bytes"]),
        )
    return 0
