"""Turn token ids on standard input back into text.

Ids are whole numbers between spaces, commas or newlines; a JSON list, or the object that `tokenize --json` prints, is
read too.
"""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser, Namespace

from haomiao.cli import options, terminal
from haomiao.errors import InputError


def configure(parser: ArgumentParser) -> None:
    """Declare the flags."""
    options.add_model(parser)
    parser.add_argument("--json", action="store_true", help='print {"text": ...}')


def run(args: Namespace) -> int:
    """Read, decode, print."""
    from haomiao.cli.models import open_tokenizer

    ids = parse_ids(terminal.read_input("standard input"))
    text = open_tokenizer(options.take_model(args), args).decode(ids)
    if args.json:
        terminal.write_json({"text": text})
    else:
        terminal.write_text(text)
    return 0


def parse_ids(text: str) -> list[int]:
    """Token ids of any of the accepted forms. Raises `InputError` naming the first word that is none."""
    stripped = text.strip()
    if stripped.startswith("{"):
        try:
            listed = json.loads(stripped).get("token_ids")
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"standard input begins like JSON but is not: {error}") from error
        if not isinstance(listed, list) or not all(type(token) is int and token >= 0 for token in listed):
            raise InputError('the object on standard input has no list of whole numbers "token_ids"')
        return listed
    words = re.split(r"[\s,]+", stripped.removeprefix("[").removesuffix("]").strip())
    for word in words:
        if word and not (word.isascii() and word.isdigit() and len(word) <= 10):
            raise InputError(f"{word[:40]!r} is not a token id")
    return [int(word) for word in words if word]
