"""Recipes: what is read from YAML and flags, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from haomiao.compress.recipe import Prune, Recipe, parse_prune, read_recipe, recipe_of, spell
from haomiao.errors import InputError


def test_defaults_and_round_trip() -> None:
    assert recipe_of({}) == Recipe()
    given = {"bits": 4, "group": 128, "prune": ["wanda:2:4"], "max-kl": 0.01, "text": "a.txt"}
    recipe = recipe_of(given)
    assert recipe.prune == (Prune("wanda", 0.5, (2, 4)),)
    assert recipe_of(recipe.as_dict()) == recipe
    assert recipe.text == ("a.txt",)


def test_a_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("method: gptq\ngroup: 64\nlo_shift: auto\nprune: sparsegpt:0.5\ntext: [en.txt, zh.txt]\n")
    recipe = recipe_of(read_recipe(path))
    assert (recipe.group, recipe.lo_shift, recipe.text) == (64, None, ("en.txt", "zh.txt"))
    path.write_text("")
    assert read_recipe(path) == {}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"bit": 4}, "did you mean 'bits'"),
        ({"zzz": 1}, "there is no key 'zzz'; known are"),
        ({1: 2}, "there is no key '1'"),
        ({"bits": 5}, "bits must be one of 3, 4, 8"),
        ({"bits": True}, "bits must be"),
        ({"bits": "4"}, "bits must be"),
        ({"group": 48}, "group must be"),
        ({"lo": 1}, "lo must be true or false"),
        ({"lo_shift": 5}, "lo_shift"),
        ({"lo_shift": True}, "lo_shift"),
        ({"damping": -1}, "damping must be a number from 0 to 10"),
        ({"damping": float("nan")}, "damping"),
        ({"samples": 1.5}, "samples must be a whole number"),
        ({"length": 8}, "length"),
        ({"text": [1]}, "text must be"),
        ({"text": ""}, "text must be"),
        ({"prune": "tile"}, "KIND:SHARE"),
        ({"prune": "tile:1.5"}, "between 0 and 1"),
        ({"prune": "tile:nan"}, "between 0 and 1"),
        ({"prune": "tile:2:4"}, "2:4 needs"),
        ({"prune": "wanda:4:4"}, "4:4 needs"),
        ({"prune": "wanda:1:3"}, "1:3 needs"),
        ({"prune": ["wanda:0.5", "tile:0.3"]}, "one of tile or a pattern"),
        ({"prune": "rows:0.5"}, "KIND:SHARE with KIND one of"),
        ({"prune": "tile:0.5", "method": "rtn"}, "needs method gptq"),
        ({"allocation": "owl"}, "tiles or a pattern"),
        ({"max_kl": 0.1, "lo": False}, "second plane"),
        ({"lo_shift": 3, "bits": 8}, "second plane"),
    ],
)
def test_refusals_name_the_key(given: dict[Any, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        recipe_of(given)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"a: [", "not YAML"),
        (b"\xff\xfe\xff", "not YAML"),
        (b"- a\n- b\n", "must be a mapping"),
        (b"a: &x 1\nb: *x\n", "anchors"),
        (b"!!python/object/apply:os.system ['true']", "not YAML"),
        (b"x" * (2 << 20), "larger than"),
        (b"[" * 100_000, "not YAML"),
    ],
)
def test_hostile_files(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=match):
        read_recipe(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe(tmp_path / "absent.yaml")


@pytest.mark.parametrize("text", ["tile:0.3", "sparsegpt:2:4", "magnitude:0.5"])
def test_prunes_are_spelt_as_they_are_read(text: str) -> None:
    assert spell(parse_prune(text)) == text
