"""Without PyTorch each command says in one line what to install."""

from __future__ import annotations

import importlib.util

import pytest

from haomiao.cli.main import main


@pytest.mark.parametrize(
    ("command", "arguments"),
    [("finetune", ["--data", "d", "-o", "o"]), ("distill", ["--teacher", "t", "--student", "s", "-o", "o"])],
)
def test_one_line_says_what_to_install(
    command: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([command, *arguments]) == 7
    assert capsys.readouterr().err == f"haomiao: haomiao {command} needs PyTorch: pip install 'haomiao[torch]'\n"
