"""compress, pull, show, ls and rm on a small real checkpoint: what they write, say and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from haomiao.cli.main import main
from haomiao.load.artifact import Artifact

HIDDEN, FFN, VOCAB = 64, 96, 50


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random one-layer Llama without a tokenizer; the cache lies beside it."""
    monkeypatch.setenv("HAOMIAO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HAOMIAO_OFFLINE", "1")
    monkeypatch.delenv("HAOMIAO_MODEL", raising=False)
    rng = np.random.default_rng(0)
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    layer = "model.layers.0."
    for name in ("q", "k", "v", "o"):
        sizes[f"{layer}self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
    sizes |= {f"{layer}mlp.{name}_proj.weight": (FFN, HIDDEN) for name in ("gate", "up")}
    sizes[f"{layer}mlp.down_proj.weight"] = (HIDDEN, FFN)
    sizes |= {f"{layer}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    folder = tmp_path / "tiny"
    folder.mkdir()
    save_file(
        {name: rng.standard_normal(size, dtype=np.float32) for name, size in sizes.items()},
        folder / "model.safetensors",
    )
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5},
        **{"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": 1, "vocab_size": VOCAB},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128},
        **{"tie_word_embeddings": True, "rope_theta": 10000.0},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def last_object(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    value: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return value


def test_compress_show_and_verify(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = checkpoint.parent / "out"
    assert main(["compress", str(checkpoint), "-o", str(out), "--group", "64", "--json"]) == 0
    about = last_object(capsys)
    assert (about["family"], about["points"]) == ("llama", ["int8", "int4"])
    assert main(["show", str(out), "--verify", "--tensors", "--json"]) == 0
    shown = last_object(capsys)
    assert shown["verified"] is True
    assert shown["recipe"]["group"] == 64  # type: ignore[index]
    assert any(row["encoding"] == "planes+lo" for row in shown["tensors"])  # type: ignore[attr-defined]
    assert main(["show", "--model", str(out)]) == 0
    assert "llama" in capsys.readouterr().out


def test_compress_keeps_codes_where_it_is_asked_to(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """This checkpoint holds floats, which `exact` treats as `nested` does; the recipe says which was asked for."""
    out = checkpoint.parent / "out"
    assert main(["compress", str(checkpoint), "-o", str(out), "--scheme", "exact", "--json"]) == 0
    about = last_object(capsys)
    assert about["points"] == ["int8", "int4"]
    assert about["recipe"]["scheme"] == "exact"  # type: ignore[index]
    assert main(["compress", str(checkpoint), "-o", str(out), "--scheme", "exact", "--no-lo", "--force"]) == 2


def test_compress_without_the_second_plane_and_over_an_old_one(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(checkpoint.parent / "out")
    assert main(["compress", str(checkpoint), "--output", out, "--scheme", "full", "--quiet"]) == 0
    assert main(["compress", str(checkpoint), "--output", out, "--no-lo"]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["compress", str(checkpoint), "--output", out, "--no-lo", "--force"]) == 0
    assert "points int4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--group", "48"],
        ["--lo-shift", "9"],
        ["--scheme", "int3"],
        ["--scheme", "full", "--no-lo"],
        ["--scheme", "bf16", "--lo-shift", "3"],
        ["--prune", "0.5"],
    ],
)
def test_compress_refuses(checkpoint: Path, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    out = checkpoint.parent / "out"
    assert main(["compress", str(checkpoint), "-o", str(out), *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not out.exists()


def test_a_damaged_artifact_is_found_by_verify(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = checkpoint.parent / "out"
    assert main(["compress", str(checkpoint), "-o", str(out), "--quiet"]) == 0
    model = out / "model.haomiao"
    data = bytearray(model.read_bytes())
    with Artifact.open(out) as artifact:
        body = next(section for section in artifact.sections if section.rows > 1)
    data[body.offset + body.bytes // 2] ^= 1
    model.write_bytes(data)
    assert main(["show", str(out), "--verify"]) == 2
    assert "checksum" in capsys.readouterr().err


def test_pull_ls_rm(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == 0
    assert "no prepared models" in capsys.readouterr().err
    assert main(["pull", str(checkpoint), "--json"]) == 0
    pulled = last_object(capsys)
    assert main(["ls", "--json"]) == 0
    (listed,) = last_object(capsys)["models"]  # type: ignore[misc]
    assert (listed["name"], listed["points"]) == (pulled["name"], ["int8", "int4"])  # type: ignore[index]
    name = str(pulled["name"])
    assert main(["ls"]) == 0
    assert name in capsys.readouterr().out
    assert main(["show", name, "--verify", "--json"]) == 0
    assert last_object(capsys)["name"] == name
    assert main(["rm", name, "--json"]) == 0
    assert last_object(capsys)["removed"] == [name]
    assert main(["rm", name]) == 2
    assert main(["rm", "../tiny"]) == 2
    assert checkpoint.exists()


def test_show_of_a_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(checkpoint), "--json"]) == 0
    about = last_object(capsys)
    assert (about["kind"], about["types"]) == ("checkpoint", {"f32": 11})
    assert main(["show", str(checkpoint), "--verify"]) == 2
    assert main(["show", str(checkpoint.parent / "nothing")]) == 2


@pytest.mark.parametrize("command", [["pull"], ["compress", "-o", "out"]])
def test_a_model_is_needed(checkpoint: Path, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    assert main(command) == 2
    assert "no MODEL" in capsys.readouterr().err
