"""Every answer that a constraint allows, where they are few: a choice, an enum, a small object of such, alternatives.

JSON is written without white space, which is one of the ways in which the constraint takes it. What is not recognized
gives nothing, and so does what allows more than `MAX_ANSWERS`. Knows sources and texts; nothing about time or models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from haomiao.errors import HaomiaoError
from haomiao.text.constraint import GrammarConstraint
from haomiao.text.tokenizer import Tokenizer

MAX_ANSWERS = 64
MAX_TOKENS = 64
MAX_CHARACTERS = 1024
"""Of one answer, before it is made tokens."""
MAX_PARTS = 128
"""Parts of a schema that are looked at, those behind a `$ref` every time."""
NOTES = frozenset(["title", "description", "default", "examples", "deprecated", "$comment", "$schema", "$id"])
DEFINITIONS = ("$defs", "definitions")
SPECIAL = frozenset(r"\.+*?()|[]{}^$")
ESCAPED = SPECIAL | frozenset("#&-~/")
"""What stands for itself in a regular expression after a backslash."""


def all_answers(
    tokenizer: Tokenizer, constraint: GrammarConstraint, kind: str, value: Any
) -> tuple[tuple[int, ...], ...]:
    """Token ids of every answer that a fresh `constraint`, compiled from `kind` and `value`, allows; empty if they are
    not known to be few, or one of them has no tokens that it takes or more than `MAX_TOKENS`."""
    found = []
    for text in finite_texts(kind, value):
        ids = _spelled(tokenizer, constraint, text)
        if ids is None:
            return ()
        found.append(ids)
    return tuple(found)


def finite_texts(kind: str, value: Any) -> tuple[str, ...]:
    """Every text that a constraint allows, JSON without white space; empty if they are not known to be few. `kind` and
    `value` are those of `compile_constraint`, which refuses what is malformed."""
    texts: list[str] | None = None
    if kind == "choice":
        texts = list(value)
    elif kind == "regex":
        texts = _alternatives(value)
    elif kind == "json_schema":
        texts = _schema_texts(value)
    found = tuple(dict.fromkeys(texts or ()))
    few = len(found) <= MAX_ANSWERS and all(len(text) <= MAX_CHARACTERS for text in found)
    return found if few else ()


def _spelled(tokenizer: Tokenizer, constraint: GrammarConstraint, text: str) -> tuple[int, ...] | None:
    """Tokens of a text that the constraint takes as a whole answer: the tokenizer's, unless that puts a space first."""
    try:
        ids = tokenizer.encode_part(text, False)
        if not constraint.takes(ids):
            ids = constraint.longest_tokens(text)
    except HaomiaoError:  # it will be said when the grammar is used
        return None
    return tuple(ids) if len(ids) <= MAX_TOKENS and constraint.takes(ids) else None


# ---- regular expressions --------------------------------------------------------------------------------------------


def _alternatives(pattern: str) -> list[str] | None:
    """The literals between which a pattern chooses, in one group or none; None if it does anything else."""
    body = pattern.removeprefix("^")
    if body.endswith("$") and not body.endswith("\\$"):
        body = body[:-1]
    for opening in ("(?:", "("):
        if body.startswith(opening) and body.endswith(")"):
            body = body[len(opening) : -1]
            break
    found = [""]
    characters = iter(body)
    for character in characters:
        if character == "|":
            found.append("")
        elif character == "\\":
            literal = next(characters, "")
            if literal not in ESCAPED:
                return None
            found[-1] += literal
        elif character in SPECIAL:
            return None
        else:
            found[-1] += character
    return found if all(found) else None


# ---- JSON schemas ---------------------------------------------------------------------------------------------------


def _schema_texts(value: Any) -> list[str] | None:
    if isinstance(value, (str, bytes)):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return _Schema(value).texts(value)


class _Schema:
    """Reads one schema. Every method gives None for what it does not recognize, or what is too much."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._left = MAX_PARTS

    def texts(self, schema: Any) -> list[str] | None:
        """What the schema allows, without repetitions; at least one."""
        self._left -= 1
        if self._left < 0 or not isinstance(schema, Mapping):
            return None
        rest = {name: value for name, value in schema.items() if name not in NOTES and name not in DEFINITIONS}
        names = set(rest)
        if names == {"$ref"}:
            found = self._referred(rest["$ref"])
        elif names == {"anyOf"}:
            found = self._any(rest["anyOf"])
        elif names in ({"enum"}, {"enum", "type"}):
            found = _scalars(rest["enum"], rest.get("type"))
        elif names in ({"const"}, {"const", "type"}):
            found = _scalars([rest["const"]], rest.get("type"))
        elif names == {"type"}:
            found = _of_types(rest["type"])
        elif names <= {"type", "properties", "required", "additionalProperties"}:
            found = self._object(rest)
        else:
            found = None
        return list(dict.fromkeys(found)) if found and len(found) <= MAX_PARTS else None

    def _referred(self, reference: Any) -> list[str] | None:
        if not isinstance(reference, str) or not reference.startswith("#/") or reference.count("/") != 2:
            return None
        place, name = reference[2:].split("/")
        if place not in DEFINITIONS or "~" in name or "%" in name:
            return None
        definitions = self._root.get(place)
        return self.texts(definitions.get(name)) if isinstance(definitions, Mapping) else None

    def _any(self, schemas: Any) -> list[str] | None:
        if not isinstance(schemas, (list, tuple)):
            return None
        found: list[str] = []
        for schema in schemas:
            texts = self.texts(schema)
            if texts is None:
                return None
            found += texts
        return found

    def _object(self, rest: Mapping[str, Any]) -> list[str] | None:
        """Objects whose members are all of few values and that may have no others, members in the schema's order."""
        members, required = rest.get("properties"), rest.get("required", ())
        if rest.get("type") != "object" or rest.get("additionalProperties") is not False:
            return None
        if not isinstance(members, Mapping) or not isinstance(required, (list, tuple)):
            return None
        if not all(isinstance(name, str) and name in members for name in required):
            return None
        rows: list[list[str]] = [[]]
        for name, schema in members.items():
            texts, key = self.texts(schema), _scalar(name)
            if texts is None or key is None:
                return None
            longer = [[*row, f"{key}:{text}"] for row in rows[: MAX_ANSWERS + 1] for text in texts[: MAX_ANSWERS + 1]]
            rows = longer if name in required else longer + rows
            if len(rows) > MAX_ANSWERS:
                return None
        return ["{" + ",".join(row) + "}" for row in rows]


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int,),
}


def _scalars(values: Any, types: Any) -> list[str] | None:
    """JSON of the values that are of one of the types; None where a value has more than one way to be written."""
    if not isinstance(values, (list, tuple)):
        return None
    if types is not None:
        wanted = [_TYPES.get(each) if isinstance(each, str) else None for each in _listed(types)]
        if None in wanted:
            return None
        allowed = {kind for kinds in wanted for kind in kinds or ()}
        values = [value for value in values if type(value) in allowed]
    texts = [_scalar(value) for value in values]
    return None if None in texts else [text for text in texts if text is not None]


def _scalar(value: Any) -> str | None:
    """JSON as the constraint has it: numbers only where all write them alike, strings without control characters."""
    if value is None or isinstance(value, bool) or (type(value) is int and abs(value) < 1 << 53):
        return json.dumps(value)
    if isinstance(value, str) and all(" " <= character != "\x7f" for character in value):
        return json.dumps(value, ensure_ascii=False)
    return None


def _of_types(types: Any) -> list[str] | None:
    found: list[str] = []
    for each in _listed(types):
        if each not in ("boolean", "null"):
            return None
        found += ["true", "false"] if each == "boolean" else ["null"]
    return found


def _listed(types: Any) -> Sequence[Any]:
    return types if isinstance(types, (list, tuple)) else [types]
