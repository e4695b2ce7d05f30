"""The recipe: what a compression does, as one checked value. From a YAML file, flags, or both (flags win).

Unknown keys are refused by name, so that a misspelt one cannot be a silent default. Knows words and ranges only.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from haomiao.errors import InputError
from haomiao.kernels.packed import GROUPS

METHODS = ("rtn", "gptq")
ORDERS = ("group", "static", "natural")
ALLOCATIONS = ("uniform", "owl")
PATTERNS = ("magnitude", "wanda", "sparsegpt")
STRUCTURES = ("structured", "neurons", "heads", "groups", "layers")
N_OF_M = re.compile(r"([1-9]\d?):([1-9]\d?)")
MAX_FILE = 1 << 20


@dataclass(frozen=True, slots=True)
class Prune:
    """One kind of pruning; `share` is the part that goes.

    `neurons` of every FFN, query `heads` of every KV head, KV `groups` with their query heads, whole `layers`;
    `structured`: heads and neurons, so that the share of the layers' weights goes. They make the model smaller. `tile`
    and the patterns leave zeros where weights were.
    """

    kind: Literal["tile", "magnitude", "wanda", "sparsegpt", "structured", "neurons", "heads", "groups", "layers"]
    share: float
    pattern: tuple[int, int] | None = None
    """(n, m): n zeros in every m neighbouring columns of a row."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result. Defaults are those of `haomiao compress --method gptq`."""

    method: Literal["rtn", "gptq"] = "gptq"
    bits: int = 4
    """4: int4 codes, with a second plane (`lo`) that makes them int8. 8: plain int8. 3: int4 codes that use three
    bits, for comparison; stored as four."""
    group: int = 32
    lo: bool = True
    lo_shift: int | None = None
    """Of the second plane: 2, 3 or 4; None: the solver's choice for each matrix."""
    order: Literal["group", "static", "natural"] = "group"
    damping: float = 0.01
    awq: bool = False
    rotate: bool = False
    prune: tuple[Prune, ...] = ()
    joint: bool = True
    """False: masks are chosen and made up for first, and what is left is quantized as if it had always been so. For
    comparison; only recipes say it."""
    allocation: Literal["uniform", "owl"] = "uniform"
    max_kl: float | None = None
    """Drop second planes, the least useful first, as long as the measured KL of `int8` stays below. In a search: find
    the fastest model whose KL stays below."""
    search: bool = False
    """Over bits, tiles, width and depth, by measured error and time, towards `target_ms` or `max_kl` or both."""
    target_ms: float | None = None
    """Of a decode step of one token."""
    text: tuple[str, ...] = ()
    samples: int = 128
    length: int = 512
    held: int = 16
    """Samples kept for measuring the error."""

    @property
    def mask(self) -> Prune | None:
        """The pruning that leaves zeros."""
        return next((each for each in self.prune if each.kind not in STRUCTURES), None)

    @property
    def structured(self) -> tuple[Prune, ...]:
        """The prunings that make the model smaller."""
        return tuple(each for each in self.prune if each.kind in STRUCTURES)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; `recipe_of` reads it back."""
        out = dataclasses.asdict(self)
        out["prune"] = [spell(each) for each in self.prune]
        out["text"] = list(self.text)
        return out


KEYS = {f.name: f for f in dataclasses.fields(Recipe)}
RANGES: Mapping[str, tuple[float, float]] = {
    "damping": (0.0, 10.0),
    "max_kl": (0.0, 100.0),
    "target_ms": (1e-3, 1e6),
    "samples": (1, 65536),
    "length": (16, 1 << 17),
    "held": (1, 4096),
}


def recipe_of(given: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A checked recipe. Raises `InputError` naming the key."""
    import difflib

    values: dict[str, Any] = {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name not in KEYS:
            near = difflib.get_close_matches(name, KEYS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(KEYS)}"
            raise InputError(f"{where}: there is no key {str(key)[:64]!r}{hint}", param=str(key)[:64])
        values[name] = _checked(name, value, where)
    recipe = Recipe(**values)
    _agree(recipe, where)
    return recipe


def read_recipe(path: str | Path, what: str = "recipe") -> dict[str, Any]:
    """The mapping that a YAML file holds; errors call it `what`. Raises `InputError` with one line."""
    import yaml

    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise InputError(f"{what} {path} is larger than {MAX_FILE >> 20} MiB", param=what)
        if b"&" in data or b"*" in data:
            raise InputError(f"{what} {path}: anchors and aliases are not allowed", param=what)
        value = yaml.safe_load(data.decode("utf-8"))
    except OSError as wrong:
        raise InputError(f"{what} {path} cannot be read ({wrong.strerror})", param=what) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as wrong:
        line = str(wrong).splitlines()[0] if str(wrong) else type(wrong).__name__
        raise InputError(f"{what} {path} is not YAML ({line[:200]})", param=what) from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{what} {path} must be a mapping of keys to values", param=what)
    return value


def parse_prune(text: Any, where: str = "prune") -> Prune:
    """`tile:0.3`, `sparsegpt:0.5`, `wanda:2:4`, `neurons:0.25`, ... Raises `InputError`."""
    kinds = ("tile", *PATTERNS, *STRUCTURES)
    kind, _, amount = str(text).partition(":")
    if kind not in kinds or not amount:
        raise InputError(
            f"{where}: {str(text)[:64]!r} is not KIND:SHARE with KIND one of {', '.join(kinds)}", param="prune"
        )
    if match := N_OF_M.fullmatch(amount):
        n, m = int(match[1]), int(match[2])
        if kind not in PATTERNS or not n < m or m not in (2, 4, 8, 16):
            raise InputError(
                f"{where}: {amount} needs one of {', '.join(PATTERNS)}, and N below M of 2, 4, 8 or 16", param="prune"
            )
        return Prune(kind, n / m, (n, m))  # type: ignore[arg-type]
    try:
        share = float(amount)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise InputError(f"{where}: the share {amount[:32]!r} must lie between 0 and 1", param="prune")
    return Prune(kind, share)  # type: ignore[arg-type]


def spell(prune: Prune) -> str:
    """The text that `parse_prune` reads."""
    amount = f"{prune.pattern[0]}:{prune.pattern[1]}" if prune.pattern else repr(prune.share)
    return f"{prune.kind}:{amount}"


def _checked(name: str, value: Any, where: str) -> Any:
    def refuse(expected: str) -> InputError:
        return InputError(f"{where}: {name} must be {expected}, not {str(value)[:64]!r}", param=name)

    words = {"method": METHODS, "order": ORDERS, "allocation": ALLOCATIONS}
    numbers = {"bits": (3, 4, 8), "group": GROUPS}
    if name in words:
        if value not in words[name]:
            raise refuse(f"one of {', '.join(words[name])}")
    elif name in numbers:
        if type(value) is not int or value not in numbers[name]:
            raise refuse(f"one of {', '.join(map(str, numbers[name]))}")
    elif name in ("lo", "awq", "rotate", "joint", "search"):
        if type(value) is not bool:
            raise refuse("true or false")
    elif name == "lo_shift":
        if value not in (None, "auto", 2, 3, 4) or isinstance(value, bool):
            raise refuse("2, 3, 4 or auto")
        return None if value == "auto" else value
    elif name == "prune":
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(item if isinstance(item, Prune) else parse_prune(item, where) for item in items)
    elif name == "text":
        items = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(item, (str, Path)) and str(item) for item in items):
            raise refuse("a file name or a list of them")
        return tuple(str(item) for item in items)
    else:
        return _number(name, value, refuse)
    return value


def _number(name: str, value: Any, refuse: Any) -> Any:
    low, high = RANGES[name]
    if name in ("max_kl", "target_ms") and value is None:
        return None
    whole = name not in ("damping", "max_kl", "target_ms")
    fits = type(value) is int if whole else type(value) in (int, float)
    if not fits or not low <= value <= high:
        raise refuse(f"a {'whole ' if whole else ''}number from {low:g} to {high:g}")
    return value if whole else float(value)


def _agree(recipe: Recipe, where: str) -> None:
    """What must not stand together."""
    masks = [each for each in recipe.prune if each.kind not in STRUCTURES]
    kinds = [each.kind for each in recipe.structured]
    if len(masks) > 1:
        raise InputError(f"{where}: prune may hold one of tile or a pattern", param="prune")
    if len(set(kinds)) < len(kinds) or ("structured" in kinds and {"neurons", "heads", "groups"} & set(kinds)):
        raise InputError(
            f"{where}: prune may hold each of {', '.join(STRUCTURES)} once; structured is heads and neurons already",
            param="prune",
        )
    if not masks and not recipe.joint:
        raise InputError(f"{where}: joint: false needs tiles or a pattern to prune", param="joint")
    if masks and masks[0].kind in ("tile", "sparsegpt") and recipe.method == "rtn" and recipe.joint:
        raise InputError(f"{where}: {spell(masks[0])} needs method gptq: pruning and rounding are one", param="prune")
    if recipe.allocation == "owl" and not masks:
        raise InputError(f"{where}: allocation owl needs tiles or a pattern to prune", param="allocation")
    if recipe.search:
        if recipe.target_ms is None and recipe.max_kl is None:
            raise InputError(f"{where}: a search needs target_ms or max_kl", param="search")
        if recipe.prune or recipe.awq or recipe.bits != 4 or not recipe.lo or recipe.method != "gptq":
            raise InputError(
                f"{where}: a search chooses bits, planes and pruning itself, with method gptq and without awq",
                param="search",
            )
    elif recipe.target_ms is not None:
        raise InputError(f"{where}: target_ms needs search: true", param="target_ms")
    if recipe.max_kl is not None and (recipe.bits != 4 or not recipe.lo):
        raise InputError(f"{where}: max_kl needs bits 4 with a second plane", param="max_kl")
    if recipe.lo_shift is not None and (not recipe.lo or recipe.bits == 8):
        raise InputError(f"{where}: lo_shift needs a second plane", param="lo_shift")
