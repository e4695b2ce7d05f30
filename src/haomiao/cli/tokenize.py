"""Turn the text on standard input into token ids, exactly as it is (a newline at the end counts).

MODEL may also be a tokenizer.json, a tokenizer.model or a GGUF file; weights are not read.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from haomiao.cli import options, terminal


def configure(parser: ArgumentParser) -> None:
    """Declare the flags."""
    options.add_model(parser)
    parser.add_argument(
        "--special", action="store_true", help="add the special tokens that the model puts first or last"
    )
    parser.add_argument("--json", action="store_true", help='print {"token_ids": [...], "count": n}')


def run(args: Namespace) -> int:
    """Read, encode, print."""
    from haomiao.cli.models import open_tokenizer

    tokenizer = open_tokenizer(options.take_model(args), args)
    ids = [int(token) for token in tokenizer.encode(terminal.read_input("standard input"), special=args.special)]
    if args.json:
        terminal.write_json({"token_ids": ids, "count": len(ids)})
    else:
        print(*ids)
    return 0
