"""GGUF's names and Hugging Face's: what is translated comes back, and nothing else is."""

from __future__ import annotations

import pytest

from haomiao.load.gguf.names import TABLES, translate, untranslate


@pytest.mark.parametrize("architecture", TABLES)
def test_every_name_comes_back(architecture: str) -> None:
    top, _, inside = TABLES[architecture]
    middles = [*top, *(f"blk.{layer}.{key}" for layer in (0, 7, 31) for key in inside)]
    for name in [f"{middle}.{kind}" for middle in middles for kind in ("weight", "bias")]:
        translated = translate(architecture, name)
        assert translated is not None
        assert untranslate(architecture, translated) == name


@pytest.mark.parametrize("name", ["", "weight", "output", "blk.0.weight", "blk.00.attn_q.weight", "blk.0.attn_q.scale"])
def test_other_names_are_not_translated(name: str) -> None:
    assert translate("llama", name) is None


@pytest.mark.parametrize(
    "name",
    ["", "weight", "lm_head", "model.layers.0.weight", "model.layers.x.mlp.up_proj.weight", "model.norm.scale"],
)
def test_other_names_do_not_come_back(name: str) -> None:
    assert untranslate("llama", name) is None
