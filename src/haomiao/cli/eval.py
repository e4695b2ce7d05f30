"""Measure a model on a text: its perplexity, and with --against how far one operating point is from another.

The text is cut into windows that do not overlap; intervals (95 %) come from a bootstrap over windows. Every figure is
printed with the text's name, the number of tokens and the interval.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from haomiao.cli import options, terminal


def configure(parser: ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    options.add_model(parser)
    options.add_runtime(parser)
    add("--text", required=True, metavar="FILE", help="UTF-8 text")
    add(
        "--against",
        type=options.one_of(options.POINT_NAMES),
        metavar="POINT",
        help="compare with this point of the same model",
    )
    add("--window", type=options.positive, default=512, help="tokens of a window (default 512)")
    add("--tokens", type=options.positive, default=8192, help="most tokens taken from the text's start (default 8192)")
    add("--json", action="store_true", help="print one object last")
    add("--quiet", action="store_true", help="no progress bar")


def run(args: Namespace) -> int:
    """Measure and print."""
    model = options.take_model(args)
    given = options.runtime_options(args)
    text = options.read_text(args.text, "--text")

    from haomiao.api import LLM
    from haomiao.measure.accuracy import measure_agreement, measure_perplexity
    from haomiao.measure.report import accuracy_lines

    given.setdefault("max_context", args.window)
    given.pop("point", None)
    report: dict[str, Any] = {"text": Path(args.text).name}
    opened: list[Any] = []
    with terminal.ProgressBar(quiet=args.quiet) as bar:
        try:
            llm = LLM(model, point=args.point, progress=bar, **given)
            opened.append(llm)
            ids: Sequence[int] = llm.tokenize(text)[: args.tokens]
            report |= {"model": llm.name, "point": llm.point}
            if args.against:
                reference = LLM(model, point=args.against, progress=bar, **given)
                opened.append(reference)
                agreement = measure_agreement(
                    reference.logits, llm.logits, ids, window=args.window, progress=lambda d, n: bar("tokens", d, n)
                )
                report |= {"against": reference.point, **agreement.as_dict()}
            else:
                result = measure_perplexity(
                    llm.logits, ids, window=args.window, progress=lambda d, n: bar("tokens", d, n)
                )
                report |= result.as_dict()
        finally:
            for each in opened:
                each.close()
    if args.json:
        terminal.write_json(report)
    else:
        print(accuracy_lines(report))
    return 0
