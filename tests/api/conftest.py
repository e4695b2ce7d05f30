"""One tiny model for all of a module, run by the reference executor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("haomiao._core", reason="the compiled core is not built")

from haomiao.api import LLM
from tests.api.tiny import CONFIG, write_tokenizer
from tests.golden.checkpoint import random_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.numpy import save_file

    directory = tmp_path_factory.mktemp("tiny")
    (directory / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    save_file(random_checkpoint(CONFIG, 3), str(directory / "model.safetensors"))
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAOMIAO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def llm(checkpoint: Path, cache: None) -> Iterator[LLM]:
    with LLM(checkpoint, executor="reference") as opened:
        yield opened
