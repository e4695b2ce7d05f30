"""Continue a prompt; the text streams as it is produced.

One positional argument is the PROMPT for the embedded model (or for --model); two are MODEL and PROMPT. A PROMPT of `-`
is read from standard input (one newline at its end is taken off). Afterwards one line on stderr accounts for it.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from haomiao.cli import options, terminal
from haomiao.errors import InputError
from haomiao.progress import ProgressBar

EMBEDDED: dict[str, Any] = {
    "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1, "min_tokens": 16, "seed": 1,
}  # fmt: skip
"""How the embedded model is sampled unless something is said about it: so small a model goes round in circles when it
is greedy, and ends at once after a prompt that looks whole."""


def configure(parser: ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("words", nargs="*", metavar="[MODEL] PROMPT", help="`-` reads the prompt from standard input")
    options.add_model_flag(parser)
    options.add_runtime(parser)
    options.add_speculation(parser)
    options.add_sampling(parser)
    options.add_constraints(parser)
    options.add_budget(parser)
    parser.add_argument("--logprobs", type=options.natural, metavar="N", help="with --json: N alternatives a token")
    parser.add_argument("--json", action="store_true", help="print one object instead of the text")
    parser.add_argument("--quiet", action="store_true", help="no receipt line, no progress bar")


def run(args: Namespace) -> int:
    """Stream one answer."""
    model, prompt = take_words(args)
    if prompt == "-":
        prompt = terminal.read_input("the prompt").removesuffix("\n")
    options.take_environment(args)
    model = model if model is not None else args.model
    asked = options.sampling_options(args)
    if model is None and not set(asked) - {"max_tokens", *options.BUDGETS}:
        timed = not set(asked).isdisjoint(options.BUDGETS)  # a least length may be more than a budget can keep
        least = 0 if timed else min(EMBEDDED["min_tokens"], asked.get("max_tokens", 16))
        asked = EMBEDDED | {"min_tokens": least} | asked

    from haomiao.api import LLM

    with ProgressBar(quiet=args.quiet) as bar:
        llm = LLM(model, progress=bar, **options.runtime_options(args))
    try:
        return stream_answer(llm, prompt, asked, as_json=args.json, quiet=args.quiet)
    finally:
        llm.close()


def take_words(args: Namespace) -> tuple[str | None, str]:
    """(MODEL or None, PROMPT) of one or two positional words."""
    words: list[str] = args.words
    if len(words) == 2 and args.model is None:
        return words[0], words[1]
    if len(words) == 1:
        return None, words[0]
    if not words:
        raise InputError("no PROMPT was given (`-` reads it from standard input)", code="invalid_usage")
    if len(words) == 2:
        raise InputError(f"the model was given twice: {words[0]!r} and --model {args.model!r}", code="invalid_usage")
    raise InputError("more than MODEL and PROMPT was given; put the prompt in quotes", code="invalid_usage")


def stream_answer(llm: Any, prompt: str, asked: dict[str, Any], *, as_json: bool, quiet: bool) -> int:
    """Print the answer as it comes (or one object at its end) and then its receipt."""
    text: list[str] = []
    token_ids: list[int] = []
    logprobs: list[Any] = []
    finish_reason = receipt = None
    for chunk in llm.stream(prompt, **asked):
        if as_json:
            text.append(chunk.text)
            token_ids.extend(int(token) for token in chunk.token_ids)
            logprobs.extend(chunk.logprobs or ())
        else:
            terminal.write_text(chunk.text)
        finish_reason = chunk.finish_reason or finish_reason
        receipt = chunk.receipt or receipt
    account = receipt.as_dict() if receipt is not None else {}
    if as_json:
        answer: dict[str, Any] = {"text": "".join(text), "token_ids": token_ids, "finish_reason": finish_reason}
        if "logprobs" in asked:
            answer["logprobs"] = [
                {"token_id": entry.token_id, "logprob": entry.logprob, "top": entry.top} for entry in logprobs
            ]
        terminal.write_json({**answer, "receipt": account})
    else:
        terminal.write_text("\n")
        if not quiet:
            terminal.note(terminal.receipt_line(account, finish_reason))
    return 0
