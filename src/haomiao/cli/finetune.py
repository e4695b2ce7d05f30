"""Teach a model prompts with their completions, or labels of text; the result opens in every command.

DATA holds JSON lines {"prompt", "completion"}, or labelled text as `haomiao eval --task` reads it: JSON lines
{"text", "label"}, or a table of both. Each label becomes one token, so that the model decides from the prompt's own
logits; the commands know these labels by name. All weights are trained, or with --lora low-rank adapters that are
merged at the end. A part of DATA (or --valid FILE) says when to stop; the best weights are written. An interrupted run
goes on with the same command. Needs PyTorch: pip install 'haomiao[torch]'.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from haomiao.cli import options, terminal
from haomiao.errors import InputError
from haomiao.progress import ProgressBar

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("f32", "bf16")


def configure(parser: ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    options.add_model(parser)
    add("--data", required=True, metavar="FILE", help="what is learnt")
    add("-o", "--output", required=True, metavar="OUT", help="directory to write; it must not exist or be empty")
    add("--valid", metavar="FILE", help="held-out data of the same form (default: a part of --data)")
    add("--valid-share", type=options.number, help="share of --data that is held out (default 0.1)")
    options.add_fields(add)
    add("--prompt-template", metavar="TEXT", help="prompt of labelled text; {text} stands for it (default '{text}\\n')")
    add("--lora", type=options.positive, metavar="RANK", help="train adapters of this rank instead of all weights")
    add("--alpha", type=options.number, help="weight of the adapters (default: twice the rank)")
    add("--label-text", action="store_true", help="learn labels as text that follows, not as one token each")
    add("--epochs", type=options.positive, help="most passes over the data (default 5; labels 10)")
    add("--batch", type=options.positive, help="examples of a step (default 32; labels 16)")
    add(
        "--rate",
        type=options.number,
        help="peak learning rate (default 0.0005; labels 0.001; with --made 0.002, --lora 0.003)",
    )
    add("--drop", type=options.number, help="share of a labelled prompt's tokens that a step leaves out (default 0.2)")
    add("--smooth", type=options.number, help="share of a label's certainty that the others get (default 0.1)")
    add(
        "--made",
        type=options.natural,
        help="made-up examples beside each, whose labels a count of words says (default 0)",
    )
    add("--layers", type=options.positive, help="keep only so many of the model's layers, from the first")
    add("--mean", type=options.number, help="decay of the mean of weights that is kept (default 0: none; labels 0.99)")
    add("--length", type=options.positive, help="most tokens of an example (default 256)")
    add(
        "--patience",
        type=options.natural,
        help="epochs without improvement before it ends (default 2, labels 4; 0: never)",
    )
    add("--precision", type=options.one_of(PRECISIONS), help="f32 (default), or bf16 by autocast")
    add("--device", type=options.one_of(DEVICES), default="auto", help="auto, cpu or cuda")
    add("--threads", type=options.positive, help="of the CPU [HAOMIAO_THREADS]")
    add("--seed", type=options.natural, help="of split, order and adapters (default 1)")
    add("--restart", action="store_true", help="discard what an interrupted run left, and begin anew")
    add("--json", action="store_true", help="print one object about the result last")
    add("--quiet", action="store_true", help="no progress bar, no summary")


SETTINGS = (
    *("lora", "alpha", "epochs", "batch", "rate", "drop", "smooth", "made", "layers", "mean"),
    *("length", "valid_share", "patience", "precision", "seed"),
)


def run(args: Namespace) -> int:
    """Train, and say what became of it."""
    from haomiao.train.needs import require_torch

    require_torch("haomiao finetune")
    model = options.take_model(args)
    given = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    if not 0 < given.get("valid_share", 0.1) < 1:
        raise InputError("--valid-share must lie between 0 and 1", param="valid_share")
    if given.get("rate", 1.0) <= 0 or given.get("alpha", 1.0) <= 0:
        raise InputError("--rate and --alpha must be above 0", param="rate")
    for name in ("drop", "smooth", "mean"):
        if not 0 <= given.get(name, 0.0) < 1:
            raise InputError(f"--{name} must be at least 0 and below 1", param=name)
    if "alpha" in given and "lora" not in given:
        raise InputError("--alpha means nothing without --lora", param="alpha")

    from haomiao.measure.task import DEFAULT_TEMPLATE
    from haomiao.train.examples import read_pairs
    from haomiao.train.finetune import Finetuning, finetune
    from haomiao.train.starting import open_starting

    template = args.prompt_template.replace("\\n", "\n") if args.prompt_template else DEFAULT_TEMPLATE
    fields = options.fields_of(args)
    data, valid = (
        None
        if path is None
        else read_pairs(options.read_text(path, flag), Path(path).name, template=template, fields=fields)
        for path, flag in ((args.data, "--data"), (args.valid, "--valid"))
    )
    assert data is not None  # the flag is required
    coded = data.labels and not args.label_text
    settings = Finetuning.of_labels(**given) if coded else Finetuning(**given)
    start = open_starting(model, revision=args.revision, offline=args.offline)
    with ProgressBar(quiet=args.quiet, counted=True) as bar:
        report = finetune(
            start,
            data,
            Path(args.output),
            settings,
            valid=valid,
            device=args.device,
            threads=args.threads,
            restart=args.restart,
            tell=bar,
            note=None if args.quiet else terminal.note,
        )
    return terminal.tell_learnt(args, report, told)


def told(out: str, report: Mapping[str, Any]) -> list[str]:
    """What was learnt, for a person."""
    right, began = 100 * (1 - report["error"]), 100 * (1 - report["began_with"])
    what = ("nats", "right") if report["labels"] else ("nats/token", "completed exactly")
    figures = f"{report['loss']:.4f} {what[0]}, {right:.1f} % {what[1]} ({began:.1f} % before)"
    learnt = f"{report['examples']} examples, {report['steps']} steps"
    return [f"{out}: {learnt}; held out ({report['validation']}): {figures}"]
