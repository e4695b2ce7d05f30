"""Flags that several commands share, their ranges, and their twins in the environment.

Knows nothing about what the flags do; imports only the standard library, `config` and `errors`.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from haomiao.errors import InputError

POINT_NAMES = ("full", "bf16", "int8", "int4-w", "int4")
KV_NAMES = ("f32", "bf16", "int8")
EXECUTORS = ("native", "reference", "torch")
DEVICES = ("cpu", "cuda", "auto")
ON_BUDGET = ("degrade", "truncate", "refuse")
TEXT_FILE_LIMIT = 64 << 20  # bytes of a schema, grammar or prompt read from a file or standard input


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _integer(text, 1)


def natural(text: str) -> int:
    """A whole number of at least 0."""
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
    return value


def number(text: str) -> float:
    """A finite number; its range is the engine's business, which names the parameter."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value != value or value in (float("inf"), float("-inf")):
        raise ArgumentTypeError(f"must be a finite number, not {text!r}")
    return value


def one_of(names: tuple[str, ...]) -> Callable[[str], str]:
    """A name out of a list. (argparse's own `choices` does not apply to values from the environment.)"""

    def check(text: str) -> str:
        if text not in names:
            raise ArgumentTypeError(f"must be one of {', '.join(names)}, not {text!r}")
        return text

    return check


def point_list(text: str) -> tuple[str, ...]:
    """Names of points, separated by commas."""
    return tuple(one_of(POINT_NAMES)(name.strip()) for name in text.split(","))


ENVIRONMENT: dict[str, tuple[str, Callable[[str], Any]]] = {
    "model": ("HAOMIAO_MODEL", str),
    "threads": ("HAOMIAO_THREADS", positive),
    "point": ("HAOMIAO_POINT", one_of(POINT_NAMES)),
    "points": ("HAOMIAO_POINTS", point_list),
    "max_context": ("HAOMIAO_MAX_CONTEXT", positive),
    "kv": ("HAOMIAO_KV", one_of(KV_NAMES)),
    "device": ("HAOMIAO_DEVICE", one_of(DEVICES)),
    "executor": ("HAOMIAO_EXECUTOR", one_of(EXECUTORS)),
    "revision": ("HAOMIAO_REVISION", str),
    "speculate": ("HAOMIAO_SPECULATE", str),
}
"""Destination -> (variable, type). A flag wins over its variable. `--offline` has HAOMIAO_OFFLINE: `config`."""


def add_model(parser: ArgumentParser, *, what: str = "MODEL") -> None:
    """MODEL as a positional and as `--model`; `take_model` settles which was given."""
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help=f"{what} (also --model)")
    add_model_flag(parser)


def add_model_flag(parser: ArgumentParser) -> None:
    """`--model` and the flags that say where a model comes from."""
    parser.add_argument("--model", help="Hugging Face id or directory, GGUF file, or artifact [HAOMIAO_MODEL]")
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face id [HAOMIAO_REVISION]")
    parser.add_argument(
        "--offline", action="store_const", const=True, default=None, help="fetch nothing [HAOMIAO_OFFLINE]"
    )


def add_runtime(parser: ArgumentParser) -> None:
    """How the model is run."""
    parser.add_argument("--point", type=one_of(POINT_NAMES), help=f"{', '.join(POINT_NAMES)} [HAOMIAO_POINT]")
    parser.add_argument("--threads", type=positive, help="default: the cores this process may use [HAOMIAO_THREADS]")
    parser.add_argument("--max-context", type=positive, help="tokens of prompt and answer [HAOMIAO_MAX_CONTEXT]")
    parser.add_argument("--kv", type=one_of(KV_NAMES), help=f"how K and V are kept: {', '.join(KV_NAMES)} [HAOMIAO_KV]")
    parser.add_argument("--device", type=one_of(DEVICES), help="cpu (default), cuda, or auto [HAOMIAO_DEVICE]")
    parser.add_argument(
        "--executor",
        type=one_of(EXECUTORS),
        help="native, torch, or the slow reference in numpy; default: the device's own [HAOMIAO_EXECUTOR]",
    )


def add_speculation(parser: ArgumentParser, default: str = "auto") -> None:
    """Who drafts tokens."""
    parser.add_argument(
        "--speculate",
        metavar="WAY",
        help=f"auto, off, suffix, self, or a draft model; default {default} [HAOMIAO_SPECULATE]",
    )


def add_sampling(parser: ArgumentParser) -> None:
    """How tokens are chosen. Defaults are `SamplingParams`'s, or those of the model's generation_config."""
    add = parser.add_argument
    add("--max-tokens", type=positive, help="most tokens of the answer (default 256)")
    add("--min-tokens", type=natural, help="fewest tokens of the answer")
    add("--temperature", type=number, help="0 is greedy (default)")
    add("--top-k", type=natural, help="keep the K likeliest tokens; 0 keeps all")
    add("--top-p", type=number, help="keep the likeliest tokens that make up this probability")
    add("--min-p", type=number, help="keep tokens at least this share of the likeliest one's probability")
    add("--seed", type=natural, help="repeats an answer; without it the receipt says which seed was drawn")
    add("--repetition-penalty", type=number, help="1 is none")
    add("--presence-penalty", type=number, help="0 is none")
    add("--frequency-penalty", type=number, help="0 is none")
    add("--stop", action="append", metavar="TEXT", help="end the answer before this text; may be repeated")
    add("--ignore-eos", action="store_const", const=True, help="do not end at the model's end-of-sequence token")


def add_constraints(parser: ArgumentParser) -> None:
    """What form the answer must have; at most one of them."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json-schema", metavar="FILE", help="the answer is JSON that fits this schema")
    group.add_argument("--regex", help="the answer matches this regular expression")
    group.add_argument("--grammar", metavar="FILE", help="the answer fits this grammar (Lark form)")
    group.add_argument("--choice", action="append", metavar="TEXT", help="the answer is one of these; repeat it")


def add_budget(parser: ArgumentParser, *, first_token: bool = True) -> None:
    """How long an answer may take, and what may be given up for it."""
    add = parser.add_argument
    add("--budget-ms", type=number, metavar="X", help="milliseconds from request to last byte")
    if first_token:
        add("--ttft-ms", type=number, metavar="X", help="milliseconds from request to first token")
    add(
        "--on-budget",
        type=one_of(ON_BUDGET),
        help="what may be given up: degrade (default: a lower point, then tokens), truncate (tokens), refuse (nothing)",
    )
    add("--min-point", type=one_of(POINT_NAMES), help="the least accurate point that a budget may lower it to")
    add(
        "--max-kl",
        type=number,
        metavar="X",
        help="greatest mean KL to `full`, nats per token, of a point it may run at",
    )
    add("--points", type=point_list, metavar="P,P", help="points that a budget may lower requests to [HAOMIAO_POINTS]")


def take_environment(args: Namespace) -> None:
    """Fill flags that were not given from their variables. Raises `InputError` naming the variable."""
    for destination, (variable, convert) in ENVIRONMENT.items():
        value = os.environ.get(variable)
        if value and hasattr(args, destination) and getattr(args, destination) is None:
            try:
                setattr(args, destination, convert(value))
            except ArgumentTypeError as error:
                raise InputError(f"{variable} {error}", param=variable) from error


def require_model(args: Namespace) -> str:
    """The model of `add_model`. Raises `InputError` if it was given twice or not at all."""
    model = take_model(args)
    if model is None:
        raise InputError("no MODEL was given", code="invalid_usage", param="model")
    return model


def take_model(args: Namespace) -> str | None:
    """The model of `add_model`, None for the embedded one. Raises `InputError` if it was given twice."""
    positional = args.positional_model
    if positional is not None and args.model is not None:
        raise InputError(f"the model was given twice: {positional!r} and --model {args.model!r}", code="invalid_usage")
    if positional is not None:
        args.model = positional
    take_environment(args)
    model: str | None = args.model
    return model


BUDGETS = ("budget_ms", "ttft_ms", "on_budget", "min_point", "max_kl")


def budget_options(args: Namespace) -> dict[str, Any]:
    """Keyword arguments of `LLM.generate` about time that were given."""
    return {name: value for name in BUDGETS if (value := getattr(args, name, None)) is not None}


def runtime_options(args: Namespace) -> dict[str, Any]:
    """Keyword arguments of `LLM` that were given."""
    names = (
        *("point", "points", "threads", "max_context", "kv", "device", "executor"),
        *("revision", "offline", "speculate"),
    )
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def sampling_options(args: Namespace) -> dict[str, Any]:
    """Keyword arguments of `LLM.generate` that were given: sampling and constraints."""
    names = (
        *("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "seed"),
        *("repetition_penalty", "presence_penalty", "frequency_penalty", "ignore_eos"),
        *("regex", "choice", "logprobs", *BUDGETS),
    )
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    if getattr(args, "stop", None):
        given["stop"] = tuple(args.stop)
    if getattr(args, "json_schema", None):
        given["json_schema"] = read_text(args.json_schema, "--json-schema")
    if getattr(args, "grammar", None):
        given["grammar"] = read_text(args.grammar, "--grammar")
    return given


def add_fields(add: Callable[..., Any]) -> None:
    """Where labelled data hold text and label."""
    add("--text-field", metavar="NAME", help="key, column name or column number (from 1) of the text")
    add("--label-field", metavar="NAME", help="key, column name or column number (from 1) of the label")


def fields_of(args: Namespace) -> Any:
    """`measure.task.Fields` of the flags."""
    from haomiao.measure.task import Fields

    return Fields(args.text_field, args.label_field)


def read_text(path: str, flag: str) -> str:
    """A small text file named on the command line. Raises `InputError` with one line."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(TEXT_FILE_LIMIT + 1)
    except OSError as error:
        raise InputError(f"{flag}: cannot read {path}: {error.strerror or error}", param=flag) from error
    return decode_text(data, f"{flag} {path}")


def decode_text(data: bytes, what: str) -> str:
    """Bytes as UTF-8. Raises `InputError` if they are not, or too many."""
    if len(data) > TEXT_FILE_LIMIT:
        raise InputError(f"{what} is larger than {TEXT_FILE_LIMIT >> 20} MiB")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 (byte {error.start})") from error
