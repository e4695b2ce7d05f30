"""Measure how wrong a model is, point by point: perplexity, KL divergence from the full-precision model, task accuracy.

The text is cut into windows that do not overlap; intervals (95 %) come from a bootstrap over windows. The reference is
--reference SRC as loaded (point `full`), or MODEL itself at --against POINT; a checkpoint is its own reference. Without
one there is no KL. Beside the errors stand milliseconds a token and the bytes of weights that a step reads.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from haomiao.cli import options, terminal
from haomiao.errors import InputError
from haomiao.progress import ProgressBar


def configure(parser: ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    options.add_model(parser)
    options.add_runtime(parser)
    add("--text", metavar="FILE", help="UTF-8 text, held out from calibration")
    add(
        "--task",
        metavar="FILE",
        help="labelled data: JSON lines {prompt, choices, answer} or {text, label}, or a table",
    )
    add("--prompt-template", metavar="TEXT", help="prompt of labelled text; {text} stands for it (default '{text}\\n')")
    options.add_fields(add)
    add("--limit", type=options.positive, default=500, help="most questions of the task (default 500)")
    add("--reference", metavar="SRC", help="the full-precision model to compare with")
    add("--against", type=options.one_of(options.POINT_NAMES), metavar="POINT", help="compare with MODEL at this point")
    add("--window", type=options.positive, default=512, help="tokens of a window (default 512)")
    add("--tokens", type=options.positive, default=8192, help="most tokens taken from the text's start (default 8192)")
    add("--no-speed", action="store_true", help="do not time decoding")
    add("--json", action="store_true", help="print one object last")
    add("--quiet", action="store_true", help="no progress bar")


def run(args: Namespace) -> int:
    """Measure and print."""
    model = options.take_model(args)
    if args.text is None and args.task is None:
        raise InputError("nothing to measure on: give --text FILE, --task FILE or both", code="invalid_usage")
    if args.reference is not None and args.against is not None:
        raise InputError("--reference and --against exclude each other", code="invalid_usage")
    text = None if args.text is None else options.read_text(args.text, "--text")
    questions = None
    if args.task is not None:
        from haomiao.measure.task import DEFAULT_TEMPLATE, read_questions

        template = args.prompt_template.replace("\\n", "\n") if args.prompt_template else DEFAULT_TEMPLATE
        labelled = options.read_text(args.task, "--task")
        fields = options.fields_of(args)
        questions = read_questions(labelled, Path(args.task).name, template=template, limit=args.limit, fields=fields)

    from haomiao.measure.report import ACCURACY_COLUMNS, accuracy_rows

    with ProgressBar(quiet=args.quiet) as bar, ExitStack() as stack:
        report = evaluate(args, model, text, questions, bar, stack)
    if args.json:
        terminal.write_json(report)
    else:
        reference = report["reference"]
        against = f", against {reference['model']} at {reference['point']}" if reference else ""
        what = f" on {report['text']}: {report['tokens']} tokens" if text is not None else ""
        print(f"{report['model']}{what}{against}")
        print(terminal.table(ACCURACY_COLUMNS, accuracy_rows(report)))
    return 0


def evaluate(
    args: Namespace, model: str | None, text: str | None, questions: Any, bar: ProgressBar, stack: ExitStack
) -> dict[str, Any]:
    """The object that `--json` prints."""
    from haomiao.api import LLM
    from haomiao.measure.accuracy import measure_against, measure_perplexity
    from haomiao.measure.report import point_report

    given = options.runtime_options(args)
    point = given.pop("point", None)
    if questions is None:
        given.setdefault("max_context", args.window + 64)

    def opened(name: str | None, at: str | None) -> Any:
        llm = LLM(name, point=at, progress=bar, **{"speculate": "off", **given})
        stack.callback(llm.close)
        return llm

    llm = opened(model, point)
    points: Sequence[str] = (llm.point,) if point else llm.points
    reference = _reference(args, model, opened)
    report: dict[str, Any] = {"model": llm.name, "text": None, "tokens": None, "window": args.window, "points": {}}
    report["reference"] = {"model": reference.name, "point": reference.point} if reference else None
    figures: dict[str, dict[str, Any]] = {name: {} for name in points}
    if text is not None:
        ids = llm.tokenize(text)[: args.tokens]
        report |= {"text": Path(args.text).name, "tokens": len(ids)}
        tell = lambda done, total: bar("tokens", done, total)  # noqa: E731
        candidates = {name: lambda ids, name=name: llm.logits(ids, point=name) for name in points}
        if reference is not None:
            results: Any = measure_against(reference.logits, candidates, ids, window=args.window, progress=tell)
            full = next(iter(results.values())).reference
            report["reference"] |= {k: point_report(full)[k] for k in ("perplexity", "perplexity_pm")}
        else:
            results = {
                name: measure_perplexity(logits, ids, window=args.window, progress=tell)
                for name, logits in candidates.items()
            }
        figures = {name: point_report(result) for name, result in results.items()}
    for name in points:
        figures[name] |= speed(llm, name, bar, timed=not args.no_speed)
        if questions is not None:
            figures[name]["task"] = task_report(llm, name, questions, bar)
    report["points"] = figures
    return report


def _reference(args: Namespace, model: str | None, opened: Any) -> Any:
    """The model to compare with, or None."""
    if args.text is None:
        return None
    if args.reference is not None:
        return opened(args.reference, "full")
    if args.against is not None:
        return opened(model, args.against)
    from haomiao.cli.models import find_artifact

    return opened(model, "full") if find_artifact(model) is None else None


def speed(llm: Any, point: str, bar: ProgressBar, *, timed: bool) -> dict[str, Any]:
    """Milliseconds a token of one stream, and the bytes of weights that a decode step reads."""
    from haomiao.measure.bytes import weight_bytes_per_step
    from haomiao.measure.latency import Workload, measure_latency

    found: dict[str, Any] = {"ms_per_token": None, "bytes": weight_bytes_per_step(llm.plan, llm.weights, point)}
    if timed:
        work = Workload(prompt_tokens=min(64, llm.max_context // 2), new_tokens=min(32, llm.max_context // 2), repeat=3)
        result = measure_latency(AtPoint(llm, point), work, progress=lambda d, n: bar(f"timing {point}", d, n))
        found["ms_per_token"] = 1e3 / result.decode_tok_s.median if result.decode_tok_s else None
    return found


class AtPoint:
    """A model that streams at one point."""

    def __init__(self, llm: Any, point: str) -> None:
        self._llm, self._point = llm, point
        self.vocab_size: int = llm.vocab_size

    def stream(self, prompt: Sequence[int], **given: Any) -> Any:
        """As `LLM.stream`."""
        return self._llm.stream(prompt, point=self._point, **given)


def task_report(llm: Any, point: str, questions: Any, bar: ProgressBar) -> dict[str, Any]:
    """Accuracy of the likeliest choice by mean log-probability of its tokens."""
    from haomiao.measure.accuracy import measure_choices
    from haomiao.measure.report import half_width

    found = measure_choices(
        lambda prompt, choices: int(llm.choose(prompt, choices, normalize=True, point=point).index),
        questions,
        progress=lambda done, total: bar(f"task at {point}", done, total),
    )
    return {"accuracy": found.estimate, "accuracy_pm": half_width(found), "questions": found.samples}
