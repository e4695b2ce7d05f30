"""Compress a checkpoint into an artifact: weights in kernel layout, mapped and run without conversion.

SRC is a Hugging Face id or directory, or a GGUF file. Without --method (or --recipe) it is converted: rounded to
nearest, codes that fit are kept (GGUF Q4_0, Q8_0, int4 and int8 checkpoints). With one, the model is calibrated on text
layer by layer, quantized and pruned, and its error is measured at every point on text that was held out. That can be
interrupted at any moment: the same command goes on where it was.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haomiao.cli import options, terminal
from haomiao.errors import InputError
from haomiao.progress import ProgressBar

if TYPE_CHECKING:
    from haomiao.load.artifact import Artifact

SCHEMES = ("nested", "exact", "full", "bf16")
GROUPS = ("32", "64", "128")
LO_SHIFTS = ("2", "3", "4", "auto")
METHODS = ("rtn", "gptq")
FORMATS = ("haomiao", "compressed-tensors", "gguf")
CALIBRATED = (
    *("bits", "order", "damping", "awq", "rotate", "prune", "allocation", "max_kl", "target_ms"),
    *("text", "samples", "length", "held", "restart", "threads"),
)
"""Flags that only a calibrated compression has."""


def configure(parser: ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    options.add_model(parser, what="SRC")
    add("-o", "--output", required=True, metavar="OUT", help="directory to write; it must not exist or be empty")
    add("--group", type=options.one_of(GROUPS), help="columns that share one scale (default 32)")
    add("--lo-shift", type=options.one_of(LO_SHIFTS), help="4: disjoint planes; 3, 2: overlap; auto (default of gptq)")
    add("--no-lo", action="store_true", help="leave the second plane out: an ordinary int4 model, half the size")
    add("--force", action="store_true", help="replace OUT if it is an artifact")
    add(
        "--format",
        type=options.one_of(FORMATS),
        help="export an artifact (SRC), exactly, at --bits 4 or 8: compressed-tensors (a Hugging Face directory) or "
        "gguf (a file for llama.cpp)",
    )
    add(
        "--round-tables",
        action="store_true",
        help="gguf: round the token table and the head to Q8_0 where it does not hold them, instead of float32",
    )
    add("--json", action="store_true", help="print one object about the artifact last")
    add("--quiet", action="store_true", help="no progress bar, no summary")
    convert = parser.add_argument_group("conversion")
    convert.add_argument("--scheme", type=options.one_of(SCHEMES), help=f"{', '.join(SCHEMES)} (default nested)")
    group = parser.add_argument_group("calibrated compression (flags win over the recipe)")
    add = group.add_argument
    add("--recipe", metavar="FILE", help="YAML with the keys of these flags (damping, max_kl, ...)")
    add("--method", type=options.one_of(METHODS), help="gptq (default of a recipe), or rtn: round to nearest")
    add("--bits", type=options.one_of(("3", "4", "8")), help="4 with a second plane to 8 (default), plain 8, or 3")
    add("--order", type=options.one_of(("group", "static", "natural")), help="of elimination (default group)")
    add("--damping", type=options.number, help="share of the Hessian's mean diagonal (default 0.01)")
    add("--awq", action="store_true", default=None, help="scale inputs by their magnitude, folded into neighbours")
    add("--rotate", action="store_true", default=None, help="rotate the residual stream, folded into the weights")
    add("--prune", action="append", metavar="KIND:SHARE", help="structured:0.3, layers:0.2, tile:0.3, wanda:2:4, ...")
    add("--allocation", type=options.one_of(("uniform", "owl")), help="how the share is spread over layers")
    add("--max-kl", type=options.number, help="drop second planes as long as the measured KL of int8 stays below")
    add("--target-ms", type=options.number, help="search for the most accurate model with so fast a decode step")
    add(
        "--text",
        action="append",
        metavar="FILE",
        help="calibration text, repeatable (default: a small English and 中文 one)",
    )
    add("--samples", type=options.positive, help="calibration samples (default 128)")
    add("--length", type=options.positive, help="tokens of a sample (default 512)")
    add("--held", type=options.positive, help="samples kept for measuring (default 16)")
    add("--threads", type=options.positive, help="of solving and measuring (default: the cores it may use)")
    add("--restart", action="store_true", default=None, help="discard what an interrupted run left, and begin anew")


def run(args: Namespace) -> int:
    """Convert or compress, and say what became of it."""
    model = options.require_model(args)
    if args.round_tables and args.format != "gguf":
        raise InputError("--round-tables belongs to --format gguf", param="--round-tables")
    if args.format in ("compressed-tensors", "gguf"):
        return export(args, model)
    plain = args.method is None and args.recipe is None and not searches(args)
    out = convert_only(args, model) if plain else calibrated(args, model)

    from haomiao.cli.models import describe_artifact

    about = describe_artifact(out)
    if args.json:
        terminal.write_json(about)
    elif not args.quiet:
        terminal.note(terminal.model_line(about))
        for line in error_lines(about):
            terminal.note(line)
    return 0


def export(args: Namespace, model: str) -> int:
    """An artifact's solution in another format, codes and scales as they are."""
    for name in ("method", "recipe", "scheme", "group", "lo_shift", *(n for n in CALIBRATED if n != "bits")):
        if getattr(args, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} does not go with --format: compress to an artifact, then export it", param=flag)

    from haomiao.cli.models import find_artifact
    from haomiao.load.artifact import Artifact

    path = find_artifact(model)
    if path is None:
        raise InputError(f"{model} is no artifact: compress it first, then export the artifact", param="model")
    with Artifact.open(path) as artifact:
        point = "int8" if args.bits == "8" else "int4"
        out = Path(args.output)
        types = write_export(artifact, out, point, args)
    about = {"path": str(out), "format": args.format, "point": point}
    if args.json:
        terminal.write_json(about | ({"types": types} if types else {}))
    elif not args.quiet:
        counts = ", ".join(f"{count} {name}" for name, count in types.items())
        terminal.note(f"{out}: {args.format}, {point}{f' ({counts})' if counts else ''}")
    return 0


def searches(args: Namespace) -> bool:
    """True if a limit is given that is searched for: a time, or an error without a method that is to meet it."""
    return args.target_ms is not None or (args.max_kl is not None and args.method is None and args.recipe is None)


def write_export(artifact: Artifact, out: Path, point: str, args: Namespace) -> dict[str, int]:
    """Write the format that was asked for. Returns how many tensors became which GGUF type, nothing for the others."""
    if args.format == "compressed-tensors":
        from haomiao.compress.export import compressed_tensors

        compressed_tensors.export(artifact, out, point)
        return {}
    from collections import Counter

    from haomiao.compress.export import gguf

    return dict(Counter(gguf.export(artifact, out, point, round_tables=args.round_tables).values()))


def convert_only(args: Namespace, model: str) -> Path:
    """The quick way: no text, rounded to nearest."""
    for name in CALIBRATED:
        if getattr(args, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} needs --method or --recipe", param=flag)
    scheme: Any = args.scheme or "nested"
    if args.no_lo and scheme != "nested":
        raise InputError("--no-lo belongs to --scheme nested", param="--no-lo")
    if args.lo_shift and scheme != "nested":
        raise InputError("--lo-shift belongs to --scheme nested", param="--lo-shift")
    if args.lo_shift == "auto":
        raise InputError("--lo-shift auto needs --method gptq", param="--lo-shift")

    from haomiao.cli.models import open_checkpoint
    from haomiao.models.convert import convert

    with ProgressBar(quiet=args.quiet) as bar:
        source = open_checkpoint(model, args, bar)
        try:
            return convert(
                source,
                Path(args.output),
                scheme=scheme,
                group=int(args.group or 32),
                lo_shift=int(args.lo_shift or 4),
                with_lo=not args.no_lo,
                overwrite=args.force,
                progress=bar,
            )
        finally:
            source.close()


def calibrated(args: Namespace, model: str) -> Path:
    """Recipe, text, calibration, artifact."""
    if args.scheme is not None:
        raise InputError("--scheme belongs to a conversion, without --method and --recipe", param="--scheme")

    from haomiao.compress.recipe import read_recipe, recipe_of

    read = read_recipe(args.recipe) if args.recipe else {}
    recipe = recipe_of({**read, **flags(args), **({"search": True} if searches(args) else {})})

    from haomiao.cli.models import open_checkpoint, open_tokenizer
    from haomiao.compress.job import compress

    with ProgressBar(quiet=args.quiet) as bar:
        source = open_checkpoint(model, args, bar)
        try:
            encode = open_tokenizer(model, args).encode
            return compress(
                source,
                Path(args.output),
                recipe,
                encode=encode,
                overwrite=args.force,
                restart=bool(args.restart),
                threads=args.threads,
                progress=bar,
                tell=None if args.quiet and not args.json else lambda point: show_point(point, args.json),
            )
        finally:
            source.close()


def show_point(point: dict[str, Any], as_json: bool) -> None:
    """One point of a search's way, as it is found."""
    if as_json:
        terminal.write_json({"point": point})
        return
    levels = ", ".join(f"{count} {level}" for level, count in point["matrices"].items())
    shape = f"{point['layers']} layers" + (f" of {point['neurons']} neurons" if "neurons" in point else "")
    terminal.note(
        f"{point['ms']:8.3f} ms/token  KL {point['kl']:.5f} [{point['kl_low']:.5f}, {point['kl_high']:.5f}]  "
        f"{point['mb']:.2f} MB  {shape}; {levels}  ({point['step']})"
    )


def flags(args: Namespace) -> dict[str, Any]:
    """The recipe's keys that were given as flags."""
    given = {name: getattr(args, name) for name in ("method", *CALIBRATED) if name not in ("restart", "threads")}
    given |= {"group": args.group, "lo": False if args.no_lo else None, "lo_shift": args.lo_shift}
    for name in ("bits", "group"):
        given[name] = None if given[name] is None else int(given[name])
    if given["lo_shift"] not in (None, "auto"):
        given["lo_shift"] = int(given["lo_shift"])
    return {name: value for name, value in given.items() if value is not None}


def error_lines(about: dict[str, Any]) -> list[str]:
    """The measured error of every point, where there is one."""
    lines = []
    for point, figures in (about.get("errors") or {}).items():
        kl, top1 = figures["kl"], figures["top1"]
        lines.append(
            f"  {point:<6} KL {kl['estimate']:.5f} [{kl['low']:.5f}, {kl['high']:.5f}] nats/token, "
            f"top-1 {100 * top1['estimate']:.1f} %, {figures['tokens']} held-out tokens"
        )
    return lines
