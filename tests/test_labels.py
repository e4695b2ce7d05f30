"""A model that was taught labels decides from one row of logits: the labels' own tokens, and no end after them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from haomiao import LLM
from haomiao.cli.main import main
from haomiao.errors import InputError
from haomiao.models.open import embedded_path
from haomiao.text.tokenizer import Tokenizer

LABELS = {"lights on": 8190, "关灯": 8001, "music": 77}


def taught(folder: Path, labels: Any) -> Path:
    """The embedded model, as if it had been taught labels."""
    shutil.copytree(embedded_path(), folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"haomiao": {"labels": labels, "prompt": "{text}\n"}}))
    return folder


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(str(taught(tmp_path_factory.mktemp("model") / "labelled", LABELS)), threads=1, point="int8") as opened:
        yield opened


def test_a_choice_among_labels_is_one_row(llm: LLM) -> None:
    assert llm.labels == tuple(LABELS)
    prompt = "it is dark in here\n"
    found = llm.choose(prompt, llm.labels)
    row = llm.logits(llm.tokenize(prompt, special=True))[-1].astype(np.float64)
    row -= row.max()
    wanted = row - np.log(np.exp(row).sum())
    assert found.scores == pytest.approx([wanted[id_] for id_ in LABELS.values()], abs=1e-5)
    assert found.option == max(LABELS, key=lambda label: wanted[LABELS[label]])
    assert llm.choose(prompt, ["music", "关灯"]).scores == pytest.approx([wanted[77], wanted[8001]], abs=1e-5)


def test_session_and_batch_choose_alike(llm: LLM) -> None:
    prompt = "it is dark in here\n"
    alone = llm.choose(prompt, llm.labels)
    with llm.session() as session:
        session.feed(prompt)
        assert session.choose(llm.labels).scores == alone.scores
    assert llm.choose(llm.tokenize(prompt, special=True), llm.labels).scores == alone.scores


def test_decide_asks_as_it_was_taught(llm: LLM) -> None:
    alone = llm.choose("it is dark in here\n", llm.labels)
    found = llm.decide("it is dark in here")
    assert (found.option, found.scores) == (alone.option, alone.scores)
    with LLM(threads=1) as plain, pytest.raises(InputError, match="taught no labels"):
        plain.decide("it is dark in here")


def test_the_command_needs_no_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(taught(tmp_path / "model", LABELS))
    assert main(["choose", folder, "it is dark in here", "--quiet", "--threads", "1"]) == 0
    assert capsys.readouterr().out.strip() in LABELS
    assert main(["choose", "it is dark in here", "--quiet", "--threads", "1"]) == 2
    assert "taught no labels" in capsys.readouterr().err


def test_other_options_are_text(llm: LLM) -> None:
    with LLM(threads=1, point="int8") as plain:
        assert plain.labels == ()
        for options in (["music", "dance"], ["yes", "no"]):
            assert llm.choose("what now?\n", options).scores == plain.choose("what now?\n", options).scores


def test_saving_keeps_labels(llm: LLM, tmp_path: Path) -> None:
    assert llm._requests.tokenizer is not None
    llm._requests.tokenizer.save(tmp_path)
    again = Tokenizer(tmp_path)
    assert (again.labels, again.label_prompt) == (LABELS, "{text}\n")
    assert again.encode_options(["music", "关灯"]) == [[77], [8001]]
    assert again.encode_options(["music", "dance"]) == [again.encode_part(text, False) for text in ("music", "dance")]


@pytest.mark.parametrize(
    "labels", [[], "music", {"": 1}, {"a": 1, "b": 1}, {"a": -1}, {"a": True}, {"a": 1.0}, {"a": 1 << 40}, {"a": [1]}]
)
def test_what_is_no_table_of_labels_is_none(labels: Any, tmp_path: Path) -> None:
    assert Tokenizer(taught(tmp_path / "model", labels)).labels == {}


def test_a_code_beyond_the_vocabulary_is_refused_in_one_line(tmp_path: Path) -> None:
    from haomiao.errors import HaomiaoError

    with LLM(str(taught(tmp_path / "model", {"a": 8191, "b": 9000})), threads=1) as wrong:
        with pytest.raises(HaomiaoError, match="9000"):
            wrong.choose("what now?\n", ["a", "b"])
        assert wrong.choose("what now?\n", ["yes", "no"]).option in ("yes", "no")
