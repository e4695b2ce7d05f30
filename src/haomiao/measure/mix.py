"""What is offered to a server under load: classes of requests, their shares and budgets, and traces drawn from a seed.

A mix is built in or read from a file (JSON, or YAML). A trace is a list of requests with the moment at which each is
due; the same mix, rate and seed give the same trace, so that two servers can be offered the same. Knows nothing about
how requests are sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal, TypeAlias

import msgspec

from haomiao.errors import InputError, UnavailableError
from haomiao.measure.prompts import LETTERS, MAKERS, Prompt

Arrivals: TypeAlias = Literal["poisson", "bursts", "uniform"]
FILE_LIMIT = 64 << 20
MAX_TRACE = 1_000_000


class RequestClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One kind of request. Its prompts are made (`text`), listed (`prompts`), or read from a file (`prompts_file`)."""

    name: str
    share: float
    """Of all requests; shares are relative to their sum."""
    budget_ms: float | None = None
    ttft_ms: float | None = None
    max_tokens: int = 64
    options: tuple[str, ...] = ()
    """The answer is one of these."""
    endpoint: Literal["completions", "chat"] = "completions"
    text: Literal["command", "record", "talk", "report"] | None = None
    words: int = 100
    prompts: tuple[str | Prompt, ...] = ()
    """Texts, or objects of `prompt` and perhaps `expect`."""
    prompts_file: str | None = None
    """Beside the mix's own file; every line such an object."""
    body: dict[str, Any] = msgspec.field(default_factory=dict)
    """Further fields of the request, sent as they stand."""

    def check(self) -> None:
        """Raise `InputError` naming what is out of range."""
        where = f"class {self.name!r:.60}"
        for name in ("budget_ms", "ttft_ms"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 86_400_000:
                raise InputError(f"{where}: {name} must be milliseconds more than 0", param=name)
        if not 0 < self.share < float("inf"):
            raise InputError(f"{where}: share must be more than 0", param="share")
        if not 1 <= self.max_tokens <= 1_000_000 or not 1 <= self.words <= 1_000_000:
            raise InputError(f"{where}: max_tokens and words must be between 1 and 1000000", param="max_tokens")
        sources = [bool(self.text), bool(self.prompts), bool(self.prompts_file)]
        if sum(sources) != 1:
            raise InputError(f"{where} needs exactly one of text, prompts and prompts_file", param="prompts")


class Mix(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Classes of requests under a name."""

    name: str
    classes: tuple[RequestClass, ...]

    def check(self) -> Mix:
        """The mix itself. Raises `InputError` naming what is wrong with it."""
        if not self.classes:
            raise InputError("a workload needs at least one class", param="classes")
        names = [each.name for each in self.classes]
        if len(set(names)) != len(names):
            raise InputError("two classes of the workload have the same name", param="classes")
        for each in self.classes:
            each.check()
        return self

    def scaled(self, factor: float) -> Mix:
        """The same with every budget multiplied."""

        def times(value: float | None) -> float | None:
            return None if value is None else value * factor

        return Mix(
            self.name,
            tuple(
                msgspec.structs.replace(each, budget_ms=times(each.budget_ms), ttft_ms=times(each.ttft_ms))
                for each in self.classes
            ),
        )


class Offer(msgspec.Struct, omit_defaults=True):
    """One request of a trace: when it is due, in milliseconds from the trace's start, and what it asks."""

    index: int
    due_ms: float
    kind: str
    prompt: str
    expect: str | None = None


BUILT_IN: dict[str, Mix] = {
    "mixed": Mix(
        "mixed",
        (
            RequestClass("choice", 0.60, 150, max_tokens=1, options=LETTERS, text="command", words=90),
            RequestClass("extract", 0.25, 600, max_tokens=16, text="record", words=60),
            RequestClass("chat", 0.10, 3000, max_tokens=64, text="talk", words=80),
            RequestClass("summary", 0.05, 15000, max_tokens=96, text="report", words=600),
        ),
    ),
    "choice": Mix("choice", (RequestClass("choice", 1, 150, max_tokens=1, options=LETTERS, text="command"),)),
    "chat": Mix("chat", (RequestClass("chat", 1, 3000, ttft_ms=500, text="talk", words=80),)),
    "long": Mix("long", (RequestClass("summary", 1, 15000, max_tokens=96, text="report", words=600),)),
}
"""`mixed` is the mix of deadlines that benchmarks/deadlines.py offers; the others are its parts."""


def open_mix(name: str) -> Mix:
    """A built-in mix, or one from a file. Raises `InputError`, and `UnavailableError` for YAML without PyYAML."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    path = Path(name)
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise InputError(f"no workload {name!r:.80}: one of {', '.join(BUILT_IN)}, or a .json or .yaml file")
    try:
        mix = msgspec.convert(_parsed(path), Mix)
    except msgspec.ValidationError as error:
        raise InputError(f"{path.name}: {error}", param="workload") from error
    return Mix(mix.name, tuple(_with_prompts(each, path) for each in mix.check().classes))


def draw_trace(
    mix: Mix, *, rate: float, count: int, seed: int, arrivals: Arrivals = "poisson", burst: float = 10.0
) -> list[Offer]:
    """`count` requests at `rate` a second on average.

    `poisson`: independent arrivals. `bursts`: the same, but in two of every twenty seconds `burst` times as many, the
    mean kept. `uniform`: evenly spaced. Class, prompt and arrival come from streams of their own, so that another rate
    offers the same prompts in the same order.
    """
    if not 0 < rate < 1e6 or not 1 <= count <= MAX_TRACE or not 1 <= burst <= 1000:
        raise InputError(
            f"a trace needs a rate above 0, 1 to {MAX_TRACE} requests and bursts of 1 to 1000", param="rate"
        )
    kinds, texts = Random(f"{seed} kinds"), Random(f"{seed} texts")
    moments = _moments(Random(f"{seed} moments"), rate, arrivals, burst)
    weights = [each.share for each in mix.classes]
    trace = []
    for index in range(count):
        (kind,) = kinds.choices(mix.classes, weights)
        prompt = _prompt_of(kind, texts)
        trace.append(Offer(index, next(moments), kind.name, prompt.prompt, prompt.expect))
    return trace


def save_trace(path: Path, trace: Sequence[Offer]) -> None:
    """Write a trace as JSON lines."""
    path.write_bytes(b"".join(msgspec.json.encode(offer) + b"\n" for offer in trace))


def load_trace(path: Path, mix: Mix) -> list[Offer]:
    """Read what `save_trace` wrote. Raises `InputError` if it does not belong to `mix`."""
    try:
        trace = [msgspec.json.decode(line, type=Offer) for line in _read(path).splitlines() if line.strip()]
    except msgspec.MsgspecError as error:
        raise InputError(f"{path.name} is not a trace: {error}", param="trace") from error
    unknown = {offer.kind for offer in trace} - {each.name for each in mix.classes}
    if unknown or not trace:
        raise InputError(
            f"{path.name} is empty or has classes that the workload lacks: {sorted(unknown)}", param="trace"
        )
    return trace


def _moments(rng: Random, rate: float, arrivals: Arrivals, burst: float) -> Iterator[float]:
    """Milliseconds of one arrival after the other."""
    every_ms, lasts_ms = 20_000.0, 2_000.0
    slow = rate / (1 + (burst - 1) * lasts_ms / every_ms)
    now = 0.0
    while True:
        if arrivals == "uniform":
            now += 1e3 / rate
        elif arrivals == "poisson":
            now += rng.expovariate(rate) * 1e3
        else:
            # unit-rate gap, spent over stretches of different rates (time change of a Poisson process)
            left = rng.expovariate(1.0)
            while left > 0:
                phase = (now + every_ms / 2) % every_ms
                fast = phase < lasts_ms
                speed = (slow * burst if fast else slow) / 1e3
                until = (lasts_ms if fast else every_ms) - phase
                spent = min(until, left / speed)
                now += max(spent, 1e-6)
                left -= spent * speed
        yield now


def _prompt_of(kind: RequestClass, rng: Random) -> Prompt:
    if kind.text is not None:
        return MAKERS[kind.text](rng, kind.words)
    chosen = rng.choice(kind.prompts)
    return Prompt(chosen) if isinstance(chosen, str) else chosen


def _with_prompts(kind: RequestClass, mix_file: Path) -> RequestClass:
    """The class with the prompts of its file in it. A path that leaves the mix's own folder is refused."""
    if kind.prompts_file is None:
        return kind
    folder = mix_file.resolve().parent
    path = (folder / kind.prompts_file).resolve()
    if not path.is_relative_to(folder):
        raise InputError(
            f"prompts_file {kind.prompts_file!r:.80} leaves the folder of the workload", param="prompts_file"
        )
    prompts = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        try:
            prompts.append(msgspec.json.decode(line, type=Prompt))
        except msgspec.MsgspecError as error:
            raise InputError(f"{path.name} line {number}: {error}", param="prompts_file") from error
    if not prompts:
        raise InputError(f"{path.name} is empty", param="prompts_file")
    return msgspec.structs.replace(kind, prompts=tuple(prompts), prompts_file=None)


def _parsed(path: Path) -> Any:
    data = _read(path)
    if path.suffix == ".json":
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path.name} is not JSON: {error}", param="workload") from error
    try:
        import yaml
    except ImportError as error:
        raise UnavailableError("a .yaml workload needs PyYAML; write it as .json instead") from error
    try:
        return yaml.safe_load(data)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{path.name} is not YAML: {error}", param="workload") from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_LIMIT + 1)
    except OSError as error:
        raise InputError(f"cannot read {path.name}: {error.strerror or error}", param="workload") from error
    if len(data) > FILE_LIMIT:
        raise InputError(f"{path.name} is larger than {FILE_LIMIT >> 20} MiB", param="workload")
    return data
