"""JSON bodies, read strictly: one value, UTF-8, no duplicate keys, bounded depth, numbers that are what they say.

msgspec checks types and ranges; what it does not look at (duplicate keys, nesting) is looked at here. Knows no schema.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn, TypeVar

import msgspec

from haomiao.errors import InputError

T = TypeVar("T")
MAX_DEPTH = 64
MAX_CONTAINERS = 100_000
"""Objects and lists in one body: more is no request, and would only keep the parser busy."""
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""An unterminated one matches too; otherwise every quote in it would be tried again, in quadratic time."""
_BRACKETS = re.compile(rb"[\[\]{}]")
_PATH = re.compile(r" - at `\$\.?(.*?)`$")
_UNKNOWN = re.compile(r"^Object contains unknown field `(.*?)`")
_MISSING = re.compile(r"^Object missing required field `(.*?)`")
_encoder = msgspec.json.Encoder()


def dump(value: Any) -> bytes:
    """JSON of anything that msgspec knows."""
    return _encoder.encode(value)


def check(body: bytes) -> None:
    """Refuse what no schema would see. Raises `InputError`."""
    depth = deepest = containers = 0
    for bracket in _BRACKETS.finditer(_STRING.sub(b"", body)):
        if bracket[0] in b"[{":
            depth += 1
            containers += 1
            deepest = max(deepest, depth)
            if deepest > MAX_DEPTH:
                raise InputError(f"the JSON is nested deeper than {MAX_DEPTH}", code="invalid_json")
            if containers > MAX_CONTAINERS:
                raise InputError(f"the JSON holds more than {MAX_CONTAINERS} objects and lists", code="invalid_json")
        else:
            depth -= 1
    try:
        json.loads(body.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant, parse_int=_number)
    except UnicodeDecodeError as error:
        raise InputError(f"the body is not UTF-8 (byte {error.start})", code="invalid_json") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not JSON: {error}", code="invalid_json") from error


def decode(body: bytes, kind: type[T]) -> T:
    """The body as `kind`. Raises `InputError` that names the field."""
    check(body)
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"the body is not JSON: {error}", code="invalid_json") from error


def _refusal(message: str) -> InputError:
    """msgspec's complaint as ours: the path becomes `param`."""
    found = _PATH.search(message)
    path = (found[1] if found else "").replace("[...]", "")
    text = message[: found.start()] if found else message
    unknown, missing = _UNKNOWN.match(text), _MISSING.match(text)
    field = unknown or missing
    if field is not None:
        path = f"{path}.{field[1]}" if path else field[1]
        text = f"{path[:200]} is not a parameter" if unknown else f"{path} is missing"
        return InputError(text, param=path[:200], code="unknown_parameter" if unknown else "missing_parameter")
    return InputError(f"{path or 'the body'}: {text[:1].lower()}{text[1:]}", param=path or None)


def _object(pairs: list[tuple[str, Any]]) -> None:
    """No value is kept: msgspec reads the body again, by its schema."""
    if len({key for key, _ in pairs}) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InputError(f"the key {key[:60]!r} appears twice", code="invalid_json", param=key[:60])
            seen.add(key)


def _constant(name: str) -> NoReturn:
    raise InputError(f"{name} is not JSON", code="invalid_json")


def _number(digits: str) -> int:
    return 0  # Python would refuse, or spend time on, thousands of digits; msgspec checks the range
