"""Choose one of several continuations of a prompt: a decision from a single reading of it.

One positional argument is the PROMPT for the embedded model (or for --model); two are MODEL and PROMPT. A PROMPT of `-`
is read from standard input. The option that is printed is the one whose tokens and end are the likeliest. A model that
`haomiao finetune` taught labels needs no --option: PROMPT is then the text that has a label.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from haomiao.cli import options, terminal
from haomiao.cli.generate import take_words
from haomiao.progress import ProgressBar


def configure(parser: ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("words", nargs="*", metavar="[MODEL] PROMPT", help="`-` reads the prompt from standard input")
    options.add_model_flag(parser)
    options.add_runtime(parser)
    parser.add_argument(
        "--option", action="append", metavar="TEXT", help="a continuation; repeat it (default: the model's labels)"
    )
    parser.add_argument("--normalize", action="store_true", help="divide scores by the number of tokens")
    options.add_budget(parser, first_token=False)
    parser.add_argument("--json", action="store_true", help="print one object instead of the option")
    parser.add_argument("--quiet", action="store_true", help="no receipt line, no progress bar")


def run(args: Namespace) -> int:
    """Print the likeliest option."""
    model, prompt = take_words(args)
    if prompt == "-":
        prompt = terminal.read_input("the prompt").removesuffix("\n")
    options.take_environment(args)

    from haomiao.api import LLM

    with ProgressBar(quiet=args.quiet) as bar:
        llm = LLM(model if model is not None else args.model, progress=bar, **options.runtime_options(args))
        try:
            if args.option:
                chosen = llm.choose(prompt, args.option, normalize=args.normalize, **options.budget_options(args))
            else:
                chosen = llm.decide(prompt, **options.budget_options(args))
        finally:
            llm.close()
    account = chosen.receipt.as_dict()
    if args.json:
        terminal.write_json(
            {"option": chosen.option, "index": chosen.index, "scores": chosen.scores, "receipt": account}
        )
    else:
        terminal.write_text(chosen.option.strip() + "\n")
        if not args.quiet:
            terminal.note(terminal.receipt_line(account))
    return 0
