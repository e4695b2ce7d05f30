"""From a name to a model: artifacts, directories converted once, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from haomiao.errors import InputError, ModelError, ModelNotFoundError
from haomiao.kernels.pack import from_bf16, to_bf16
from haomiao.load.artifact import Artifact
from haomiao.load.artifact_writer import ArtifactWriter
from haomiao.models import open as opening
from haomiao.models.open import open_model
from haomiao.models.registry import plan_for
from tests.golden.cases import CASES
from tests.golden.checkpoint import random_checkpoint
from tests.load.checkpoints import to_bf16 as bits_of_bf16
from tests.load.checkpoints import write_model
from tests.models.runs import make_artifact

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HAOMIAO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "artifacts"


def hub_directory(name: str, directory: Path, *, bf16: bool = False, **changes: Any) -> Path:
    case = BY_NAME[name]
    tensors: dict[str, Any] = random_checkpoint(case.config, case.seed)
    if bf16:
        tensors = {n: bits_of_bf16(from_bf16(to_bf16(t))) for n, t in tensors.items()}
    return write_model(directory / name, tensors, {**case.config, **changes}, shards=2)


def made(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if not path.name.startswith(".")] if cache.exists() else []


def test_a_directory_is_converted_once(tmp_path: Path, cache: Path) -> None:
    directory = hub_directory("llama-gqa-tied", tmp_path)
    steps: list[str] = []
    first = open_model(directory, progress=lambda what, done, total: steps.append(what))
    assert first.points == ("int8", "int4") and first.default_point == "int8"
    assert steps and first.plan == plan_for(BY_NAME["llama-gqa-tied"].config)
    assert made(cache) == [first.files_dir]
    steps.clear()
    second = open_model(str(directory), point="int4", progress=lambda what, done, total: steps.append(what))
    assert (second.files_dir, second.default_point, steps) == (first.files_dir, "int4", [])
    assert second.points == ("int8", "int4") and second.eos_token_ids == (2,)
    np.testing.assert_array_equal(second.artifact.tensors["embed"].hi, first.artifact.tensors["embed"].hi)
    full = open_model(directory, point="full")
    assert full.points == ("full",) and len(made(cache)) == 2


def test_a_changed_checkpoint_is_converted_again(tmp_path: Path, cache: Path) -> None:
    directory = hub_directory("llama-gqa-tied", tmp_path)
    before = open_model(directory)
    hub_directory("llama-gqa-tied", tmp_path, rms_norm_eps=1e-4)
    after = open_model(directory)
    assert before.files_dir != after.files_dir and len(made(cache)) == 2


def test_bf16_checkpoints_share_one_conversion_of_floats(tmp_path: Path, cache: Path) -> None:
    directory = hub_directory("qwen2-odd", tmp_path, bf16=True)
    full, half = open_model(directory, point="full"), open_model(directory, point="bf16")
    assert full.files_dir == half.files_dir and len(made(cache)) == 1
    assert full.points == ("full",) and half.points == ("bf16",)


def test_an_artifact_is_opened_where_it_lies(tmp_path: Path, cache: Path) -> None:
    directory = make_artifact(BY_NAME["qwen3-head32"], tmp_path, "nested").directory
    model = open_model(directory, max_context=100)
    assert (model.files_dir, model.plan.max_context, model.position_limit) == (directory, 100, 256)
    assert model.with_context(50).plan.max_context == 50
    assert made(cache) == []
    with pytest.raises(InputError, match="offers int8, int4, not full"):
        open_model(directory, point="full")


def test_names_that_mean_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFoundError):
        open_model(tmp_path / "absent")
    with pytest.raises(InputError, match="point"):
        open_model(tmp_path, point="int3")
    monkeypatch.setattr(opening, "ASSETS", tmp_path)
    with pytest.raises(ModelNotFoundError, match="no embedded model"):
        open_model(None)


def test_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_at = make_artifact(BY_NAME["llama-gqa-tied"], tmp_path, "nested").directory
    made_at.rename(tmp_path / opening.EMBEDDED)
    monkeypatch.setattr(opening, "ASSETS", tmp_path)
    model = open_model(None)
    assert (model.name, model.default_point) == (opening.EMBEDDED, "int8")


@pytest.mark.parametrize("wanted", [0, -5, 257, 10**30])
def test_contexts_beyond_the_model_are_refused(wanted: int, tmp_path: Path) -> None:
    directory = hub_directory("llama-gqa-tied", tmp_path)
    with pytest.raises(InputError, match="1 to 256"):
        open_model(directory, max_context=wanted)


def rewritten(artifact: Artifact, directory: Path, **changes: Any) -> Path:
    """The artifact with another meta section."""
    with ArtifactWriter(directory) as writer:
        for name, tensor in artifact.tensors.items():
            writer.add_tensor(name, tensor)
        for name, vector in artifact.vectors.items():
            writer.add_vector(name, vector)
        return writer.finish({**artifact.meta, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": []}, "names no operating point"),
        ({"points": ["int8", "warp"]}, "names no operating point"),
        ({"points": [["int8"]]}, "names no operating point"),
        ({"points": "int8"}, "names no operating point"),
        ({"default_point": "int3"}, "offers"),
        ({"default_point": {}}, "offers"),
        ({"config": None}, "holds no config"),
        ({"config": {}}, "neither a model_type nor"),
        ({"config": {**BY_NAME["llama-gqa-tied"].config, "vocab_size": 98}}, "embed is absent, or not 98 x 64"),
        ({"config": {**BY_NAME["llama-gqa-tied"].config, "num_hidden_layers": 3}}, "layers.2.attention_norm is absent"),
        ({"config": {**BY_NAME["llama-gqa-tied"].config, "hidden_size": 1 << 23}}, "heads of 2097152 channels"),
        ({"points": ["full"], "default_point": "full"}, "embed is stored as planes, not fit for full"),
    ],
)
def test_artifacts_that_contradict_themselves(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    artifact = make_artifact(BY_NAME["llama-gqa-tied"], tmp_path, "nested")
    with pytest.raises((ModelError, InputError), match=message):
        open_model(rewritten(artifact, tmp_path / "wrong", **changes))
