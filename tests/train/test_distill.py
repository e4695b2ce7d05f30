"""Distillation: what is simulated is what is stored, masks hold, KL falls, and a run resumes to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from haomiao.cli.main import main  # noqa: E402
from haomiao.errors import InputError  # noqa: E402
from haomiao.kernels.pack import pack_int8, pack_planes, unpack, unpack_codes  # noqa: E402
from haomiao.kernels.packed import PackedTensor  # noqa: E402
from haomiao.kernels.rtn import quantize_planes  # noqa: E402
from haomiao.load.artifact import Artifact  # noqa: E402
from haomiao.metrics.divergence import kl_divergence  # noqa: E402
from haomiao.train.distill import Distillation, distill  # noqa: E402
from haomiao.train.graph import Graph  # noqa: E402
from haomiao.train.pretrain import pretrain  # noqa: E402
from haomiao.train.rounding import UNIT, RoundedMatrix  # noqa: E402
from haomiao.train.starting import open_starting  # noqa: E402
from haomiao.train.students import with_layers  # noqa: E402
from haomiao.train.teacher import Teacher, distance, divergence  # noqa: E402
from tests.train.toy import training, write_data  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained toy model, a text in its language, and an artifact of it that lost half of its weights."""
    root = tmp_path_factory.mktemp("toy")
    assert pretrain(training(steps=120), write_data(root), root / "run")
    text = (root / "texts" / "en.txt").read_text() + (root / "texts" / "zh.txt").read_text(encoding="utf-8")
    (root / "text.txt").write_text(text.replace("<|endoftext|>\n", ""), encoding="utf-8")
    small = ["--method", "gptq", "--prune", "magnitude:0.5", "--order", "static", "--samples", "8", "--held", "4"]
    shape = ["--length", "32", "--text", str(root / "text.txt"), "--quiet"]
    assert main(["compress", str(root / "run" / "model"), "-o", str(root / "small"), *small, *shape]) == 0
    return root


def settings(**changes: object) -> Distillation:
    given: dict[str, object] = {"samples": 48, "held": 4, "length": 32, "epochs": 4, "top_k": 16, "rate": 3e-3}
    return Distillation(**{**given, **changes})  # type: ignore[arg-type]


def packed(kind: str) -> PackedTensor:
    random = np.random.default_rng(1)
    weights = random.normal(0, 0.05, (40, 70)).astype(np.float32)
    weights[random.random(weights.shape) < 0.4] = 0
    if kind == "int8":
        codes = np.clip(np.rint(weights / 0.002), -128, 127).astype(np.int16)
        return pack_int8(codes, np.full((40, 3), np.float32(np.float16(0.002))), 32)
    return quantize_planes(weights, 32, 3 if kind == "overlapping" else 4, kind != "single")


@pytest.mark.parametrize("kind", ["int8", "single", "disjoint", "overlapping"])
def test_what_is_simulated_is_what_is_stored(kind: str) -> None:
    source = packed(kind)
    matrix = RoundedMatrix(source, CPU)
    np.testing.assert_allclose(matrix.weights("int8").detach().numpy(), unpack(source), rtol=0, atol=1e-7)
    assert np.array_equal(matrix.weights("int4").detach().numpy(), unpack(source, "hi"))
    assert np.array_equal(matrix.pack().hi, source.hi)
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in matrix.parameters.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=random)
    after = matrix.pack()
    np.testing.assert_allclose(matrix.weights("int4").detach().numpy(), unpack(after, "hi"), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(matrix.weights("int8").detach().numpy(), unpack(after), rtol=1e-6, atol=1e-6)
    assert (unpack_codes(after, "hi")[0] != unpack_codes(source, "hi")[0]).mean() > 0.05
    assert not unpack(after)[unpack(source) == 0].any()  # the mask


def test_a_code_that_was_not_the_nearest_becomes_it() -> None:
    """A solver may choose another `hi` and leave the rest to the fine plane; learning begins with the nearest."""
    source = packed("overlapping")
    (hi, scales), (both, _) = unpack_codes(source, "hi"), unpack_codes(source)
    lo = both - hi * 8
    moved = np.where((lo >= 0) & (hi < 7), 1, 0).astype(np.int16)
    chosen = pack_planes(hi + moved, (lo - 8 * moved).astype(np.int8), scales, 32, 3)
    assert np.array_equal(unpack(chosen), unpack(source)) and (moved != 0).mean() > 0.2
    matrix = RoundedMatrix(chosen, CPU)
    assert np.array_equal(matrix.weights("int8").detach().numpy(), unpack(source))
    assert np.array_equal(matrix.weights("int4").detach().numpy(), unpack(source, "hi"))


@pytest.mark.parametrize("point", ["int4", "int8"])
def test_rounding_has_the_gradient_of_the_identity(point: str) -> None:
    matrix = RoundedMatrix(packed("disjoint"), CPU)
    matrix.weights(point).sum().backward()
    codes = matrix.parameters["codes"].grad
    assert codes is not None
    _, scales = unpack_codes(matrix.packed, "hi")
    expected = UNIT * np.repeat(scales, 32, axis=1)[:, :70] * (unpack(matrix.packed) != 0)
    np.testing.assert_allclose(codes.numpy(), expected, rtol=1e-5)


def test_divergence_of_all_tokens_is_kl() -> None:
    random = np.random.default_rng(1)
    p, q = (random.normal(0, 2, (1, 5, 20)).astype(np.float32) for _ in range(2))
    said = torch.log_softmax(torch.from_numpy(p), -1)
    ids = torch.arange(19).expand(1, 5, 19)  # all but one: the rest is that one
    for reverse, (a, b) in ((False, (p, q)), (True, (q, p))):
        found = divergence(torch.from_numpy(q), ids, said[..., :19], temperature=1.0, reverse=reverse)
        assert float(found) == pytest.approx(float(kl_divergence(a[0], b[0]).mean()), rel=1e-4)
    top = said.topk(4, dim=-1)
    part = divergence(torch.from_numpy(q), top.indices, top.values, temperature=1.0, reverse=False)
    assert 0 < float(part) <= float(kl_divergence(p[0], q[0]).mean()) + 1e-5


def test_a_teacher_is_asked_once(tmp_path: Path) -> None:
    samples = np.arange(24, dtype=np.int32).reshape(3, 8)
    logits = torch.randn(3, 8, 30, generator=torch.Generator().manual_seed(1))
    asked = []

    def answer(ids: torch.Tensor) -> torch.Tensor:
        asked.append(len(ids))
        return logits[ids[:, 0] // 8]

    for _ in range(2):
        teacher = Teacher(tmp_path, "key", samples, 5, 2.0)
        teacher.fill(answer, CPU, 2)
    assert asked == [2, 1]
    ids, logprobs = teacher.answers(np.array([2, 0]), CPU)
    expected = torch.log_softmax(logits / 2, -1)[[2, 0]].topk(5, dim=-1)
    assert (ids == expected.indices).all()
    np.testing.assert_allclose(logprobs.numpy(), expected.values.numpy(), rtol=2e-3)


def test_distance_is_relative_and_a_mean() -> None:
    ours, theirs = [torch.full((1, 2, 4), 1.5), torch.zeros(1, 2, 4)], [torch.ones(1, 2, 4), torch.full((1, 2, 4), 3.0)]
    assert float(distance(ours, theirs)) == pytest.approx((0.25 + 1) / 2)
    assert float(distance(theirs, theirs)) == 0


def test_the_residual_stream_is_observed_without_changing_a_bit(folder: Path) -> None:
    model = open_starting(str(folder / "run" / "model"))
    plan = model.plan(16)
    weights, graph = dict(model.weights(plan)), Graph(plan)
    ids = torch.arange(32).reshape(2, 16)
    logits, sums = graph.observed(weights, ids)
    assert torch.equal(logits, graph.logits(weights, ids))
    assert len(sums) == 2 * plan.layers and all(each.shape == (2, 16, plan.hidden_size) for each in sums)


def test_hidden_states_come_closer_when_they_count(folder: Path, tmp_path: Path) -> None:
    """With the same steps, a student that is told of them ends nearer to its teacher's residual stream."""
    teacher, student = open_starting(str(folder / "run" / "model")), open_starting(str(folder / "small"))
    plan = teacher.plan(32)
    graph, ids = Graph(plan), torch.arange(64).reshape(2, 32)
    _, theirs = graph.observed(dict(teacher.weights(plan)), ids)
    found = {}
    for hidden in (0.0, 10.0):
        given = settings(hidden=hidden, epochs=2, point="int4")
        out = tmp_path / f"out-{hidden}"
        assert distill(teacher, student, out, given, text=[str(folder / "text.txt")], device="cpu", threads=1)
        learnt = open_starting(str(out))
        _, ours = graph.observed(dict(learnt.weights(learnt.plan(32))), ids)
        found[hidden] = float(distance(ours, theirs))
    assert found[10.0] < found[0.0]


def test_a_pruned_artifact_recovers_and_stays_pruned(folder: Path, tmp_path: Path) -> None:
    teacher, student = open_starting(str(folder / "run" / "model")), open_starting(str(folder / "small"))
    report = distill(
        teacher, student, tmp_path / "out", settings(epochs=6), text=[str(folder / "text.txt")], device="cpu", threads=1
    )
    assert report is not None
    for point in ("int8", "int4"):
        before, after = (report["errors"][when][point]["kl"]["estimate"] for when in ("before", "after"))
        assert after < 0.5 * before
    old, new = Artifact.open(folder / "small"), Artifact.open(tmp_path / "out")
    assert new.meta["errors"]["int4"]["kl"] == report["errors"]["after"]["int4"]["kl"]
    for name, tensor in old.tensors.items():
        pruned = (unpack(tensor) == 0) & (unpack(tensor, "hi") == 0)  # overlapping planes may sum to zero
        assert not unpack(new.tensors[name])[pruned].any()
    assert not (tmp_path / "out.partial").exists()
    assert main(["generate", str(tmp_path / "out"), "the red", "--max-tokens", "3", "--threads", "1"]) == 0


def test_one_point_and_reverse_divergence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "--teacher",
        str(folder / "run" / "model"),
        "--student",
        str(folder / "small"),
        "-o",
        str(tmp_path / "out"),
    ]
    shape = ["--samples", "48", "--held", "4", "--length", "32", "--epochs", "4", "--rate", "0.003", "--top-k", "16"]
    more = ["--point", "int4", "--divergence", "reverse", "--temperature", "1.5", "--device", "cpu", "--threads", "1"]
    assert main(["distill", *given, *shape, *more, "--text", str(folder / "text.txt"), "--quiet", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["points"] == ["int4"]
    assert report["errors"]["after"]["int4"]["kl"]["estimate"] < report["errors"]["before"]["int4"]["kl"]["estimate"]


def test_a_student_of_fewer_layers_learns(folder: Path, tmp_path: Path) -> None:
    teacher = open_starting(str(folder / "run" / "model"))
    given = settings(layers=1, epochs=3)
    report = distill(teacher, None, tmp_path / "out", given, text=[str(folder / "text.txt")], device="cpu", threads=1)
    assert report is not None
    lines = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    assert report["held_out"]["loss"] < 0.5 * lines[0]["valid_loss"]
    student = open_starting(str(tmp_path / "out"))
    assert student.config["num_hidden_layers"] == 1
    # and once more, the student as a checkpoint
    report = distill(
        teacher, student, tmp_path / "again", settings(epochs=1), text=[str(folder / "text.txt")], device="cpu"
    )
    assert report is not None


def test_a_run_that_was_stopped_ends_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    teacher, student = open_starting(str(folder / "run" / "model")), open_starting(str(folder / "small"))
    common = {"text": [str(folder / "text.txt")], "device": "cpu", "threads": 1}
    given = settings(epochs=1, batch=4)
    assert distill(teacher, student, tmp_path / "whole", given, **common) is not None  # type: ignore[arg-type]
    for stop in (1, 3):
        assert distill(teacher, student, tmp_path / "parts", given, stop_after=stop, **common) is None  # type: ignore[arg-type]
    assert distill(teacher, student, tmp_path / "parts", given, **common) is not None  # type: ignore[arg-type]
    models = [(tmp_path / name / "model.haomiao").read_bytes() for name in ("whole", "parts")]
    assert models[0] == models[1]


def test_models_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    teacher = open_starting(str(folder / "run" / "model"))
    with pytest.raises(InputError, match="different vocabularies"):
        distill(teacher, open_starting(None), tmp_path / "out", settings(), device="cpu")
    with pytest.raises(InputError, match="fewer than the teacher"):
        distill(teacher, None, tmp_path / "out", settings(layers=2), device="cpu")
    with pytest.raises(InputError, match="--student, or --layers"):
        distill(teacher, None, tmp_path / "out", settings(), device="cpu")
    with pytest.raises(InputError, match="--point is of a compressed student"):
        distill(teacher, teacher, tmp_path / "out", settings(point="int4"), device="cpu")
    with pytest.raises(InputError, match="hidden compares"):
        distill(teacher, None, tmp_path / "out", settings(layers=1, hidden=1.0), device="cpu")
    models = ["--teacher", str(folder / "run" / "model"), "--student", str(folder / "small")]
    assert main(["distill", *models, "-o", str(tmp_path / "out"), "--hidden", "-1"]) == 2
    assert not (tmp_path / "out").exists()


def test_lists_of_a_config_lose_layers_too() -> None:
    config = with_layers({"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"], "x": [1, 2]}, 2, [0, 3])
    assert config == {"num_hidden_layers": 2, "layer_types": ["a", "d"], "x": [1, 2]}
