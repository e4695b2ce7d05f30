"""What a training run does, as checked values out of a YAML file. Unknown keys are refused by name; flags win.

Knows words and ranges only.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from haomiao.compress.recipe import read_recipe
from haomiao.errors import InputError

T = TypeVar("T")

WORDS: Mapping[str, tuple[str, ...]] = {
    "optimizer": ("adamw", "muon"),
    "schedule": ("cosine", "trapezoid"),
    "precision": ("f32", "bf16"),
    "device": ("auto", "cpu", "cuda"),
    "form": ("documents", "pairs", "labelled"),
    "use": ("train", "valid"),
}
RANGES: Mapping[str, tuple[float, float]] = {
    "length": (8, 1 << 16),
    "batch": (1, 1 << 16),
    "accumulate": (1, 1 << 12),
    "steps": (1, 1 << 40),
    "warmup": (0, 1 << 30),
    "decay": (0.0, 1.0),
    "floor": (0.0, 1.0),
    "learning_rate": (0.0, 10.0),
    "weight_decay": (0.0, 10.0),
    "clip": (0.0, 1e6),
    "seed": (0, 1 << 31),
    "threads": (1, 4096),
    "vocabulary": (260, 65535),
    "limit_mib": (1, 1 << 20),
    "repeat": (1, 100),
    "column": (0, 1000),
}
"""Smallest and greatest value of a number; a key that is not here may be any positive one."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How many steps, and the learning rate of each as a share of the peak."""

    steps: int = 1000
    schedule: Literal["cosine", "trapezoid"] = "cosine"
    warmup: int = 100
    decay: float = 0.3
    """Share of the steps over which a trapezoid falls; what comes before is constant, and may be lengthened."""
    floor: float = 0.05
    """What is left of the rate at the end."""


@dataclass(frozen=True, slots=True)
class Training:
    """One pretraining run. Model keys are those of a Hugging Face Llama config."""

    model: dict[str, Any] = field(default_factory=dict)
    length: int = 512
    batch: int = 8
    """Sequences of one forward pass."""
    accumulate: int = 1
    """Forward passes of one step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-3
    """Peak. Muon's updates are scaled to the size of AdamW's, so that one rate serves all weights."""
    weight_decay: float = 0.1
    clip: float = 1.0
    steps: int = 1000
    schedule: Literal["cosine", "trapezoid"] = "cosine"
    warmup: int = 100
    decay: float = 0.3
    floor: float = 0.05
    precision: Literal["f32", "bf16"] = "f32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    threads: int | None = None
    seed: int = 1
    log_every: int = 10
    validate_every: int = 500
    validate_tokens: int = 65536
    """Of each held-out text."""
    checkpoint_minutes: float = 5.0
    part_mib: int = 16
    """Files of a checkpoint are cut to this size: they travel in parts."""

    @property
    def plan(self) -> Schedule:
        """The schedule's share of the settings."""
        return Schedule(self.steps, self.schedule, self.warmup, self.decay, self.floor)


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """One text: where it lies, what it is, and under which licence."""

    path: str = ""
    language: str = ""
    licence: str = ""
    origin: str = ""
    form: Literal["documents", "pairs", "labelled"] = "documents"
    """`documents`: separated by a line <|endoftext|>. `pairs`: columns between tabs (or commas, in a .csv), each its
    own text. `labelled`: JSON with lists of [text, label] in it, of which the text is taken."""
    column: int | None = None
    """Of `pairs`, this column alone, from 0."""
    use: Literal["train", "valid"] = "train"
    repeat: int = 1


@dataclass(frozen=True, slots=True)
class Corpus:
    """What prepared data are made of."""

    vocabulary: int = 8192
    sample_mib: int = 40
    """Text that the vocabulary is learnt from, evenly from all files."""
    limit_mib: int = 62
    """Of shards all together: what is more is left out, evenly."""
    seed: int = 1
    files: tuple[CorpusFile, ...] = ()


def read_training(path: str | Path, **flags: Any) -> Training:
    """Settings of a pretraining run. Raises `InputError` naming the key."""
    given = read_recipe(path, "config") | {key: value for key, value in flags.items() if value is not None}
    training = checked(Training, given, str(path))
    if training.warmup >= training.steps:
        raise InputError(
            f"{path}: {training.warmup} steps of warm-up leave nothing of {training.steps}", param="warmup"
        )
    return training


def read_corpus(path: str | Path) -> Corpus:
    """What a corpus file lists. Raises `InputError` naming the key."""
    given = read_recipe(path, "config")
    entries = given.pop("files", None)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path}: files must be a list of mappings", param="files")
    files = tuple(checked(CorpusFile, entry, f"{path}: files[{i}]") for i, entry in enumerate(entries))
    for file in files:
        if not file.path or not file.licence or not file.language:
            raise InputError(f"{path}: every file needs path, language and licence ({file.path!r})", param="files")
    return dataclasses.replace(checked(Corpus, given, str(path)), files=files)


def checked(kind: type[T], given: Mapping[str, Any], where: str) -> T:
    """A dataclass from a mapping: names, types and ranges. Raises `InputError` naming the key."""
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(fields)}"
            raise InputError(f"{where}: there is no key {str(key)[:64]!r}{hint}", param=str(key)[:64])
        values[name] = _value(name, value, fields[name].default, where)
    return kind(**values)


def _value(name: str, value: Any, default: Any, where: str) -> Any:
    def refuse(expected: str) -> InputError:
        return InputError(f"{where}: {name} must be {expected}, not {str(value)[:64]!r}", param=name)

    if name in WORDS:
        if value not in WORDS[name]:
            raise refuse(f"one of {', '.join(WORDS[name])}")
    elif isinstance(default, bool):
        if type(value) is not bool:
            raise refuse("true or false")
    elif isinstance(default, str):
        if type(value) is not str:
            raise refuse("text")
    elif name == "model":
        if not isinstance(value, dict):
            raise refuse("a mapping")
    elif default is None or isinstance(default, (int, float)):
        if value is None and default is None:
            return None
        low, high = RANGES.get(name, (1e-9, float("inf")))
        whole = not isinstance(default, float)
        if (type(value) is not int if whole else type(value) not in (int, float)) or not low <= value <= high:
            raise refuse(f"a {'whole ' if whole else ''}number from {low:g} to {high:g}")
        return value if whole else float(value)
    return value
