"""A really trained model: stories260K at temperature 0 tells the story that llama2.c prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from haomiao.models.open import open_model
from haomiao.text.tokenizer import Tokenizer
from tests.models.runs import EXECUTORS, greedy, make_executor

STEPS = 200


@pytest.mark.parametrize("kind", EXECUTORS)
def test_the_story_that_llama2c_prints(
    kind: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAOMIAO_CACHE", str(tmp_path))
    folder = shared / "data" / "stories260K"
    model = open_model(folder / "hf", point="full")
    tokenizer = Tokenizer(model.files_dir)
    assert tokenizer.bos_id is not None
    tokens = greedy(make_executor(kind, model.artifact, kv_type="f32"), "full", [tokenizer.bos_id], STEPS)
    expected = (folder / "expected_greedy_from_bos.txt").read_text(encoding="utf-8")
    assert tokenizer.decode(tokens).strip() == expected.strip()
    assert model.eos_token_ids == (2,)
