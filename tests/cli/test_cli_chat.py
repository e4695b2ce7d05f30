"""`haomiao chat`: turns from a pipe, history, interruption, commands."""

from __future__ import annotations

import builtins
import io
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from haomiao.cli.main import main
from haomiao.errors import InputError


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode()), isatty=lambda: False))


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """A person at a terminal: each line is typed, or a key pressed that raises."""
    waiting = iter(lines)

    def answer(_: str = "") -> str:
        line = next(waiting, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))


def test_every_line_of_a_pipe_is_a_turn(
    fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "hello\n\nand now?\n/exit\nnever\n")
    assert main(["chat", "m", "--system", "be brief", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out == "Hello, world\nHello, world\n"
    assert [message["role"] for message in fake.asked[0][0]] == ["system", "user"]
    assert fake.asked[1][0] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hello, world"},
        {"role": "user", "content": "and now?"},
    ]
    assert fake.asked[1][1] == {"max_tokens": 4}
    assert len(fake.asked) == 2


def test_json_gives_the_conversation(
    fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "hello\n")
    assert main(["chat", "--json"]) == 0
    talk = json.loads(capsys.readouterr().out)
    assert [message["role"] for message in talk["messages"]] == ["user", "assistant"]
    assert talk["receipt"]["completion_tokens"] == 3


def test_interrupt_ends_the_answer_and_not_the_conversation(
    fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.raises, fake.raises_after = KeyboardInterrupt(), 2
    type_lines(monkeypatch, "hello", KeyboardInterrupt, "again", "/exit")
    assert main(["chat"]) == 0
    assert capsys.readouterr().out == "Hello, \nHello, \n"
    assert fake.asked[1][0][1] == {"role": "assistant", "content": "Hello, "}


def test_interrupt_in_a_pipe_ends_everything(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.raises = KeyboardInterrupt()
    pipe(monkeypatch, "hello\nagain\n")
    assert main(["chat"]) == 130
    assert (len(fake.asked), fake.closed) == (1, 1)


def test_clear_and_help_and_end_of_input(
    fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines(monkeypatch, "one", "/clear", "/help", "two")
    assert main(["chat", "--quiet"]) == 0
    assert fake.asked[1][0] == [{"role": "user", "content": "two"}]
    assert "/clear forgets" in capsys.readouterr().err


def test_a_refused_turn_is_taken_back(
    fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.raises = InputError("too long")
    type_lines(monkeypatch, "one", "two")
    assert main(["chat"]) == 0
    assert fake.asked[1][0] == [{"role": "user", "content": "two"}]
    assert capsys.readouterr().err.count("haomiao: too long") == 2
    pipe(monkeypatch, "one\n")
    assert main(["chat"]) == 2


def test_a_model_without_a_template_continues_a_transcript(
    fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.model.tokenizer = SimpleNamespace(chat_template=None)
    pipe(monkeypatch, "hello\nand now?\n")
    assert main(["chat", "--system", "Be brief.", "--stop", "!"]) == 0
    assert "no chat template" in capsys.readouterr().err
    transcript = "Be brief.\nUser: hello\nAssistant: Hello, world\nUser: and now?\nAssistant:"
    assert fake.asked[1] == (transcript, {"stop": ("!", "\nUser:")})
