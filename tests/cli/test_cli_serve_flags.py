"""Flags of `haomiao serve` and their variables: what is wrong is said in one line, before a model is loaded."""

from __future__ import annotations

from argparse import ArgumentParser

import pytest

from haomiao.cli import serve
from haomiao.errors import InputError

WRONG = {
    "port": ("x", "-1"),
    "api-key": ("", ",", " , "),
    "insecure": ("maybe",),
    "served-model-name": (",",),
    "max-model-len": ("0", "32q", "10M", "-1"),
    "points": ("int9", ",", "int8,int9"),
    "threads": ("0", "two"),
    "kv": ("int3",),
    "kv-memory": ("0", "2Z", "G"),
    "device": ("tpu",),
    "executor": ("jax",),
    "request-templates": ("2",),
    "max-kl": ("-1", "nan", "x"),
    "monitor-rate": ("2", "-0.1"),
    "coverage": ("1.5", "0.1"),
    "max-queue": ("0",),
    "rate-limit": ("0", "inf"),
    "max-body": ("0", "4 MB"),
    "receive-timeout": ("0", "nan"),
    "stall-timeout": ("soon",),
    "idle-timeout": ("-2",),
    "drain-timeout": ("0",),
    "watchdog": ("0",),
    "allow-origin": (",", "example.org", "https://a.org/page", "*"),
    "log-level": ("loud",),
}
RIGHT = {
    "api-key": ("a, b", ("a", "b")),
    "max-model-len": ("32K", 32 * 1024),
    "kv-memory": ("2g", 2 << 30),
    "max-body": ("123", 123),
    "points": ("int4,int8", ("int4", "int8")),
    "insecure": ("off", False),
    "max-kl": ("0.01", 0.01),
    "monitor-rate": ("1", 1.0),
    "allow-origin": ("HTTPS://A.org:8443/,http://b", ("https://a.org:8443", "http://b")),
}
FREE = {"host", "speculate", "chat-template", "tls-cert", "tls-key"}
"""Any text may be one; what is wrong with it shows when it is used."""


def parsed(*arguments: str) -> dict[str, object]:
    parser = ArgumentParser(exit_on_error=True)
    serve.configure(parser)
    return serve.take_flags(parser.parse_args(arguments))


def test_no_flag_is_left_out() -> None:
    assert set(WRONG) | FREE == set(serve.FLAGS)


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in WRONG.items() for text in texts])
def test_wrong_values(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name not in serve.SWITCHES:
        with pytest.raises(SystemExit):
            parsed(f"--{name}={text}")
        assert f"argument --{name}" in capsys.readouterr().err.splitlines()[-1]
    if text:  # an empty variable is one that is not set
        monkeypatch.setenv(serve.variable(name), text)
        with pytest.raises(InputError, match=rf"^{serve.variable(name)} (must|is|needs)") as refused:
            parsed()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", RIGHT)
def test_a_flag_and_its_variable_mean_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = RIGHT[name]
    if name not in serve.SWITCHES:
        assert parsed(f"--{name}={text}")[name] == value
    monkeypatch.setenv(serve.variable(name), text)
    assert parsed()[name] == value
