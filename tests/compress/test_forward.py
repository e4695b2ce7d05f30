"""The forward pass of calibration against the reference executor, family by family, and how it is cut in pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from haomiao.compress import calibrate
from haomiao.compress.calibrate import Moments, Stream, stages
from haomiao.compress.error import sequence_logits
from haomiao.compress.forward import Buffers, Weights, live, run, uses
from haomiao.engine.executors.reference import ReferenceExecutor
from haomiao.errors import UnavailableError
from haomiao.kernels.pack import unpack
from haomiao.load.artifact import Artifact
from haomiao.models import plan as ops
from haomiao.models.convert import convert
from haomiao.models.registry import plan_for
from haomiao.types import F32, I32
from tests.golden.cases import CASES, Case
from tests.golden.checkpoint import DictSource, random_checkpoint

TOKENS = 40


def opened(case: Case, folder: Path) -> tuple[ops.Plan, Artifact, Weights]:
    source = DictSource(case.config, random_checkpoint(case.config, case.seed))
    artifact = Artifact.open(convert(source, folder / "full", scheme="full"))
    matrices = {name: unpack(tensor) for name, tensor in artifact.tensors.items()}
    weights = Weights(matrices.__getitem__, lambda name, ids: matrices[name][ids], artifact.vectors.__getitem__)
    return plan_for(case.config, TOKENS), artifact, weights


def some_ids(plan: ops.Plan, samples: int) -> I32:
    return np.random.default_rng(0).integers(0, plan.vocab_size, (samples, TOKENS)).astype(np.int32)


def head_of(plan: ops.Plan) -> tuple[int, ops.Head]:
    return next((i, op) for i, op in enumerate(plan.ops) if isinstance(op, ops.Head))


def logits_of(plan: ops.Plan, weights: Weights, hidden: F32) -> F32:
    head = head_of(plan)[1]
    logits = hidden @ weights.matrix(head.weight).T * head.scale
    return head.softcap * np.tanh(logits / head.softcap) if head.softcap else logits


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_family_computes_what_the_reference_computes(case: Case, tmp_path: Path) -> None:
    plan, artifact, weights = opened(case, tmp_path)
    ids = some_ids(plan, 2)
    executor = ReferenceExecutor(
        plan, artifact.tensors, artifact.vectors, points=("full",), kv_type="f32", kv_blocks=4, max_step_tokens=64
    )
    buffers: Buffers = {}
    place, head = head_of(plan)
    run(plan, weights, buffers, ids, 0, place)
    logits = logits_of(plan, weights, buffers[head.source]).reshape(2, TOKENS, -1)
    for sample in range(2):
        expected = sequence_logits(executor, ids[sample].tolist(), "full")
        np.testing.assert_allclose(logits[sample], expected, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["llama-plain", "gemma2-plain", "gpt2-plain"])
def test_pieces_through_a_file_give_the_same_as_one_run(name: str, tmp_path: Path) -> None:
    case = next((c for c in CASES if c.name == name), CASES[0])
    plan, _, weights = opened(case, tmp_path)
    ids = some_ids(plan, 3)
    whole: Buffers = {}
    place, head = head_of(plan)
    run(plan, weights, whole, ids, 0, place)
    seen: list[F32] = []
    for stage in stages(plan):
        stream = Stream(plan, ids, tmp_path, "s")  # opened anew each time, as after a kill
        rows: list[F32] = []
        stream.advance(stage.place, weights, consume=lambda b, s=stage, r=rows: r.append(b[s.source].copy()))
        assert sum(map(len, rows)) == ids.size
        assert len(list(tmp_path.glob("s-*"))) <= 1
    stream.advance(place, weights, consume=lambda b: seen.append(b[head.source].copy()), store=place)
    np.testing.assert_allclose(np.concatenate(seen), whole[head.source], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(np.concatenate([b[head.source] for b in stream.outputs()]), np.concatenate(seen))
    stream.remove()
    assert not list(tmp_path.glob("s-*"))


def test_only_what_is_read_later_is_kept() -> None:
    plan = plan_for(CASES[0].config, TOKENS)
    alive = live(plan)
    assert alive[0] == ()
    first = stages(plan)[0]
    assert set(alive[first.place]) == {"x", first.source}
    assert len(alive) == len(plan.ops) + 1
    for op in plan.ops:
        reads, writes = uses(op)
        assert set(reads) | set(writes) <= set(plan.buffers)


@pytest.mark.parametrize(("cols", "rows", "chunk"), [(9, 70, 16), (600, 300, 40), (5, 1, 1)])
def test_moments_are_those_of_all_rows_at_once(
    cols: int, rows: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "SUM_TOKENS", 100)  # some sums go over it, the last stays below
    x = np.random.default_rng(1).normal(size=(rows, cols)).astype(np.float32)
    moments = Moments(cols)
    for begin in range(0, rows, chunk):
        moments.add(x[begin : begin + chunk] if begin % 2 else np.asfortranarray(x[begin : begin + chunk]))
    assert moments.tokens == rows
    np.testing.assert_allclose(moments.magnitudes(), np.abs(x).mean(axis=0), rtol=1e-5)
    hessian = moments.hessian()
    assert hessian.flags.c_contiguous
    np.testing.assert_array_equal(hessian, hessian.T)
    np.testing.assert_allclose(hessian, x.T.astype(np.float64) @ x / rows, rtol=1e-4, atol=1e-5)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _, weights = opened(CASES[0], tmp_path)
    ids = some_ids(plan, 2)
    stream = Stream(plan, ids, tmp_path, "s")
    second, third = stages(plan)[1:3]
    stream.advance(second.place, weights)
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("s-*.f32")}

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UnavailableError, match="no room on the disk"):
        stream.advance(third.place, weights)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("s-*.f32")} == kept
    monkeypatch.undo()
    stream.advance(third.place, weights)
    assert stream.place > second.place - 1
