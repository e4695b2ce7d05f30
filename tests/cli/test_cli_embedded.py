"""The whole way with the embedded model: what the README's first command does, and how the commands fit together."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from haomiao.cli.main import main
from haomiao.models.open import ASSETS, EMBEDDED

pytestmark = pytest.mark.skipif(
    not (ASSETS / EMBEDDED / "model.haomiao").exists(), reason="this installation has no embedded model"
)


def answer_of(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main([*argv, "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return answer


def feed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    stdin = SimpleNamespace(buffer=io.BytesIO(text.encode()), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", stdin)


def test_text_appears(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "Once upon a time", "--max-tokens", "12"]) == 0
    out, err = capsys.readouterr()
    assert len(out.strip()) > 0
    assert "12 tokens" in err
    assert "tok/s" in err


def test_a_prompt_that_looks_whole_is_continued(capsys: pytest.CaptureFixture[str]) -> None:
    answer = answer_of(capsys, "generate", "今天天气很好，阳光明媚，适合出门散步。", "--max-tokens", "24")
    assert len(answer["token_ids"]) >= 16
    assert answer["text"].strip()


def test_the_same_seed_gives_the_same_answer(capsys: pytest.CaptureFixture[str]) -> None:
    ask = ("generate", "从前", "--max-tokens", "10", "--temperature", "0.9", "--seed", "5")
    first, second = answer_of(capsys, *ask), answer_of(capsys, *ask, "--threads", "1")
    assert first["token_ids"] == second["token_ids"]
    assert first["receipt"]["seed"] == 5


def test_constraints_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer_of(capsys, "generate", "Yes or no?", "--choice", "yes", "--choice", "no")["text"] in ("yes", "no")
    number = answer_of(capsys, "generate", "The year was ", "--regex", "1[0-9]{3}")["text"]
    assert number.isdigit()
    assert len(number) == 4


def test_ids_and_back(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Once upon a time,  今天\n"
    feed(monkeypatch, text)
    ids = answer_of(capsys, "tokenize")
    assert ids["count"] == len(ids["token_ids"]) > 4
    feed(monkeypatch, json.dumps(ids))
    assert main(["detokenize"]) == 0
    assert capsys.readouterr().out == text


def test_bench_and_eval(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    report = answer_of(capsys, "bench", "--prompt-tokens", "40", "--new-tokens", "5", "--streams", "2", "--repeat", "1")
    assert report["streams"] == 2
    assert report["read_gb_s"] == pytest.approx(report["bytes_per_token"] * report["decode_tok_s"] / 1e9)
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times, it was the age of wisdom. " * 3)
    ask = ("eval", "--text", str(text), "--window", "32", "--point", "int4", "--against", "int8")
    measured = answer_of(capsys, *ask)
    assert measured["reference"]["point"] == "int8"
    (figures,) = measured["points"].values()
    assert figures["kl_mean"] >= 0
    assert 0 <= figures["top1"] <= 1
    assert figures["ms_per_token"] > 0
    assert figures["bytes"] > 1e6


def test_eval_of_every_point_and_a_task(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    text, task = tmp_path / "text.txt", tmp_path / "task.jsonl"
    text.write_text("It was the best of times, it was the worst of times, it was the age of wisdom. " * 3)
    task.write_text('{"prompt": "Once upon a", "choices": [" time", " qzx"], "answer": " time"}\n')
    ask = ("eval", "--text", str(text), "--task", str(task), "--window", "32", "--tokens", "64", "--no-speed")
    measured = answer_of(capsys, *ask)
    assert list(measured["points"]) == ["int8", "int4"]
    for figures in measured["points"].values():
        assert figures["perplexity"] > 1
        assert (figures["kl_mean"], figures["ms_per_token"]) == (None, None)
        assert figures["task"] == {"accuracy": 1.0, "accuracy_pm": 0.0, "questions": 1}
    assert main(["eval", "--text", str(text), "--tokens", "64", "--no-speed", "--quiet"]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main(["eval"]) == 2


def test_chat_from_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    feed(monkeypatch, "hello\nand then?\n")
    talk = answer_of(capsys, "chat", "--max-tokens", "6")
    assert [message["role"] for message in talk["messages"]] == ["user", "assistant", "user", "assistant"]


def test_too_long_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a b c d e f g h " * 20, "--max-context", "64"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_show_verifies_the_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    about = answer_of(capsys, "show", "--verify")
    assert about["verified"] is True
    assert about["points"] == ["int8", "int4"]
    assert "/" not in json.dumps(about["provenance"])  # no path of the machine that made it
