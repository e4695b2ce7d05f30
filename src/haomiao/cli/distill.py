"""Let a student learn what a teacher says: recover what compression lost, or make a smaller model.

STUDENT is an artifact of `haomiao compress` (then codes, scales and norms learn as they are stored, what was pruned
stays pruned, and OUT is an artifact with its measured error), or a checkpoint with the teacher's vocabulary (then OUT
is a Hugging Face directory). --layers N instead makes a student of N of the teacher's layers. An interrupted run goes
on with the same command. Needs PyTorch: pip install 'haomiao[torch]'.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from haomiao.cli import options, terminal
from haomiao.errors import InputError
from haomiao.progress import ProgressBar

DIVERGENCES = ("forward", "reverse")
POINTS = ("int8", "int4")
SETTINGS = (
    *("divergence", "temperature", "top_k", "epochs", "batch", "rate", "hidden", "point", "layers"),
    *("samples", "held", "length", "precision", "seed"),
)


def configure(parser: ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("--teacher", required=True, metavar="T", help="checkpoint, id or artifact that is imitated")
    add("--student", metavar="S", help="artifact or checkpoint that learns")
    add("--layers", type=options.positive, metavar="N", help="instead of a student: N of the teacher's layers")
    add("-o", "--output", required=True, metavar="OUT", help="directory to write; it must not exist or be empty")
    add("--text", action="append", metavar="FILE", help="text to learn from, repeatable (default: calibration's)")
    add("--samples", type=options.positive, help="samples of text (default 256)")
    add("--held", type=options.positive, help="samples kept for measuring (default 16)")
    add("--length", type=options.positive, help="tokens of a sample (default 256)")
    add("--divergence", type=options.one_of(DIVERGENCES), help="forward: KL(T || S) (default); reverse: KL(S || T)")
    add("--temperature", type=options.number, help="softens what both say (default 1)")
    add("--top-k", type=options.positive, help="likeliest tokens of the teacher that are kept (default 64)")
    add(
        "--point",
        type=options.one_of(POINTS),
        help="train one point of an artifact (default: all, in turn)",
    )
    add("--epochs", type=options.positive, help="passes over the text (default 3)")
    add("--batch", type=options.positive, help="samples of a step (default 4)")
    add("--rate", type=options.number, help="peak learning rate (default 0.0005)")
    add("--hidden", type=options.number, help="weight of the hidden states' distance (default: artifacts 10, else 0)")
    add("--precision", type=options.one_of(("f32", "bf16")), help="f32 (default), or bf16 by autocast")
    add("--device", type=options.one_of(("auto", "cpu", "cuda")), default="auto", help="auto, cpu or cuda")
    add("--threads", type=options.positive, help="of the CPU [HAOMIAO_THREADS]")
    add("--seed", type=options.natural, help="of the order (default 1)")
    add("--restart", action="store_true", help="discard what an interrupted run left, and begin anew")
    add("--revision", help="branch, tag or commit of a Hugging Face id [HAOMIAO_REVISION]")
    add("--offline", action="store_const", const=True, default=None, help="fetch nothing [HAOMIAO_OFFLINE]")
    add("--json", action="store_true", help="print one object about the result last")
    add("--quiet", action="store_true", help="no progress bar, no summary")


def run(args: Namespace) -> int:
    """Train, and say what became of it."""
    from haomiao.train.needs import require_torch

    require_torch("haomiao distill")
    options.take_environment(args)
    given = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    for name in ("rate", "temperature"):
        if given.get(name, 1.0) <= 0:
            raise InputError(f"--{name} must be above 0", param=name)
    if given.get("hidden", 0.0) < 0:
        raise InputError("--hidden must not be below 0", param="hidden")

    from haomiao.train.distill import Distillation, distill
    from haomiao.train.starting import open_starting

    where = {"revision": args.revision, "offline": args.offline}
    teacher = open_starting(args.teacher, **where)
    student = None if args.student is None else open_starting(args.student, **where)
    with ProgressBar(quiet=args.quiet, counted=True) as bar:
        report = distill(
            teacher,
            student,
            Path(args.output),
            Distillation(**given),
            text=args.text,
            device=args.device,
            threads=args.threads,
            restart=args.restart,
            tell=bar,
        )
    return terminal.tell_learnt(args, report, told)


def told(out: str, report: Mapping[str, Any]) -> list[str]:
    """What was gained, for a person."""
    lines = [f"{out}: {report['steps']} steps, {report['tokens']} tokens"]
    errors = report.get("errors")
    if errors is None:
        return [*lines, f"  held out: {report['held_out']['loss']:.4f} nats/token from the teacher"]
    for point, after in errors["after"].items():
        was, now = errors["before"][point]["kl"]["estimate"], after["kl"]["estimate"]
        lines.append(f"  {point:<6} KL {was:.5f} -> {now:.5f} nats/token, {100 * (1 - now / was):.0f} % recovered")
    return lines
