"""Hostile safetensors files and model directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.hostile import assert_refused, good_safetensors, hostile_safetensors, read_all, survives
from tests.load.checkpoints import safetensors_bytes, write_model

CASES = list(hostile_safetensors())


def directory(tmp_path: Path, data: bytes) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("data", [data for _, data in CASES], ids=[name for name, _ in CASES])
def test_every_field(tmp_path: Path, data: bytes) -> None:
    path = directory(tmp_path, data)
    message = assert_refused(lambda: read_all(path), len(data))
    assert "model.safetensors" in message


def test_truncated_anywhere(tmp_path: Path) -> None:
    good = good_safetensors()
    for size in range(len(good)):
        path = directory(tmp_path, good[:size])
        assert survives(lambda path=path: read_all(path)) is not None, f"cut at {size}"  # type: ignore[misc]


# ---- config.json and the index --------------------------------------------------------------------------------------

CONFIGS = {
    "empty": b"",
    "not JSON": b"{model_type: llama}",
    "a list": b"[1]",
    "not UTF-8": b'{"a": "\xff"}',
    "NaN": b'{"rope_theta": NaN}',
    "infinite": b'{"rope_theta": 1e999}',
    "duplicate keys": b'{"hidden_size": 1, "hidden_size": 2}',
    "deep": b'{"a":' * 200 + b"1" + b"}" * 200,
    "very deep": b"[" * 1_000_000,
    "many values": b"[" + b"1," * 4_100_000 + b"1]",
    "too long": b'{"a": "' + b"x" * (17 << 20) + b'"}',
    "a lone surrogate in a key": b'{"\\ud800": 1, "\\ud800": 2}',
}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("data", list(CONFIGS.values()), ids=list(CONFIGS))
def test_json_files(tmp_path: Path, name: str, data: bytes) -> None:
    directory(tmp_path, good_safetensors())
    if name == "model.safetensors.index.json":
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(data)
    assert name in assert_refused(lambda: read_all(tmp_path), len(data) + (16 << 20))


SHARDS: list[Any] = [
    "../model.safetensors", "/etc/passwd.safetensors", "a/b.safetensors", "..", "", ".", "model.bin", "model.pt",
    "absent.safetensors", "model\0.safetensors", "model.safetensors\n", "C:\\x.safetensors", "~/x.safetensors",
    1, None, ["a.safetensors"], "x" * 300 + ".safetensors", "..safetensors/../../x.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("shard", SHARDS, ids=[repr(shard)[:30] for shard in SHARDS])
def test_shard_names(tmp_path: Path, shard: Any) -> None:
    inside = tmp_path / "m"
    inside.mkdir()
    (inside / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(good_safetensors())
    (inside / "model.bin").write_bytes(b"\x80\x04")
    index = {"weight_map": {"model.norm.weight": shard}}
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(lambda: read_all(inside), 1000)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", {"absent.weight": "model-00001-of-00002.safetensors"}])
def test_weight_maps(tmp_path: Path, weight_map: Any) -> None:
    import numpy as np

    write_model(tmp_path, {f"t{i}": np.ones(3, np.float32) for i in range(4)}, {}, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_refused(lambda: read_all(tmp_path), 1000)


def test_a_shard_that_is_a_link_out(tmp_path: Path) -> None:
    inside = tmp_path / "m"
    directory_of = write_model(inside, {}, {})
    (tmp_path / "secret.safetensors").write_bytes(safetensors_bytes({}))
    (directory_of / "model.safetensors").unlink()
    (directory_of / "model.safetensors").symlink_to("../secret.safetensors")
    assert "leads out" in assert_refused(lambda: read_all(inside), 1000)


def test_what_is_not_a_regular_file(tmp_path: Path) -> None:
    import os

    directory(tmp_path, b"")
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    assert "regular file" in assert_refused(lambda: read_all(tmp_path), 1000), "and the reader did not hang"
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    assert_refused(lambda: read_all(tmp_path), 1000)
