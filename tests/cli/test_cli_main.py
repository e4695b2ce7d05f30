"""The entry point: help, versions, typing mistakes, closed pipes, and how little it imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

from haomiao import __version__
from haomiao.cli.main import COMMANDS, main


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["-h"]):
        assert main(argv) == 0
        out = capsys.readouterr().out
        assert all(f"  {name}" in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"usage: haomiao {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_unknown_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--no-such-flag"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"haomiao {__version__}\n"


def test_a_near_miss_is_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["genrate"]) == 2
    assert "did you mean 'generate'" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"], ["bench", "--help"], ["generate"]])
def test_help_and_mistakes_import_nothing_heavy(argv: list[str]) -> None:
    done = python(
        "import sys\nfrom haomiao.cli.main import main\n"
        f"main({argv!r})\n"
        "heavy = {'numpy', 'tokenizers', 'jinja2', 'rich', 'huggingface_hub', 'safetensors', 'torch', 'msgspec'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []", done.stderr


def test_python_m_haomiao() -> None:
    done = subprocess.run([sys.executable, "-m", "haomiao", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"haomiao {__version__}\n")


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = "import sys, haomiao.cli.main as m\nm.overview = lambda: 'x' * 1_000_000\nsys.exit(m.main(['--help']))"
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.read(10)
    writer.stdout.close()
    assert writer.wait(timeout=60) == 141
    assert writer.stderr.read() == b""
    writer.stderr.close()
