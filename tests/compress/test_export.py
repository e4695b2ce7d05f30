"""Exported checkpoints: read back by our own loader they are the artifact's numbers, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from haomiao.cli.main import main
from haomiao.compress.export.compressed_tensors import export, pack_words
from haomiao.compress.export.parts import parts
from haomiao.errors import InputError, UnsupportedModelError
from haomiao.kernels.pack import unpack
from haomiao.load.artifact import Artifact
from haomiao.load.source import open_source
from haomiao.models.convert import convert
from haomiao.models.registry import plan_for
from tests.compress.test_job import run, source_of
from tests.golden.cases import CASES

WHOLE = next(
    c
    for c in CASES
    if c.name.startswith(("qwen2", "llama", "qwen3"))
    and c.config["hidden_size"] % 32 == 0
    and c.config["intermediate_size"] % 32 == 0
)


@pytest.mark.parametrize(("point", "planes"), [("int4", "hi"), ("int8", "hi+lo")])
def test_what_is_read_back_is_what_was_solved(point: str, planes: str, tmp_path: Path) -> None:
    recipe = {"lo_shift": 3} if point == "int8" else {}
    artifact = run(tmp_path / "out", WHOLE, recipe)
    source = open_source(export(artifact, tmp_path / "ct", point))
    again = Artifact.open(convert(source, tmp_path / "again", scheme="exact"))
    for spec in plan_for(WHOLE.config).weights.values():
        if spec.kind == "vector":
            np.testing.assert_array_equal(again.vectors[spec.name], artifact.vectors[spec.name])
        elif spec.role == "body":
            expected = unpack(artifact.tensors[spec.name], planes)  # type: ignore[arg-type]
            np.testing.assert_array_equal(unpack(again.tensors[spec.name]), expected)
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 32


def test_fused_matrices_are_written_whole(tmp_path: Path) -> None:
    fused = next(c for c in CASES if c.name == "phi3-window")
    artifact = Artifact.open(convert(source_of(fused), tmp_path / "out", with_lo=False))
    again = Artifact.open(convert(open_source(export(artifact, tmp_path / "ct", "int4")), tmp_path / "again"))
    for name in ("layers.0.qkv", "layers.1.gate_up", "layers.1.down"):
        np.testing.assert_array_equal(unpack(again.tensors[name], "hi"), unpack(artifact.tensors[name], "hi"))


def test_words_hold_eight_codes_low_bits_first() -> None:
    codes = np.array([[-8, 7, 0, 1, 2, 3, 4, 5, -1]], np.int16)
    first, second = pack_words(codes)[0].view(np.uint32)
    assert [int(first) >> (4 * i) & 15 for i in range(8)] == [0, 15, 8, 9, 10, 11, 12, 13]
    assert int(second) & 15 == 7


def test_gate_and_up_come_apart_without_their_padding(tmp_path: Path) -> None:
    artifact = run(tmp_path / "out", CASES[0])
    found = {part.name: part for part in parts(artifact, plan_for(CASES[0].config), "int4")}
    ffn = CASES[0].config["intermediate_size"]
    for name in ("gate", "up"):
        part = found[f"model.layers.0.mlp.{name}_proj.weight"]
        assert part.codes is not None
        assert part.codes.shape == (ffn, CASES[0].config["hidden_size"])


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = run(tmp_path / "out", WHOLE)
    with pytest.raises(InputError, match="int4 and int8"):
        export(artifact, tmp_path / "x", "full")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="exists already"):
        export(artifact, tmp_path / "full", "int4")
    transposed = next(c for c in CASES if c.name.startswith("gpt2"))
    with pytest.raises(UnsupportedModelError, match="transposed"):
        export(run(tmp_path / "gpt2", transposed), tmp_path / "y", "int4")
    ask = ["compress", str(tmp_path / "out"), "-o", str(tmp_path / "cli"), "--format", "compressed-tensors"]
    assert main([*ask, "--method", "gptq"]) == 2
    assert "then export it" in capsys.readouterr().err
    assert main([*ask, "--bits", "4"]) == 0
    assert (tmp_path / "cli" / "model.safetensors").is_file()
