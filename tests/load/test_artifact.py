"""Artifacts come back as they went in, are whole or absent, and say what is wrong with them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from haomiao.errors import ArtifactError, InputError, ModelNotFoundError, UnavailableError
from haomiao.kernels.pack import unpack
from haomiao.kernels.packed import Encoding, PackedTensor, padded_columns, tile_bytes
from haomiao.load import artifact_writer
from haomiao.load.artifact import Artifact, ArtifactWriter

CASES: list[tuple[Encoding, int, int, int, bool, int]] = [
    ("f32", 33, 7, 0, False, 0),
    ("bf16", 32, 31, 0, False, 0),
    ("int8", 1, 100, 32, False, 0),
    ("int8", 64, 128, 128, False, 0),
    ("planes", 70, 100, 64, False, 0),
    ("planes", 70, 100, 32, True, 4),
    ("planes", 31, 129, 128, True, 1),
]


def random_tensor(encoding: Encoding, rows: int, cols: int, group: int, lo: bool, lo_shift: int) -> PackedTensor:
    """Random codes under scales of 1; for f32 and bf16 the bytes of small finite numbers."""
    rng = np.random.default_rng(rows * cols)
    padded, tiles = padded_columns(encoding, cols, group), -(-rows // 32)
    hi_bytes, lo_bytes = tile_bytes(encoding, padded, group)
    hi = rng.integers(0, 0x3F, tiles * hi_bytes).astype(np.uint8)
    if encoding in ("int8", "planes"):
        size, _ = tile_bytes(encoding, group, group)
        hi.reshape(-1, size)[:, :64].view("<f2")[:] = 1
    low = rng.integers(0, 256, tiles * lo_bytes).astype(np.uint8) if lo else None
    return PackedTensor(encoding, rows, cols, group, lo_shift, hi, low)


def write(directory: Path, **options: int) -> dict[str, PackedTensor]:
    tensors = {f"w{i}": random_tensor(*case) for i, case in enumerate(CASES)}
    with ArtifactWriter(directory, **options) as writer:  # type: ignore[arg-type]
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        writer.add_vector("norm", np.arange(5, dtype=np.float32))
        writer.add_file("tokenizer.json", b"{}")
        writer.finish({"config": {"model_type": "llama"}, "points": ["int8"], "name": "毫秒"})
    return tensors


@pytest.mark.parametrize("hugepages", [False, True])
@pytest.mark.parametrize("reserved", [0, 64, 1 << 20])
def test_round_trip(tmp_path: Path, hugepages: bool, reserved: int) -> None:
    tensors = write(tmp_path / "m", reserved_header=reserved)
    with Artifact.open(tmp_path / "m", hugepages=hugepages) as artifact:
        artifact.verify()
        assert artifact.meta["name"] == "毫秒"
        assert list(artifact.tensors) == list(tensors)
        assert np.array_equal(artifact.vectors["norm"], np.arange(5, dtype=np.float32))
        assert artifact.files["tokenizer.json"].read_bytes() == b"{}"
        for name, tensor in tensors.items():
            read = artifact.tensors[name]
            assert (read.encoding, read.rows, read.cols, read.group, read.lo_shift) == (
                tensor.encoding,
                tensor.rows,
                tensor.cols,
                tensor.group,
                tensor.lo_shift,
            )
            assert np.array_equal(read.hi, tensor.hi)
            assert not read.hi.flags.writeable
            assert read.hi.ctypes.data % 64 == 0
            assert (read.lo is None) == (tensor.lo is None)
            if read.lo is not None and tensor.lo is not None:
                assert np.array_equal(read.lo, tensor.lo)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_views_outlive_close(tmp_path: Path) -> None:
    tensors = write(tmp_path / "m")
    artifact = Artifact.open(tmp_path / "m")
    view = artifact.tensors["w0"].hi
    artifact.close()
    artifact.close()
    assert np.array_equal(view, tensors["w0"].hi)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("case", CASES)
def test_scales_that_are_not_finite_are_refused(
    tmp_path: Path, value: float, case: tuple[Encoding, int, int, int, bool, int]
) -> None:
    tensor = random_tensor(*case)
    if tensor.encoding == "f32":
        tensor.hi.view("<f4")[-1] = value
    elif tensor.encoding == "bf16":
        tensor.hi.view("<u2")[-1] = np.array(value, "<f4").view("<u4") >> 16
    else:
        size, _ = tile_bytes(tensor.encoding, tensor.group, tensor.group)
        tensor.hi.reshape(-1, size)[-1, :64].view("<f2")[-1] = value
    with ArtifactWriter(tmp_path / "m") as writer:
        with pytest.raises(ArtifactError, match="NaN or infinite"):
            writer.add_tensor("w", tensor)
        with pytest.raises(ArtifactError, match="NaN or infinite"):
            writer.add_vector("v", np.array([1, value], np.float32))
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ArtifactWriter(tmp_path / "m") as writer:
        writer.add_vector("v", np.ones(3, np.float32))
        raise RuntimeError("conversion failed")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifact_writer, "_flush", full)
    with pytest.raises(UnavailableError, match="no room"), ArtifactWriter(tmp_path / "m") as writer:
        writer.add_vector("v", np.ones(3, np.float32))
        writer.finish({})
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_writer_are_removed_and_a_live_one_is_not(tmp_path: Path) -> None:
    code = (
        "import os, sys; from haomiao.load.artifact import ArtifactWriter; "
        "w = ArtifactWriter(sys.argv[1]); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], check=False, env=dict(os.environ))
    assert len(list(tmp_path.iterdir())) == 1
    with ArtifactWriter(tmp_path / "m") as first:
        assert len(list(tmp_path.iterdir())) == 1, "the dead writer's directory is gone"
        with ArtifactWriter(tmp_path / "m"):
            assert len(list(tmp_path.iterdir())) == 2, "the live writer's is not"
        first.finish({})
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_overwrite_replaces_an_artifact_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "m")
    with pytest.raises(InputError, match="exists"):
        ArtifactWriter(tmp_path / "m")
    with ArtifactWriter(tmp_path / "m", overwrite=True) as writer:
        writer.add_vector("only", np.ones(3, np.float32))
        writer.finish({})
    with Artifact.open(tmp_path / "m") as artifact:
        assert list(artifact.vectors) == ["only"] and not artifact.tensors and not artifact.files
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("dear to someone")
    with pytest.raises(InputError, match="not an artifact"):
        ArtifactWriter(tmp_path / "home", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "m"]


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "model.haomiao", "a\0b", "x" * 300])
def test_file_names_stay_inside(tmp_path: Path, name: str) -> None:
    with ArtifactWriter(tmp_path / "m") as writer, pytest.raises(ArtifactError, match="not a name"):
        writer.add_file(name, b"")


def test_names_are_unique_and_sizes_agree(tmp_path: Path) -> None:
    tensor = random_tensor("f32", 3, 3, 0, False, 0)
    with ArtifactWriter(tmp_path / "m") as writer:
        writer.add_tensor("w", tensor)
        with pytest.raises(ArtifactError, match="twice"):
            writer.add_vector("w", np.ones(3, np.float32))
        with pytest.raises(ArtifactError, match="implies"):
            writer.add_tensor("x", PackedTensor("f32", 3, 4, 0, 0, tensor.hi))
        with pytest.raises(ArtifactError, match="lo_shift"):
            writer.add_tensor("y", PackedTensor("f32", 3, 3, 0, 2, tensor.hi))
        with pytest.raises(ArtifactError, match=r"JSON compliant|NaN"):
            writer.finish({"x": float("nan")})


def test_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        Artifact.open(tmp_path)


def test_verify_names_the_section(tmp_path: Path) -> None:
    write(tmp_path / "m")
    with Artifact.open(tmp_path / "m") as artifact:
        where = next(s for s in artifact.sections if s.name == "w5" and s.plane == 1)
    path = tmp_path / "m" / "model.haomiao"
    data = bytearray(path.read_bytes())
    data[where.offset + 7] ^= 1
    path.write_bytes(data)
    with Artifact.open(tmp_path / "m") as artifact, pytest.raises(ArtifactError, match="'w5': the checksum"):
        artifact.verify()


def masked_tensor() -> PackedTensor:
    """Nested planes [70, 100] of group 32, blocks (0, 1) and (2, 3) of zero codes."""
    tensor = random_tensor("planes", 70, 100, 32, True, 4)
    assert tensor.lo is not None
    hi, lo = tensor.hi.reshape(3, 4, -1), tensor.lo.reshape(3, 4, -1)
    for tile, group in ((0, 1), (2, 3)):
        hi[tile, group, 64:] = 0x88
        lo[tile, group] = 0x88
    return tensor


def test_empty_blocks_are_left_out_and_come_back_as_zeros(tmp_path: Path) -> None:
    tensor = masked_tensor()
    with ArtifactWriter(tmp_path / "m") as writer:
        writer.add_tensor("w", tensor)
        with pytest.raises(ArtifactError, match="twice"):
            writer.add_vector("w.tiles", np.ones(3, np.float32))
        writer.finish({})
    with Artifact.open(tmp_path / "m") as artifact:
        artifact.verify()
        assert [(s.kind, s.name, s.stored) for s in artifact.sections[:2]] == [(4, "w.tiles", 10), (2, "w", 0)]
        read = artifact.tensors["w"]
        assert list(artifact.tensors) == ["w"]
        assert read.nbytes == 10 * (64 + 512 + 512)
        assert np.array_equal(np.argwhere(~read.stored), [[0, 1], [2, 3]])
        for planes in ("hi", "hi+lo"):
            assert np.array_equal(unpack(read, planes), unpack(tensor, planes))


def test_a_mask_that_contradicts_the_header_is_refused(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "m") as writer:
        writer.add_tensor("w", masked_tensor())
        writer.finish({})
    with Artifact.open(tmp_path / "m") as artifact:
        where = artifact.sections[0].offset
    path = tmp_path / "m" / "model.haomiao"
    good = path.read_bytes()
    for byte in (0x0F, 0x05, 0x1D):  # one group more, one less, one that does not exist
        data = bytearray(good)
        assert data[where] == 0x0D
        data[where] = byte
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=r"'w.tiles' contradicts itself"):
            Artifact.open(tmp_path / "m")
