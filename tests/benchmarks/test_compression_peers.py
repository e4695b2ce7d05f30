"""The comparison of compressors: memory is watched from outside, a failure and a run without end are said."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "compression_peers.py"


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compression_peers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_run_is_watched(peers: ModuleType) -> None:
    code = "import time; block = bytearray(64 << 20); time.sleep(0.5); print('noise'); print('{\"version\": \"1\"}')"
    found = peers.watch([sys.executable, "-c", code], threads=1, limit_s=60)
    assert found["version"] == "1"
    assert 64 <= found["peak_anonymous_mib"] <= found["peak_mib"] < 1024
    assert found["seconds"] >= 0.5


def test_failures_and_endless_runs_are_said(peers: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no such model"):
        peers.watch([sys.executable, "-c", "raise SystemExit('no such model')"], threads=1, limit_s=60)
    with pytest.raises(SystemExit, match="longer than"):
        peers.watch([sys.executable, "-c", "import time; time.sleep(60)"], threads=1, limit_s=0.1)
    assert peers.memory(os.getpid() + (1 << 22)) == {}
