"""Model directories: what is in the files comes out as float32, and nothing outside of them is touched."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from haomiao.errors import InputError, ModelError, ModelNotFoundError
from haomiao.load.source import TensorSource, open_source
from tests.load.checkpoints import safetensors_bytes, to_bf16, write_model

RNG = np.random.default_rng(1)
WEIGHTS = RNG.standard_normal((6, 10)).astype(np.float32)
CONFIG = {"model_type": "llama", "hidden_size": 10}


def tensors() -> dict[str, np.ndarray]:
    return {
        "model.embed_tokens.weight": WEIGHTS,
        "model.norm.weight": WEIGHTS[0].astype(np.float16),
        "lm_head.weight": to_bf16(WEIGHTS),
        "model.rotary.position_ids": np.arange(7, dtype=np.int64),
    }


def check(source: TensorSource) -> None:
    assert sorted(source.names()) == sorted(tensors())
    assert source.shape("lm_head.weight") == (6, 10)
    assert [source.dtype(name) for name in tensors()] == ["f32", "f16", "bf16", "i64"]
    assert np.array_equal(source.read("model.embed_tokens.weight"), WEIGHTS)
    assert np.array_equal(source.read("model.norm.weight"), WEIGHTS[0].astype(np.float16).astype(np.float32))
    assert np.abs(source.read("lm_head.weight") - WEIGHTS).max() <= np.abs(WEIGHTS).max() * 2**-7
    assert source.read("lm_head.weight").dtype == np.float32
    assert source.quantized("lm_head.weight") is None
    with pytest.raises(ModelError, match=r"position_ids.*I64"):
        source.read("model.rotary.position_ids")
    for wrong in (source.read, source.shape, source.dtype):
        with pytest.raises(ModelError, match="no tensor 'x'"):
            wrong("x")


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_single_and_sharded(tmp_path: Path, shards: int) -> None:
    source = open_source(write_model(tmp_path / "m", tensors(), CONFIG, shards))
    assert source.config["hidden_size"] == 10
    assert source.name == "m"
    check(source)
    source.close()
    source.close()


@pytest.mark.parametrize("pad", range(8))
def test_tensors_that_are_not_aligned(tmp_path: Path, pad: int) -> None:
    write_model(tmp_path, tensors(), CONFIG)
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(tensors(), pad))
    check(open_source(tmp_path / "model.safetensors"))


def test_text_files_and_generation_config(tmp_path: Path) -> None:
    write_model(tmp_path, tensors(), CONFIG)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit")
    source = open_source(str(tmp_path))
    assert set(source.files) == {"tokenizer.json", "generation_config.json"}
    assert source.config["generation_config"] == {"eos_token_id": [1, 2]}


def test_auto_map_is_not_touched(tmp_path: Path) -> None:
    write_model(tmp_path, tensors(), {**CONFIG, "auto_map": {"AutoModel": "modeling_evil.Model"}})
    (tmp_path / "modeling_evil.py").write_text("import sys; sys.exit(3)")
    check(open_source(tmp_path))


def test_identity_changes_with_the_files(tmp_path: Path) -> None:
    write_model(tmp_path, tensors(), CONFIG)
    before = open_source(tmp_path).identity
    assert open_source(tmp_path).identity == before
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": 11}))
    assert open_source(tmp_path).identity != before


@pytest.mark.parametrize(
    ("stored", "seen"),
    [
        (["embed_tokens.weight", "layers.0.x.weight"], ["model.embed_tokens.weight", "model.layers.0.x.weight"]),
        (["wte.weight", "h.0.ln_1.weight"], ["transformer.wte.weight", "transformer.h.0.ln_1.weight"]),
        (["language_model.model.norm.weight"], ["model.norm.weight"]),
        (["model.language_model.norm.weight", "lm_head.weight"], ["model.norm.weight", "lm_head.weight"]),
    ],
)
def test_names_of_bare_and_multimodal_checkpoints(tmp_path: Path, stored: list[str], seen: list[str]) -> None:
    source = open_source(write_model(tmp_path, {name: WEIGHTS for name in stored}, CONFIG))
    assert list(source.names()) == seen
    assert np.array_equal(source.read(seen[0]), WEIGHTS)


def test_a_hub_snapshot_may_link_to_its_blobs(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    write_model(repo / "blobs", tensors(), CONFIG)
    snapshot = repo / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    check(open_source(snapshot))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_links_out_of_the_directory_are_refused(tmp_path: Path, name: str) -> None:
    directory = write_model(tmp_path / "m", tensors(), CONFIG)
    (directory / name).unlink(missing_ok=True)
    (tmp_path / name).write_text("{}")
    (directory / name).symlink_to(tmp_path / name)
    with pytest.raises(ModelError, match="leads out"):
        open_source(directory)
    (directory / name).unlink()
    (directory / name).symlink_to(name)  # to itself
    with pytest.raises(ModelError):
        open_source(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(ModelError, match=f"{name}.*never loaded"):
        open_source(tmp_path)
    with pytest.raises(ModelError, match="never loaded"):
        open_source(tmp_path / name)


def test_what_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no safetensors"):
        open_source(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(safetensors_bytes(tensors()))
    with pytest.raises(ModelError, match=r"2 safetensors.*index"):
        open_source(tmp_path)
    check(open_source(tmp_path / "a.safetensors"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match="neither"):
        open_source(tmp_path / "notes.txt")
    with pytest.raises(ModelNotFoundError):
        open_source(tmp_path / "absent")
    for name in ("", "a\0b"):
        with pytest.raises(InputError):
            open_source(name)
    with pytest.raises(ModelNotFoundError):
        open_source("x" * 5000)
    (tmp_path / "model.haomiao").write_bytes(b"")
    with pytest.raises(InputError, match="artifact"):
        open_source(tmp_path)


def test_a_directory_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    write_model(tmp_path, tensors(), CONFIG)
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ModelError, match="Permission denied"):
        open_source(tmp_path)


def test_stories260k(shared: Path) -> None:
    source = open_source(shared / "data" / "stories260K" / "hf")
    assert source.config["model_type"] == "llama"
    assert source.read("model.embed_tokens.weight").shape == (512, 64)
    assert "tokenizer.model" in source.files
