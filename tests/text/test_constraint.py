"""Whatever is sampled under the mask is valid; what is hostile is refused within bounds."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import numpy as np
import pytest

from haomiao.errors import ConstraintError
from haomiao.text.constraint import Kind, compile_constraint
from haomiao.text.tokenizer import Tokenizer
from haomiao.types import TokenConstraint

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 8},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["灯", "b"]}, "minItems": 1, "maxItems": 3},
        "on": {"type": "boolean"},
    },
    "required": ["name", "count", "tags", "on"],
    "additionalProperties": False,
}


def allowed(constraint: TokenConstraint) -> list[int]:
    return np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")).tolist()


def sample(tokenizer: Tokenizer, constraint: TokenConstraint, rng: random.Random, steps: int = 60) -> str:
    """Random allowed tokens; then whatever closes it."""
    ids: list[int] = []
    for _ in range(steps):
        choices = allowed(constraint)
        assert choices, "a live constraint always allows something"
        id_ = rng.choice(choices)
        assert constraint.accept(id_)
        if id_ in tokenizer.eos_ids:
            return tokenizer.decode(ids)
        ids.append(id_)
    for id_ in constraint.tokens_to_close():
        assert constraint.accept(id_)
        ids.append(id_)
    assert constraint.is_complete() and list(constraint.tokens_to_close()) == []
    return tokenizer.decode(ids)


@pytest.mark.parametrize("seed", range(8))
def test_samples_fit_the_schema(tiny: Tokenizer, seed: int) -> None:
    text = sample(tiny, compile_constraint(tiny, "json_schema", SCHEMA), random.Random(seed))
    value = json.loads(text)
    assert set(value) == {"name", "count", "tags", "on"}
    assert 3 <= len(value["name"]) <= 8 and value["count"] in range(100) and type(value["on"]) is bool
    assert 1 <= len(value["tags"]) <= 3 and set(value["tags"]) <= {"灯", "b"}


@pytest.mark.parametrize("seed", range(5))
def test_samples_are_json_objects(trained: Tokenizer, seed: int) -> None:
    text = sample(trained, compile_constraint(trained, "json_object"), random.Random(seed), steps=25)
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("pattern", [r"[a-z]+@[a-z]+\.(com|org)", r"(a|b)*c", r"\d{4}-\d{2}", r"[一-龥]{2,4}。", "x?"])
@pytest.mark.parametrize("seed", range(3))
def test_samples_match_the_regex(trained: Tokenizer, pattern: str, seed: int) -> None:
    text = sample(trained, compile_constraint(trained, "regex", pattern), random.Random(seed), steps=12)
    assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize("options", [["yes", "no"], ["是", "否", "不知道"], ["a", "ab", "abc"], ['"q"\n', "\\"]])
@pytest.mark.parametrize("seed", range(4))
def test_samples_are_options(tiny: Tokenizer, options: list[str], seed: int) -> None:
    assert sample(tiny, compile_constraint(tiny, "choice", options), random.Random(seed)) in options


def test_grammar(tiny: Tokenizer) -> None:
    constraint = compile_constraint(tiny, "grammar", 'start: "(" start ")" | "x"')
    for id_ in tiny.encode("((("):
        assert constraint.accept(id_)
    assert tiny.decode(constraint.tokens_to_close()) == "x)))"


def test_accept_rollback_and_fork(tiny: Tokenizer) -> None:
    constraint = compile_constraint(tiny, "choice", ["hello", "help"])
    start = constraint.mask()
    assert not constraint.accept(tiny.encode("x")[0]) and np.array_equal(constraint.mask(), start)
    assert not constraint.accept(tiny.eos_ids[0]) and not constraint.accept(10**6) and not constraint.accept(-1)
    for id_ in tiny.encode("h") + tiny.encode("e"):
        assert constraint.accept(id_)
    other = constraint.fork()
    for id_ in [*tiny.encode("l"), *tiny.encode("p")]:
        assert other.accept(id_)
    assert other.is_complete() and not constraint.is_complete()
    assert allowed(other) == sorted(tiny.eos_ids)
    assert other.accept(tiny.eos_ids[0]) and other.mask().any() and not other.accept(tiny.eos_ids[0])
    other.rollback(2)  # the end and the p
    assert not other.is_complete() and other.accept(tiny.encode("p")[0])
    constraint.rollback(2)
    assert np.array_equal(constraint.mask(), start)
    with pytest.raises(ConstraintError):
        constraint.rollback(1)


def test_mask_is_as_wide_as_the_head(tiny: Tokenizer) -> None:
    assert compile_constraint(tiny, "json_object").mask().shape == ((tiny.vocab_size + 31) // 32,)
    wide = compile_constraint(tiny, "json_object", vocab_size=1000)
    assert wide.mask().shape == (32,) and max(allowed(wide)) < tiny.vocab_size


def test_special_tokens_are_never_allowed_as_text(tiny: Tokenizer) -> None:
    constraint = compile_constraint(tiny, "regex", r"(.|\n)+")
    assert set(allowed(constraint)).isdisjoint(tiny.special_ids)
    assert constraint.accept(tiny.encode("a")[0])
    assert set(allowed(constraint)) & tiny.special_ids == set(tiny.eos_ids)


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("json_schema", nested(100_000)),
        ("json_schema", nested(1000)),
        ("json_schema", {"enum": [f"value {index}" for index in range(100_000)]}),
        ("json_schema", {"enum": list(range(2000))}),
        ("json_schema", {"properties": {f"p{index}": {"type": "string"} for index in range(20_000)}}),
        ("json_schema", {"$ref": "http://127.0.0.1/schema"}),
        ("json_schema", {"$ref": "file:///etc/passwd"}),
        ("json_schema", {"type": "nothing"}),
        ("json_schema", {"type": "string", "pattern": "^(?!a)b"}),
        ("json_schema", {"type": "string", "pattern": "a" * 5000}),
        ("json_schema", {"not": {"type": "string"}}),
        ("json_schema", {"type": "integer", "minimum": float("nan")}),
        ("json_schema", {"const": "\ud800"}),
        ("json_schema", {"const": {1, 2}}),
        ("json_schema", "not json"),
        ("json_schema", [1]),
        ("json_schema", None),
        ("regex", "(?=a)b"),
        ("regex", r"(a)\1"),
        ("regex", "(" * 3000 + "a" + ")" * 3000),
        ("regex", "a" * 10_000),
        ("regex", "["),
        ("regex", ""),
        ("regex", 5),
        ("grammar", "start: missing"),
        ("grammar", "start: " + '"a" | ' * 50_000 + '"b"'),
        ("choice", []),
        ("choice", ["a", ""]),
        ("choice", "ab"),
        ("choice", [str(index) for index in range(100_000)]),
        ("choice", ["a" * 100_000]),
        ("choice", ["a", 1]),
        ("music", "x"),
    ],
)
def test_what_is_hostile_is_refused(tiny: Tokenizer, kind: Kind, value: Any) -> None:
    with pytest.raises(ConstraintError) as caught:
        compile_constraint(tiny, kind, value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("json_schema", {"$ref": "#"}),
        ("json_schema", {"type": "object", "properties": {"a": {"$ref": "#"}}}),
        ("json_schema", {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 50}}, "$ref": "#/$defs/a"}),
        ("json_schema", {"allOf": [{"properties": {f"p{index}": {"type": "string"}}} for index in range(200)]}),
        ("regex", "(a+)+b"),
        ("regex", "(a|a)*" * 50),
        ("regex", ".*a.{18}"),
        ("regex", "(a{1,1000}){1,1000}"),
        ("regex", "(.*a.{50}){20}"),
        ("grammar", 'start: start start | "a" |'),
        ("grammar", 'start: "a" start "b" | start | "c"'),
    ],
)
def test_what_is_heavy_stays_bounded(tiny: Tokenizer, kind: Kind, value: Any) -> None:
    """Compiled or refused, stepped or refused: by fuel, so the test's own timeout is the only clock."""
    rng = random.Random(1)
    try:
        constraint = compile_constraint(tiny, kind, value)
        for _ in range(20):
            if not constraint.accept(rng.choice(allowed(constraint))):
                break
    except (ConstraintError, IndexError):
        return
    assert constraint.mask().dtype == np.uint32


def test_many_schemas_do_not_pile_up(tiny: Tokenizer) -> None:
    from haomiao.text.constraint import DEFAULT_LIMITS, _grammars_of

    for index in range(DEFAULT_LIMITS.cached + 20):
        compile_constraint(tiny, "choice", [f"option {index}"])
    assert len(_grammars_of(tiny)._compiled) == DEFAULT_LIMITS.cached
