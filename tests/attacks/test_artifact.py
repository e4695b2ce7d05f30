"""Hostile artifacts: the header's fields one by one (native/tests/test_artifact.cc tests them again, natively)."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from haomiao.errors import ArtifactError
from haomiao.load.artifact import Artifact, ArtifactWriter
from tests.attacks.hostile import HUGE, assert_refused, good_artifact, open_artifact, sealed, survives

FIXED = {"magic": (0, 8), "major": (8, 2), "header_bytes": (12, 4), "file_bytes": (16, 8), "sections": (24, 4)}
ENTRY = {
    "kind": (0, 4),
    "name_offset": (8, 4),
    "name_bytes": (12, 4),
    "offset": (16, 8),
    "bytes": (24, 8),
    "encoding": (36, 4),
    "plane": (40, 4),
    "group": (44, 4),
    "lo_shift": (48, 4),
    "rows": (52, 4),
    "cols": (56, 4),
    "padded_cols": (60, 4),
    "tile_bytes": (64, 8),
}
VALUES = (0xFF, 0xFFFF, 1 << 20, *(size & 0xFFFFFFFF for size in HUGE), *HUGE)


def put(data: bytes, at: int, size: int, value: int) -> bytes:
    changed = bytearray(data)
    changed[at : at + size] = (value % (1 << (8 * size))).to_bytes(size, "little")
    return bytes(changed)


@pytest.mark.parametrize("name", list(FIXED))
def test_fixed_fields(tmp_path: Path, name: str) -> None:
    good = good_artifact(tmp_path / "m")
    at, size = FIXED[name]
    for value in VALUES:
        data = put(good, at, size, value)
        if data == good:
            continue
        for variant in (data, sealed(bytearray(data))):
            (tmp_path / "m" / "model.haomiao").write_bytes(variant)
            assert_refused(lambda: open_artifact(tmp_path / "m"), len(good))


@pytest.mark.parametrize("name", list(ENTRY))
@pytest.mark.parametrize("section", [0, 4, 5, 6, 7, 9, 10])
def test_entry_fields(tmp_path: Path, name: str, section: int) -> None:
    good = good_artifact(tmp_path / "m")
    at, size = ENTRY[name]
    for value in VALUES:
        data = sealed(bytearray(put(good, 64 + 128 * section + at, size, value)))
        if data == good:
            continue
        (tmp_path / "m" / "model.haomiao").write_bytes(data)
        assert_refused(lambda: open_artifact(tmp_path / "m"), len(good))


def test_truncated_and_extended(tmp_path: Path) -> None:
    good = good_artifact(tmp_path / "m")
    header = struct.unpack_from("<I", good, 12)[0]
    for size in [*range(0, header, 3), *range(header, len(good), 1999), len(good) - 1]:
        (tmp_path / "m" / "model.haomiao").write_bytes(good[:size])
        assert survives(lambda: open_artifact(tmp_path / "m")) is not None, f"cut at {size}"
    (tmp_path / "m" / "model.haomiao").write_bytes(good + b"\0")
    assert "its header says" in assert_refused(lambda: open_artifact(tmp_path / "m"), len(good))


def test_wrong_checksums(tmp_path: Path) -> None:
    good = good_artifact(tmp_path / "m")
    header = struct.unpack_from("<I", good, 12)[0]
    for at in range(0, header, 13):
        (tmp_path / "m" / "model.haomiao").write_bytes(put(good, at, 1, good[at] ^ 1))
        assert_refused(lambda: open_artifact(tmp_path / "m"), len(good))
    with Artifact.open(good_directory(tmp_path, good)) as artifact:
        bodies = [(s.name, s.offset, s.bytes) for s in artifact.sections]
    for name, offset, size in bodies:
        (tmp_path / "m" / "model.haomiao").write_bytes(put(good, offset + size // 2, 1, good[offset + size // 2] ^ 1))
        message = assert_refused(lambda: open_artifact(tmp_path / "m"), len(good))
        assert f"'{name}'" in message or name == "meta"


def good_directory(tmp_path: Path, good: bytes) -> Path:
    (tmp_path / "m" / "model.haomiao").write_bytes(good)
    return tmp_path / "m"


@pytest.mark.parametrize("meta", [b"", b"[]", b"{", b"\xff", b'{"a":NaN}', b'{"a":1,"a":2}', b"[" * 100_000])
def test_meta(tmp_path: Path, meta: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    from haomiao.load import artifact_writer

    monkeypatch.setattr(artifact_writer.json, "dumps", lambda *_, **__: meta.decode("latin-1"))
    with ArtifactWriter(tmp_path / "m") as writer:
        writer.finish({})
    with pytest.raises(ArtifactError, match="meta"):
        Artifact.open(tmp_path / "m")


def test_companions_are_not_followed(tmp_path: Path) -> None:
    good_artifact(tmp_path / "m")
    (tmp_path / "secret").write_text("x")
    (tmp_path / "m" / "tokenizer.json").symlink_to("../secret")
    with Artifact.open(tmp_path / "m") as artifact:
        assert "tokenizer.json" not in artifact.files
