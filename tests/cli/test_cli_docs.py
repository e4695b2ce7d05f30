"""The documents keep up with the program: every command, flag, variable and exit code stands in both manuals, and the
two READMEs give the same commands."""

from __future__ import annotations

import importlib
import re
from argparse import ArgumentParser
from pathlib import Path

import pytest

from haomiao.cli.main import COMMANDS, EXIT_INTERRUPTED, EXIT_PIPE, Parser
from haomiao.cli.options import ENVIRONMENT
from haomiao.errors import HaomiaoError

ROOT = Path(__file__).resolve().parents[2]
MANUALS = ("docs/manual.md", "docs/manual.zh-CN.md")


def read(name: str) -> str:
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"{name} is not beside the tests")
    return path.read_text(encoding="utf-8")


def parser_of(command: str) -> ArgumentParser:
    parser = Parser(prog=command)
    importlib.import_module(f"haomiao.cli.{command}").configure(parser)
    return parser


@pytest.mark.parametrize("manual", MANUALS)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_flag_is_in_the_manual(manual: str, command: str) -> None:
    text = read(manual)
    flags = [flag for action in parser_of(command)._actions for flag in action.option_strings]
    missing = [flag for flag in flags if flag not in ("-h", "--help") and f"`{flag}" not in text]
    assert not missing
    assert f"haomiao {command}" in text


@pytest.mark.parametrize("manual", MANUALS)
def test_every_variable_and_exit_code_is_in_the_manual(manual: str) -> None:
    text = read(manual)
    variables = {variable for variable, _ in ENVIRONMENT.values()} | {"HAOMIAO_CACHE", "HAOMIAO_OFFLINE", "HAOMIAO_ISA"}
    assert not [variable for variable in variables if f"`{variable}`" not in text]

    def leaves(kind: type[HaomiaoError]) -> set[int]:
        return {kind.exit_code}.union(*(leaves(child) for child in kind.__subclasses__()))

    codes = leaves(HaomiaoError) | {EXIT_INTERRUPTED, EXIT_PIPE}
    assert not [code for code in codes if not re.search(rf"^\| {code} \|", text, re.MULTILINE)]


@pytest.mark.parametrize(("english", "chinese"), [("README.md", "README.zh-CN.md"), MANUALS])
def test_both_languages_hold_the_same(english: str, chinese: str) -> None:
    def shape(text: str) -> tuple[list[str], list[int], int]:
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        commands = [re.sub(r"\s+#.*", "", block) for block in blocks]
        headings = [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)]
        return commands, headings, len(re.findall(r"^\|", text, re.MULTILINE))

    assert shape(read(english)) == shape(read(chinese))


def test_the_first_screen_of_the_readme_has_exactly_two_set_up_commands() -> None:
    text = read("README.md")
    first_screen = "\n".join(text.splitlines()[:20])
    assert re.findall(r"^pip .*$", text, re.MULTILINE) == re.findall(r"^pip .*$", first_screen, re.MULTILINE)
    assert re.findall(r"^pip .*$", text, re.MULTILINE) == [
        'pip install . && haomiao generate "Once upon a time" --temperature 0.7 --seed 1',
        "pip install '.[test]' && pytest",
    ]
