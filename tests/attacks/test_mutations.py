"""Random damage to good files of all three formats: refused in one line, or harmless; never anything else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.attacks.hostile import (
    good_artifact,
    good_gguf,
    good_safetensors,
    hostile_gguf,
    hostile_safetensors,
    open_artifact,
    read_all,
    sealed,
    survives,
)

INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 60, (1 << 63) - 1, (1 << 64) - 1]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "cut"]),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from([1, 2, 4, 8]),
        st.one_of(st.sampled_from(INTERESTING), st.integers(0, (1 << 64) - 1)),
    ),
    min_size=1,
    max_size=6,
)
BOUNDED = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def damaged(data: bytes, edits: list[tuple[str, float, int, int]], region: int) -> bytes:
    """Apply the edits inside the first `region` bytes."""
    out = bytearray(data)
    for kind, where, size, value in edits:
        at = int(where * min(region, len(out)))
        raw = (value % (1 << (8 * size))).to_bytes(size, "little")
        if kind == "set":
            out[at : at + size] = raw
        elif kind == "insert":
            out[at:at] = raw
        elif kind == "delete":
            del out[at : at + size]
        else:
            del out[at:]
    return bytes(out)


@BOUNDED
@given(edits=EDITS)
def test_safetensors(tmp_path: Path, edits: list[tuple[str, float, int, int]]) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(damaged(good_safetensors(), edits, 400))
    error = survives(lambda: read_all(tmp_path))
    assert error is None or str(tmp_path) in str(error)


@BOUNDED
@given(edits=EDITS)
def test_gguf(tmp_path: Path, edits: list[tuple[str, float, int, int]]) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(damaged(good_gguf(), edits, 2000))
    error = survives(lambda: read_all(path))
    assert error is None or "x.gguf" in str(error) or "x:" in str(error)


@BOUNDED
@given(edits=EDITS, seal=st.booleans())
def test_artifact(tmp_path: Path, edits: list[tuple[str, float, int, int]], seal: bool) -> None:
    data = bytearray(damaged(good_artifact(tmp_path / "m"), edits, 1600))
    (tmp_path / "m" / "model.haomiao").write_bytes(sealed(data) if seal else bytes(data))
    error = survives(lambda: open_artifact(tmp_path / "m"))
    assert error is None or str(tmp_path / "m") in str(error)


LIMITED = """
import resource, sys
from pathlib import Path
from haomiao.errors import HaomiaoError
from haomiao.load.gguf.source import GgufSource
from haomiao.load.checkpoint import Checkpoint
from haomiao.load.artifact import Artifact
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20),) * 2)
count = 0
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        source = GgufSource(path) if path.suffix == ".gguf" else Checkpoint(path)
        for name in source.names():
            source.read(name)
    except HaomiaoError:
        count += 1
print(count)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_hostile_file_needs_memory(tmp_path: Path) -> None:
    """All of them in one process that may take 32 MiB more than it has after its imports."""
    count = 0
    for i, (_, data) in enumerate(hostile_gguf()):
        (tmp_path / f"{i}.gguf").write_bytes(data)
        count += 1
    for i, (_, data) in enumerate(hostile_safetensors()):
        folder = tmp_path / f"d{i}"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(data)
        count += 1
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout) == count
