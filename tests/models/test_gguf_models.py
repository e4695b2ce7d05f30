"""A GGUF file answers as the checkpoint that it was made from: every family, through our own reader, at `full`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from haomiao.load.artifact import Artifact
from haomiao.load.source import open_source
from haomiao.models.convert import convert
from tests.golden.cases import CASES, Case
from tests.golden.checkpoint import tokens_of
from tests.golden.make_goldens import HERE, ROWS
from tests.models.gguf_files import write_gguf
from tests.models.runs import Sequence1, make_artifact, make_executor, relative_error

pytest.importorskip("gguf")
NAMES = (
    "llama-gqa-tied",
    "llama-mqa-head24",
    "llama3-rope",
    "llama3-rope-v5",
    "llama-linear",
    "llama-yarn",
    "mistral-window",
    "qwen2-tied",
    "qwen2-odd",
    "qwen2-yarn",
    "qwen3-head32",
    "phi3-plain",
    "phi3-window",
    "phi3-short",
    "phi3-long",
    "gpt2-plain",
)
"""Cases that GGUF can express; Gemma's query scale follows from its size there, so it has a test of its own."""


def logits_of(path: Path, case: Case, directory: Path) -> np.ndarray:
    source = open_source(path)
    with Artifact.open(convert(source, directory / "out", scheme="full")) as artifact:
        source.close()
        executor = make_executor("reference", artifact, max_context=case.max_context, kv_type="f32")
        return Sequence1(executor, "full").feed(tokens_of(case))


@pytest.mark.parametrize("name", NAMES)
def test_a_gguf_file_answers_as_the_checkpoint(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    logits = logits_of(write_gguf(case, tmp_path / "tiny.gguf"), case, tmp_path)
    golden = np.load(HERE / f"{case.family}.npz")[f"{case.name}/logits"]
    assert relative_error(logits[list(ROWS)], golden) <= 1e-3


@pytest.mark.parametrize("name", ["gemma2-window", "gemma2-caps", "gemma3-default-pattern"])
def test_gemma(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    case = Case(name, {**case.config, "query_pre_attn_scalar": case.config["head_dim"]})
    with make_artifact(case, tmp_path) as artifact:
        expected = Sequence1(make_executor("reference", artifact, kv_type="f32"), "full").feed(tokens_of(case))
    logits = logits_of(write_gguf(case, tmp_path / "tiny.gguf"), case, tmp_path)
    assert relative_error(logits, expected) <= 1e-5
