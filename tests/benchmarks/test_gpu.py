"""The GPU benchmark without a GPU: its models' bytes, its self-check in Triton's interpreter, its refusal."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
torch = pytest.importorskip("torch", reason="torch is not installed")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpulib import shapes  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_in_one_line() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "check"], cwd=BENCHMARKS.parent, capture_output=True, text=True
    )
    missing = "--device cuda" if importlib.util.find_spec("triton") else "Triton missing"
    assert run.returncode == 7 and run.stderr.count("\n") == 1 and missing in run.stderr


def test_bytes_of_a_step() -> None:
    planes, floats = (shapes.make("tiny", storage, CPU, kv_blocks=2) for storage in ("planes", "bf16"))
    weights = planes.matrix_weights
    head = 1000 * 256
    kv = 10 * planes.model.kv_bytes_per_block // 32
    assert planes.model.kv_bytes_per_block == 2 * 2 * 2 * 32 * 64 * 2
    assert floats.step_bytes("bf16", 1, 10) == 2 * (weights + head) + kv
    assert planes.step_bytes("int8", 1, 10) == weights + head + 2 * (weights + head) // 32 + kv
    assert planes.step_bytes("int4-w", 1, 10) == planes.step_bytes("int8", 1, 10) - weights // 2
    assert set(shapes.CONFIGS) == {"tiny", "0.5b", "1b", "8b"}


def test_the_check_passes_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from gpulib import check

    from haomiao.engine.executors.torch import fast, launch

    monkeypatch.setattr(launch, "BLOCKS", launch.Blocks(gemv_bytes=1 << 20, gemv_most=128, gemm_rows=128))
    monkeypatch.setattr(check, "SIZES", ((40, 64),))
    monkeypatch.setattr(check, "TOKENS", (1, 3))
    said: list[str] = []
    linear = {name: each for name, each in check.groups(CPU).items() if name.startswith("linear")}
    for name in linear:
        assert check.run_group(name, CPU, said.append)
    assert len(linear) == len(check.LINEAR) and len(said) == 2 * len(linear)
    monkeypatch.setattr(check, "groups", lambda device: {"odd": [("broken", 1.0, lambda: 1 / 0), *linear[name]]})
    assert not check.run_group("odd", CPU, said.append)
    assert "ZeroDivisionError" in said[-3] and json.loads(said[-1])["ok"]
    assert fast.BUCKETS[-1] >= 64


def test_what_was_tuned_is_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate computes in the same way once it is adopted, whatever the size of the matrix."""
    pytest.importorskip("triton", reason="triton is not installed")
    from gpulib import tuning

    from haomiao.engine.executors.torch import launch

    matrix = shapes.random_matrix(40, 64, "planes", torch.Generator().manual_seed(0), CPU)
    row = {"encoding": 3, "rows": 40, "cols": 64, "point": "int4-w", "m": 8}
    ways = set()
    for blocks in tuning.candidates(8, "planes"):
        monkeypatch.setattr(launch, "BEST", {})
        monkeypatch.setattr(launch, "BLOCKS", launch.Blocks(**blocks))
        measured = launch.is_dense(matrix, 3, 1, 8)
        monkeypatch.setattr(launch, "BLOCKS", launch.Blocks())
        (tmp_path / "tune.jsonl").write_text(json.dumps(row | {"best": blocks | {"us": 1.0}}))
        assert tuning.adopt(tmp_path / "tune.jsonl") == 1
        assert launch.is_dense(matrix, 3, 1, 8) == measured
        ways.add(measured)
    assert ways == {True, False}


def test_baselines_compute() -> None:
    """The decoder in the manner of gpt-fast, uncompiled, on the CPU: positions matter, shapes are right."""
    from gpulib import baselines

    with torch.inference_mode():
        decoder = baselines.Decoder("tiny", 2, 16, False, CPU)
        token = torch.ones(2, 1, dtype=torch.long)
        assert decoder(token, torch.tensor([16])).shape == (2,)
        assert decoder.k[0, :, :, 16].abs().sum() > 0 and decoder.k[0, :, :, 17].abs().sum() == 0
