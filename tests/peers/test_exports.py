"""Exported models elsewhere: the same greedy tokens in llama.cpp and in transformers as in our engine, up to ties.

Each engine follows *our* greedy answer, so that one different choice does not hide the rest: at every place it is given
the same tokens and must choose the same next one. The weights are equal to the bit; the paths are not (llama.cpp rounds
activations to 8 bits a block of 32 with float16 scales, transformers keeps float32, our int4 and int8 points have int8
activations). What that does to the difference of the two top logits is measured on held-out text: its 99th percentile
there is the path's noise, and a place where our two top logits are nearer than that is a tie.

`HAOMIAO_LLAMA_PYTHON` names the interpreter that has llama-cpp-python; transformers needs compressed-tensors beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.compress.test_export_gguf import EXPORTED, widened
from tests.compress.test_job import source_of
from tests.golden.cases import Case
from tests.golden.checkpoint import tokens_of

from haomiao.api import LLM
from haomiao.compress.export import compressed_tensors, gguf
from haomiao.compress.export.gguf_vocabulary import PROBES
from haomiao.compress.job import compress
from haomiao.compress.recipe import recipe_of
from haomiao.load.artifact import Artifact
from haomiao.load.source import open_source
from haomiao.models.convert import convert
from haomiao.models.registry import plan_for, position_limit
from haomiao.text.tokenizer import Tokenizer
from haomiao.types import F32

pytestmark = pytest.mark.nightly

WORKER = Path(__file__).with_name("llama_cpp_worker.py")
PROMPTS = ("Once upon a time there was", "The whale", "在一个小镇上", "他说:", "import React from", "人工智能")
NEW_TOKENS = 64
SMALL: dict[str, Any] = {"samples": 32, "length": 256, "held": 4}
RECIPES: dict[str, dict[str, Any]] = {
    "gptq": {"lo_shift": 3},
    "sparsegpt": {"lo_shift": 3, "prune": ["sparsegpt:0.5"]},
    "tiles": {"lo_shift": 3, "prune": ["tile:0.3"]},
    "int8": {"bits": 8},
    "structured": {"lo_shift": 3, "prune": ["structured:0.2"]},
}

Follow = Callable[[Path, list[list[int]]], list[F32]]


@dataclass(frozen=True)
class Told:
    """How far two paths are apart: places compared, choices that differ, and the noise they are judged by."""

    places: int
    ties: list[tuple[int, int, float]]  # (prompt, place, difference of our two top logits)
    noise: float
    median: float


@pytest.fixture(scope="session")
def llama_python() -> str:
    python = os.environ.get("HAOMIAO_LLAMA_PYTHON")
    if not python:
        pytest.skip("HAOMIAO_LLAMA_PYTHON names no interpreter with llama-cpp-python")
    return python


@pytest.fixture(scope="session")
def artifacts(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The trained model compressed by a recipe of `RECIPES`, made once."""
    folder, directory = tmp_path_factory.mktemp("artifacts"), shared / "data" / "trained"
    encode = Tokenizer(directory).encode

    def made(name: str) -> Path:
        if not (folder / name).exists():
            recipe = recipe_of({**SMALL, **RECIPES[name]})
            compress(open_source(str(directory)), folder / name, recipe, encode=encode, threads=1)
        return folder / name

    return made


@pytest.fixture(scope="session")
def held_out(shared: Path) -> list[int]:
    tokenizer = Tokenizer(shared / "data" / "trained")
    english = (shared / "data" / "text" / "en-books" / "valid.txt").read_text(encoding="utf-8")[20_000:24_000]
    chinese = (shared / "data" / "text" / "zh-modern" / "modern_valid.txt").read_text(encoding="utf-8")[2_000:4_000]
    return tokenizer.encode(english)[:192] + tokenizer.encode(chinese)[:192]


def top_two(logits: F32) -> tuple[np.ndarray, F32]:
    """Tokens [places, 2] and the difference of their logits [places]."""
    two = np.argsort(-logits, axis=-1, kind="stable")[:, :2]
    values = np.take_along_axis(logits, two, axis=-1)
    return two, values[:, 0] - values[:, 1]


def compare(model: Path, point: str, held_out: list[int], follow: Callable[[list[list[int]]], list[F32]]) -> Told:
    """Our engine's greedy answers against a path that follows them; fails where a difference is no tie."""
    with LLM(model, point=point, threads=1) as llm:
        prompts = [llm.tokenize(text) for text in PROMPTS]
        answers = [llm.generate(ids, max_tokens=NEW_TOKENS, ignore_eos=True).token_ids for ids in prompts]
        sequences = [prompt + list(answer) for prompt, answer in zip(prompts, answers, strict=True)]
        ours = [llm.logits(ids) for ids in (held_out, *sequences)]
    theirs = follow([held_out, *sequences])
    two, gap = top_two(ours[0])
    other = np.take_along_axis(theirs[0], two, axis=-1)
    moved = np.abs(gap - (other[:, 0] - other[:, 1]))
    noise, ties = float(np.quantile(moved, 0.99)), []
    for index, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
        places = slice(len(prompt) - 1, len(sequence) - 1)
        chosen, gap = top_two(ours[1 + index][places])
        np.testing.assert_array_equal(chosen[:, 0], sequence[len(prompt) :])  # the answer is what its logits say
        for place in np.flatnonzero(theirs[1 + index][places].argmax(-1) != chosen[:, 0]):
            assert gap[place] <= noise, f"prompt {index}, place {place}: no tie, {gap[place]:.4f} over {noise:.4f}"
            ties.append((index, int(place), float(gap[place])))
    return Told(len(PROMPTS) * NEW_TOKENS, ties, noise, float(np.median(moved)))


def report(name: str, told: Told) -> None:
    listed = ", ".join(f"{PROMPTS[i]!r}+{place}: {gap:.4f}" for i, place, gap in told.ties) or "none"
    print(
        f"\n{name}: {told.places - len(told.ties)} of {told.places} choices equal; noise of the top two: median "
        f"{told.median:.2e}, 99th percentile {told.noise:.2e}; ties: {listed}"
    )


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("gptq", "int4"),
        ("gptq", "int8"),
        ("sparsegpt", "int4"),
        ("tiles", "int4"),
        ("tiles", "int8"),
        ("int8", "int8"),
        ("structured", "int4"),
    ],
)
def test_llama_cpp_chooses_the_same_tokens(
    name: str, point: str, artifacts: Callable[[str], Path], held_out: list[int], llama_python: str, tmp_path: Path
) -> None:
    model = artifacts(name)
    with Artifact.open(model) as artifact:
        gguf.export(artifact, tmp_path / "model.gguf", point)

    def follow(sequences: list[list[int]]) -> list[F32]:
        ids, out = tmp_path / "ids.json", tmp_path / "out.npz"
        ids.write_text(json.dumps(sequences))
        command = [llama_python, str(WORKER), "follow", str(tmp_path / "model.gguf"), str(ids), str(out)]
        subprocess.run(command, check=True, capture_output=True)
        found = np.load(out)
        return [found[str(index)] for index in range(len(sequences))]

    told = compare(model, point, held_out, follow)
    report(f"llama.cpp, {name} at {point}", told)
    assert len(told.ties) <= told.places // 20


def test_llama_cpp_cuts_text_as_we_do(artifacts: Callable[[str], Path], llama_python: str, tmp_path: Path) -> None:
    model = artifacts("gptq")
    with Artifact.open(model) as artifact:
        gguf.export(artifact, tmp_path / "model.gguf", "int4")
    texts = [*PROMPTS, *PROBES, "<|user|>hi<|assistant|>"]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    command = [llama_python, str(WORKER), "tokenize", str(tmp_path / "model.gguf"), str(tmp_path / "texts.json")]
    subprocess.run([*command, str(tmp_path / "out.json")], check=True, capture_output=True)
    tokenizer = Tokenizer(model)
    assert json.loads((tmp_path / "out.json").read_text()) == [tokenizer.encode(text, special=True) for text in texts]


@pytest.mark.parametrize("case", EXPORTED, ids=lambda case: case.name)
def test_llama_cpp_understands_every_family(case: Case, llama_python: str, tmp_path: Path) -> None:
    """Tiny random models: names, sizes, rotation, norms and scales as llama.cpp takes them, within its own rounding."""
    case = widened(case)
    with Artifact.open(convert(source_of(case), tmp_path / "artifact", scheme="exact", lo_shift=3)) as artifact:
        gguf.export(artifact, tmp_path / "model.gguf", "int8")
    # both take LongRoPE's long factors: llama.cpp's context is beyond the original limit
    plan = plan_for(case.config, position_limit(case.config))
    # llama.cpp has no windows in these two
    window = min((size for size in plan.windows if size), default=64) if plan.family in ("mistral", "phi3") else 64
    tokens = tokens_of(case)[: min(64, window)]
    (tmp_path / "ids.json").write_text(json.dumps([tokens]))
    command = [llama_python, str(WORKER), "follow", *(str(tmp_path / n) for n in ("model.gguf", "ids.json", "out.npz"))]
    subprocess.run(command, check=True, capture_output=True)
    theirs = np.load(tmp_path / "out.npz")["0"]
    with LLM(tmp_path / "artifact", point="int8", threads=1, max_context=plan.max_context) as llm:
        ours = llm.logits(tokens)
    error = float(np.abs(ours - theirs).max() / np.abs(ours).max())
    print(f"\n{case.name}: greatest difference of logits {error:.1e} of the greatest logit, {len(tokens)} tokens")
    assert error < 0.05


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("gptq", "int4"),
        ("gptq", "int8"),
        ("sparsegpt", "int4"),
        ("tiles", "int4"),
        ("int8", "int8"),
        ("structured", "int4"),
        ("structured", "int8"),
    ],
)
def test_transformers_chooses_the_same_tokens(
    name: str, point: str, artifacts: Callable[[str], Path], held_out: list[int], tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = artifacts(name)
    with Artifact.open(model) as artifact:
        exported = compressed_tensors.export(artifact, tmp_path / "checkpoint", point)
    loaded = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()

    def follow(sequences: list[list[int]]) -> list[F32]:
        with torch.inference_mode():
            return [loaded(torch.tensor([ids])).logits[0].float().numpy() for ids in sequences]

    told = compare(model, point, held_out, follow)
    report(f"transformers, {name} at {point}", told)
    assert len(told.ties) <= told.places // 20
    exact = compare(exported, "full", held_out, follow)  # float32 activations on both sides: nothing but sums differs
    report(f"transformers, {name} at {point}, against our full point of the export", exact)
    assert exact.noise < 1e-2
    assert not exact.ties
