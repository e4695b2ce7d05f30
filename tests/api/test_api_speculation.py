"""Speculation as a caller of `LLM` meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from haomiao.api import LLM
from haomiao.errors import InputError, ModelNotFoundError
from tests.api.tiny import CONFIG
from tests.golden.checkpoint import random_checkpoint


def test_speculation_changes_no_answer(llm: LLM, checkpoint: Path) -> None:
    options: list[dict[str, Any]] = [
        {"max_tokens": 40},
        {"max_tokens": 30, "temperature": 0.8, "seed": 5, "logprobs": 2, "repetition_penalty": 1.1},
        {"max_tokens": 30, "regex": "[ab]{3,20}c"},
        {"max_tokens": 24, "temperature": 1.0, "seed": 7, "n": 2},
        {"max_tokens": 40, "stop": "e", "ignore_eos": True},
    ]

    def told(model: LLM, way: str | None) -> list[Any]:
        found: list[Any] = []
        for each in options:
            answer = model.generate("the sea the sea the s", **each, **({} if way is None else {"speculate": way}))
            answers = answer if isinstance(answer, list) else [answer]
            found.append([(one.token_ids, one.text, one.finish_detail, one.logprobs) for one in answers])
        return found

    expected = told(llm, "off")
    assert told(llm, None) == told(llm, "suffix") == told(llm, "self") == expected
    with LLM(checkpoint, executor="reference", speculate=checkpoint) as drafted:  # as slow as the model itself
        receipt = drafted.generate("the sea", max_tokens=40, ignore_eos=True).receipt
        assert receipt.as_dict()["drafted_tokens"] == receipt.drafted_tokens >= receipt.accepted_tokens
        assert receipt.drafted_tokens, "it is tried before it is given up"
        assert told(drafted, None) == expected


def test_ways_to_speculate_that_there_are_not(llm: LLM, checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    with pytest.raises(InputError, match="speculate must be one of off, auto, suffix, self, not 'draft'"):
        llm.generate("a", speculate="draft")
    with pytest.raises(InputError, match="speculate must be"):
        LLM(checkpoint, executor="reference", speculate=3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="needs a model with the points int4 and int8"):
        LLM(checkpoint, executor="reference", point="full", speculate="self")
    with pytest.raises(ModelNotFoundError):
        LLM(checkpoint, executor="reference", offline=True, speculate=str(tmp_path / "nothing"))
    other = {**CONFIG, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(other), encoding="utf-8")
    save_file(random_checkpoint(other, 3), str(tmp_path / "model.safetensors"))
    with pytest.raises(InputError, match="its vocabulary is another one"):
        LLM(checkpoint, executor="reference", speculate=str(tmp_path))
