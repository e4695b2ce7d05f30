"""The bar on a terminal, and its silence elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from haomiao.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, **options: bool) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with ProgressBar(**options) as bar:
        bar("reading", 1, 4)
        bar("[writing]", 3, 4, "2 tokens/s")
    return stream.getvalue()


def test_a_terminal_is_told_what_how_far_and_more(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, Terminal())
    assert "[writing]" in text and "75 %" in text and "2 tokens/s" in text
    counted = shown(monkeypatch, Terminal(), counted=True)
    assert "3/4" in counted and "%" not in counted.replace("75%", "")


def test_silent_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, io.StringIO()) == ""
    assert shown(monkeypatch, Terminal(), quiet=True) == ""


def test_no_total_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBar() as bar:
        bar("waiting", 0, 0)
    assert "waiting" in terminal.getvalue()
