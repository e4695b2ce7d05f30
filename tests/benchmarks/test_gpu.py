"""The GPU benchmark without a GPU: its models' bytes, its self-check in Triton's interpreter, its refusal."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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

    monkeypatch.setattr(launch, "BLOCKS", launch.Blocks(gemv_rows=128, gemm_rows=128))
    monkeypatch.setattr(check, "SIZES", ((40, 64),))
    monkeypatch.setattr(check, "FUSED", (40, 64))
    monkeypatch.setattr(check, "TOKENS", (1, 3))
    said: list[str] = []
    short: Any = [each for each in check.checks(CPU) if not each[0].startswith(("steps", "graph", "greatest"))]
    monkeypatch.setattr(check, "checks", lambda device: [*short, ("broken", 1.0, lambda: 1 / 0)])
    found = check.run_checks(CPU, said.append)
    assert [each["name"] for each in found if not each["ok"]] == ["broken"] and "ZeroDivisionError" in said[-1]
    assert len(found) == len(said) == 2 * len(check.LINEAR) + 5
    assert fast.BUCKETS[-1] >= 64


def test_baselines_compute() -> None:
    """The decoder in the manner of gpt-fast, uncompiled, on the CPU: positions matter, shapes are right."""
    from gpulib import baselines

    with torch.inference_mode():
        decoder = baselines.Decoder("tiny", 2, 16, False, CPU)
        token = torch.ones(2, 1, dtype=torch.long)
        assert decoder(token, torch.tensor([16])).shape == (2,)
        assert decoder.k[0, :, :, 16].abs().sum() > 0 and decoder.k[0, :, :, 17].abs().sum() == 0
