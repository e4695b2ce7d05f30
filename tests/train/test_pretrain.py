"""Pretraining: a toy language is learnt, a run that was stopped ends with the same bits, and what it writes opens."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from haomiao.api import LLM  # noqa: E402
from haomiao.errors import InputError, ModelError  # noqa: E402
from haomiao.load.source import open_source  # noqa: E402
from haomiao.models.registry import plan_for  # noqa: E402
from haomiao.train.graph import Graph  # noqa: E402
from haomiao.train.grow import Grown, origins  # noqa: E402
from haomiao.train.loop import read_log  # noqa: E402
from haomiao.train.optimizers import orthogonal  # noqa: E402
from haomiao.train.pretrain import main, pretrain  # noqa: E402
from haomiao.train.weights import read_weights, real_places  # noqa: E402
from tests.golden.cases import CASES, Case  # noqa: E402
from tests.golden.checkpoint import random_checkpoint, tokens_of  # noqa: E402
from tests.golden.make_goldens import HERE, ROWS  # noqa: E402
from tests.load.checkpoints import write_model  # noqa: E402
from tests.models.runs import relative_error  # noqa: E402
from tests.train.toy import MODEL, training, write_data  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert pretrain(training(), data, out)
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_family_computes_what_transformers_computes(case: Case, tmp_path: Path) -> None:
    write_model(tmp_path, random_checkpoint(case.config, case.seed), case.config)
    plan = plan_for(case.config, case.max_context)
    ids = torch.tensor([tokens_of(case)])
    with torch.no_grad():
        logits = Graph(plan).logits(read_weights(plan, open_source(tmp_path)), ids)[0].numpy()
    golden = np.load(HERE / f"{case.family}.npz")[f"{case.name}/logits"]
    assert relative_error(logits[list(ROWS)], golden) <= 1e-4


def test_a_toy_language_is_learnt_and_the_log_says_so(trained: Path) -> None:
    lines = read_log(trained)
    losses = [line["loss"] for line in lines if "loss" in line]
    valid = [line for line in lines if "valid_loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    assert [line["step"] for line in valid] == [0, 20, 40]
    assert valid[-1]["valid_zh_byte"] < 0.5 * valid[0]["valid_zh_byte"]
    assert all(line["tokens"] == line["step"] * 128 for line in lines if "tokens" in line)


def test_what_was_trained_opens_and_computes_the_same(trained: Path) -> None:
    ids = [5, 70, 80, 90, 100, 110]
    with LLM(str(trained / "model"), point="full", kv="f32", max_context=64) as llm:
        ours = np.array(llm.logits(ids))
        assert llm.generate("the red", max_tokens=4).text
    source = open_source(trained / "model")
    plan = plan_for(source.config)
    with torch.no_grad():
        theirs = Graph(plan).logits(read_weights(plan, source), torch.tensor([ids]))[0].numpy()
    assert relative_error(ours, theirs) <= 1e-4


def test_padded_neurons_stay_zero(trained: Path) -> None:
    from safetensors.torch import load

    newest = sorted(trained.glob("state-*"))[-1]
    tensors = load(b"".join(part.read_bytes() for part in sorted(newest.glob("tensors.*"))))
    plan = plan_for(json.loads((trained / "model" / "config.json").read_text()), 32)
    for spec in plan.weights.values():
        if spec.kind == "matrix":
            assert not tensors[f"weight/{spec.name}"][torch.from_numpy(real_places(spec)) == 0].any()


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon", "accumulate": 2}, {"precision": "bf16"}], ids=str)
def test_a_run_that_was_stopped_ends_with_the_same_bits(data: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    settings = training(steps=10, validate_every=5, **changes)
    assert pretrain(settings, data, tmp_path / "whole")
    assert not pretrain(settings, data, tmp_path / "parts", stop_after=3)  # between two lines of the log
    assert not pretrain(settings, data, tmp_path / "parts", stop_after=4)
    assert pretrain(settings, data, tmp_path / "parts")

    def said(folder: Path) -> list[dict[str, object]]:
        return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_log(folder)]

    assert said(tmp_path / "whole") == said(tmp_path / "parts")
    for name in ("whole", "parts"):
        assert len(list((tmp_path / name).glob("state-*"))) <= 2
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_a_signal_ends_the_step_and_keeps_it(data: Path, tmp_path: Path) -> None:
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    settings = training(steps=100_000, validate_every=100_000)
    timer.start()
    assert not pretrain(settings, data, tmp_path)
    step = json.loads((sorted(tmp_path.glob("state-*"))[-1] / "state.json").read_text())["step"]
    assert 0 < step < 100_000


def test_another_run_and_damage_are_refused(data: Path, tmp_path: Path) -> None:
    assert not pretrain(training(), data, tmp_path, stop_after=2)
    with pytest.raises(InputError, match=r"another run \(seed differ"):
        pretrain(training(seed=2), data, tmp_path)
    part = next(tmp_path.glob("state-*/tensors.000"))
    part.write_bytes(part.read_bytes()[:-1] + b"\0")
    with pytest.raises(ModelError, match="damaged"):
        pretrain(training(), data, tmp_path)
    assert not pretrain(training(seed=2), data, tmp_path, restart=True, stop_after=1)


def test_a_checkpoint_travels_in_parts_and_exports_at_any_time(data: Path, tmp_path: Path) -> None:
    big = training(model=MODEL | {"intermediate_size": 4096}, steps=2, warmup=1)
    assert not pretrain(big, data, tmp_path, stop_after=1)
    parts = list(next(tmp_path.glob("state-*")).glob("tensors.*"))
    assert len(parts) > 1
    assert max(part.stat().st_size for part in parts) <= 1 << 20
    assert pretrain(big, data, tmp_path, export_only=True)
    assert plan_for(open_source(tmp_path / "model").config).hidden_size == 32


def test_a_grown_model_begins_as_the_smaller_one(data: Path, trained: Path, tmp_path: Path) -> None:
    small = open_source(trained / "model")
    config = dict(small.config) | {"num_hidden_layers": 5, "intermediate_size": 96}
    ids = torch.tensor([[5, 70, 80, 90, 100, 110]])
    logits = []
    for source in (small, Grown(small, config, 1)):
        plan = plan_for(source.config)
        with torch.no_grad():
            logits.append(Graph(plan).logits(read_weights(plan, source), ids).numpy())
    assert relative_error(logits[1][0], logits[0][0]) <= 1e-5
    settings = training(model=MODEL | {"num_hidden_layers": 5, "intermediate_size": 96}, steps=20)
    assert pretrain(settings, data, tmp_path, start=str(trained / "model"))
    valid = [line["valid_loss"] for line in read_log(tmp_path) if "valid_loss" in line]
    assert valid[0] < 0.5
    assert valid[-1] <= valid[0] + 0.02


def test_new_neurons_are_as_large_as_the_old_ones(trained: Path) -> None:
    small = open_source(trained / "model")
    grown = Grown(small, dict(small.config) | {"intermediate_size": 512}, 1)
    name = "model.layers.0.mlp.up_proj.weight"
    old, both = small.read(name), grown.read(name)
    assert float(both[len(old) :].std()) == pytest.approx(float(old.std()), rel=0.1)
    assert not grown.read("model.layers.0.mlp.down_proj.weight")[:, len(old) :].any()


def test_a_model_can_only_grow(trained: Path) -> None:
    small = open_source(trained / "model")
    with pytest.raises(InputError, match="can only grow"):
        Grown(small, dict(small.config) | {"num_hidden_layers": 1}, 1)
    with pytest.raises(InputError, match="hidden_size"):
        Grown(small, dict(small.config) | {"hidden_size": 64}, 1)
    assert origins(2, 5) == [(0, False), (0, True), (1, False), (1, True), (1, True)]


def test_orthogonalization_brings_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(1))))
    assert float(values.min()) > 0.4
    assert float(values.max()) < 1.4


def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "".join(f"  {key}: {value}\n" for key, value in MODEL.items())
    (tmp_path / "c.yaml").write_text(
        f"model:\n{lines}length: 32\nbatch: 2\nsteps: 4\nwarmup: 1\nvalidate_tokens: 64\nthreads: 1\n"
    )
    assert main([str(tmp_path / "c.yaml"), "--data", str(data), "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "held out at step 4, zh:" in told and "finished" in told
