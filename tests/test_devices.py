"""`--device` and `--executor`: what runs where, what is missing in one line, and torch left alone until asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from haomiao.api import LLM, devices
from haomiao.api.devices import Placement, place
from haomiao.cli.main import main
from haomiao.errors import InputError, UnavailableError
from haomiao.models.convert import convert
from tests.golden.cases import CASES
from tests.golden.checkpoint import DictSource, random_checkpoint

CASE = next(case for case in CASES if case.name == "qwen3-head32")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = DictSource(CASE.config, random_checkpoint(CASE.config, CASE.seed))
    return convert(source, tmp_path_factory.mktemp("devices") / "tiny", scheme="nested")


def test_what_runs_where() -> None:
    assert place(None, None) == place("native", "cpu") == Placement("native", "cpu")
    assert place("reference", None) == place("reference", "auto") == Placement("reference", "cpu")
    assert place(None, None).name == "native" and Placement("torch", "cuda").name == "torch-cuda"
    for executor, device, says in (("warp", None, "executor"), (None, "tpu", "device"), ("native", "cuda", "torch")):
        with pytest.raises(InputError, match=says):
            place(executor, device)


def test_auto_without_a_gpu_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "GPU_NODES", ("/no/such/node",))
    assert place(None, "auto") == Placement("native", "cpu")


def test_no_torch_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("haomiao.engine.executors.torch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("haomiao.engine.executors.torch", None, raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    for asked in ((None, "cuda"), ("torch", None)):
        with pytest.raises(UnavailableError, match=r"haomiao\[torch\]") as caught:
            place(*asked)
        assert "\n" not in str(caught.value) and caught.value.param == "device"


def test_no_gpu_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("HAOMIAO_DEVICE", "cuda")
    for argv in (["generate", "hi"], ["generate", "--device", "cuda", "hi"], ["bench"]):
        assert main(argv) == 7
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and "--device cuda: PyTorch" in errors


def test_the_gpu_takes_its_own_memory(monkeypatch: pytest.MonkeyPatch, artifact: Path) -> None:
    from haomiao.models.open import open_model

    opened = open_model(artifact)
    weights = sum(tensor.nbytes for tensor in opened.artifact.tensors.values())

    class Fake:
        free = weights + (1 << 30)

        def free_memory(self) -> int:
            return self.free

    monkeypatch.setattr(devices, "_devices", lambda asked: Fake())
    cuda = Placement("torch", "cuda")
    assert devices.kv_memory_on(cuda, opened, 77) == 77
    assert devices.kv_memory_on(Placement("torch", "cpu"), opened, None) is None
    assert devices.kv_memory_on(cuda, opened, None) == pytest.approx(0.8 * (1 << 30), rel=0.01)
    Fake.free = weights
    with pytest.raises(UnavailableError, match="weights"):
        devices.kv_memory_on(cuda, opened, None)


def test_torch_answers_as_the_reference(artifact: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    asked: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}
    with LLM(artifact, executor="reference") as reference, LLM(artifact, executor="torch") as second:
        assert second.points == ("int8", "int4-w", "int4") and reference.points == ("int8", "int4")
        assert second.point == "int8" and second.isa == "torch"
        for point in ("int8", "int4"):
            ours, theirs = (llm.generate([5, 6, 7], point=point, **asked) for llm in (second, reference))
            assert ours.token_ids == theirs.token_ids
    with LLM(artifact, executor="reference", point="int4-w") as reference:
        assert reference.point == "int4-w"
        with LLM(artifact, executor="torch", point="int4-w", speculate="self", monitor_rate=1.0) as second:
            ours, theirs = (llm.generate([5, 6, 7], **asked) for llm in (second, reference))
            assert ours.token_ids == theirs.token_ids
            assert {entry.point for entry in ours.receipt.schedule} == {"int4-w"}


def test_int4_w_needs_the_torch_executor(artifact: Path) -> None:
    with pytest.raises(InputError, match="--device cuda"):
        LLM(artifact, point="int4-w")


def test_answers_import_no_torch(artifact: Path) -> None:
    script = (
        f"import sys; from haomiao import LLM; LLM({str(artifact)!r}, device='cpu').generate([5, 6], max_tokens=2);"
        "sys.exit(any(name.split('.')[0] in ('torch', 'triton') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
