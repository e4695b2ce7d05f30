"""`haomiao generate`: which word is the model, what is asked of it, and what is printed."""

from __future__ import annotations

import io
import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from haomiao.cli.main import main
from haomiao.errors import BudgetError, DownloadError


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False))


@pytest.mark.parametrize(
    ("argv", "model", "prompt"),
    [
        (["hi"], None, "hi"),
        (["org/m", "hi"], "org/m", "hi"),
        (["org/m", "--max-tokens", "5", "hi"], "org/m", "hi"),
        (["--model", "org/m", "hi"], "org/m", "hi"),
        (["hi", "--model", "org/m"], "org/m", "hi"),
        (["org/m", "--", "--not-a-flag"], "org/m", "--not-a-flag"),
        (["org/m", ""], "org/m", ""),
    ],
)
def test_one_word_is_the_prompt_and_two_are_model_and_prompt(
    fake: Any, argv: list[str], model: str | None, prompt: str
) -> None:
    assert main(["generate", *argv]) == 0
    assert fake.opened[0][0] == model
    assert fake.asked[0][0] == prompt
    assert fake.closed == 1


def test_text_on_stdout_and_one_receipt_line_on_stderr(fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "hi"]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello, world\n"
    assert err.count("\n") == 1
    for part in (
        "no budget",
        "3 tokens (stop)",
        "ttft 12.0 ms",
        "10.00 ms/token",
        "100.0 tok/s",
        "point int8",
        "error",
    ):
        assert part in err


def test_quiet_prints_the_text_alone(fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "hi", "--quiet"]) == 0
    assert capsys.readouterr() == ("Hello, world\n", "")


def test_json_is_one_object_on_the_last_line(fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "hi", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["text"] == "Hello, world"
    assert answer["token_ids"] == [1, 2, 3]
    assert answer["finish_reason"] == "stop"
    assert answer["receipt"]["schedule"] == [{"point": "int8", "steps": 3, "tokens": 3}]


def test_every_flag_reaches_the_model(fake: Any, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    argv = shlex.split(
        "m hi --max-tokens 9 --min-tokens 2 --temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 --seed 7"
    )
    argv += shlex.split("--repetition-penalty 1.1 --presence-penalty 0.2 --frequency-penalty 0.3 --ignore-eos")
    argv += ["--stop", "\n", "--stop", "END", "--budget-ms", "50", "--json-schema", str(schema)]
    argv += shlex.split("--point int4 --threads 3 --max-context 128 --kv int8 --device cpu --executor reference")
    argv += ["--revision", "main", "--offline"]
    assert main(["generate", *argv]) == 0
    assert fake.opened[0][1] == {
        **{
            "point": "int4",
            "threads": 3,
            "max_context": 128,
            "kv": "int8",
            "revision": "main",
            "offline": True,
            "executor": "reference",
            "device": "cpu",
        }
    }
    assert fake.asked[0][1] == {
        **{"max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "seed": 7},
        **{"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3, "ignore_eos": True},
        **{"stop": ("\n", "END"), "budget_ms": 50.0, "json_schema": '{"type": "object"}'},
    }


def test_flags_that_were_not_given_are_not_passed(fake: Any) -> None:
    assert main(["generate", "m", "hi"]) == 0
    assert fake.opened[0][1] == {}
    assert fake.asked[0][1] == {}


def test_the_embedded_model_is_sampled_unless_something_is_said(fake: Any) -> None:
    for argv in (["hi"], ["hi", "--max-tokens", "4"], ["hi", "--temperature", "0"], ["hi", "--choice", "yes"]):
        assert main(["generate", *argv]) == 0
    plain, short, greedy, chosen = (asked for _, asked in fake.asked)
    assert plain == {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1, "min_tokens": 16, "seed": 1}
    assert short == plain | {"min_tokens": 4, "max_tokens": 4}
    assert greedy == {"temperature": 0.0}
    assert chosen == {"choice": ["yes"]}


def test_a_budget_leaves_the_embedded_model_sampled_but_no_least_length(fake: Any) -> None:
    assert main(["generate", "hi", "--budget-ms", "200"]) == 0
    sampled = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 1}
    assert fake.asked[0][1] == sampled | {"min_tokens": 0, "budget_ms": 200.0}


def test_choice_and_regex(fake: Any) -> None:
    assert main(["generate", "hi", "--choice", "yes", "--choice", "no"]) == 0
    assert main(["generate", "hi", "--regex", "[0-9]+"]) == 0
    assert fake.asked[0][1] == {"choice": ["yes", "no"]}
    assert fake.asked[1][1] == {"regex": "[0-9]+"}


def test_dash_reads_standard_input(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    feed(monkeypatch, "从前\n\n".encode())
    assert main(["generate", "m", "-"]) == 0
    assert fake.asked[0][0] == "从前\n"


def test_standard_input_that_is_not_utf8(
    fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, b"ab\xff")
    assert main(["generate", "-"]) == 2
    assert capsys.readouterr().err == "haomiao: the prompt is not UTF-8 (byte 2)\n"


def test_environment_twins_and_their_flags(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MODEL": "env/m", "THREADS": "4", "POINT": "int4", "MAX_CONTEXT": "64", "KV": "bf16"}.items():
        monkeypatch.setenv(f"HAOMIAO_{name}", value)
    assert main(["generate", "hi", "--threads", "1"]) == 0
    assert main(["generate", "other", "hi"]) == 0
    assert fake.opened[0] == ("env/m", {"threads": 1, "point": "int4", "max_context": 64, "kv": "bf16"})
    assert fake.opened[1][0] == "other"


@pytest.mark.parametrize(
    ("variable", "value"),
    [("THREADS", "0"), ("THREADS", "many"), ("POINT", "int3"), ("MAX_CONTEXT", "-1"), ("KV", "f64")],
)
def test_a_variable_out_of_range_is_named(
    fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, value: str
) -> None:
    monkeypatch.setenv(f"HAOMIAO_{variable}", value)
    assert main(["generate", "hi"]) == 2
    assert f"HAOMIAO_{variable}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["a", "b", "c"],
        ["a", "b", "--model", "c"],
        ["hi", "--threads", "0"],
        ["hi", "--temperature", "nan"],
        ["hi", "--temperature", "inf"],
        ["hi", "--seed", "-1"],
        ["hi", "--point", "int3"],
        ["hi", "--regex", "a", "--choice", "b"],
        ["hi", "--unknown"],
        ["hi", "--temp", "1"],  # flags are not guessed from a prefix
        ["hi", "--json-schema", "/nonexistent/schema.json"],
        ["missing/m", "hi"],
    ],
)
def test_mistakes_end_with_one_line_and_code_2(fake: Any, capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert main(["generate", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("haomiao: ")
    assert err.count("\n") == 1


def test_errors_of_the_engine_keep_their_exit_codes(fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for error, code in ((DownloadError("offline"), 3), (BudgetError("needs 80 ms"), 4), (RuntimeError("oh"), 1)):
        fake.raises = error
        assert main(["generate", "hi"]) == code
        assert capsys.readouterr().err.count("\n") == 1
    assert fake.closed == 3


def test_debug_shows_where(fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HAOMIAO_DEBUG", "1")
    fake.raises = RuntimeError("oh")
    assert main(["generate", "hi"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_ends_with_130_and_frees_the_model(fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake.raises, fake.raises_after = KeyboardInterrupt(), 1
    assert main(["generate", "hi"]) == 130
    assert capsys.readouterr().out == "Hello"
    assert fake.closed == 1


def test_a_terminal_never_sees_control_characters(
    fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.says = ["a\x1b[2J", "b\x9b1m\tc\x07\n"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["generate", "hi", "--quiet"]) == 0
    assert capsys.readouterr().out == "a[2Jb1m\tc\n\n"
