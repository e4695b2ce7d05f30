"""Serve a model over HTTP with an OpenAI-compatible API, budgets in milliseconds and receipts.

MODEL as everywhere (default: the embedded one). Loopback only, unless --host says otherwise. Every flag has a twin in
the environment, HAOMIAO_<FLAG>; a flag wins over its variable. SIGTERM drains, a second one ends at once.
"""

from __future__ import annotations

import os
import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from typing import Any

from haomiao.cli import options, terminal
from haomiao.errors import InputError


def tokens(text: str) -> int:
    """A number of tokens: 4096, 32k or 32K (of 1024)."""
    digits, factor = (text[:-1], 1024) if text[-1:] in ("k", "K") else (text, 1)
    return _whole(digits, text, "a number of tokens, such as 4096 or 32k") * factor


def memory(text: str) -> int:
    """A number of bytes: 500M, 2G (of 1024), or plain."""
    factor = {"k": 10, "m": 20, "g": 30}.get(text[-1:].lower())
    digits = text if factor is None else text[:-1]
    return _whole(digits, text, "a number of bytes, such as 500M or 2G") << (factor or 0)


def _whole(digits: str, text: str, what: str) -> int:
    try:
        return options.positive(digits)
    except ArgumentTypeError:
        raise ArgumentTypeError(f"must be {what}, not {text!r}") from None


def listed(text: str) -> tuple[str, ...]:
    """Names separated by commas; at least one, so that an empty variable in a script leaves no server without keys."""
    names = tuple(part for part in (each.strip() for each in text.split(",")) if part)
    if not names:
        raise ArgumentTypeError("is empty")
    return names


def origins(text: str) -> tuple[str, ...]:
    """Origins as browsers send them, separated by commas."""
    found = tuple(each.lower().removesuffix("/") for each in listed(text))
    for each in found:
        if not re.fullmatch(r"https?://[^/?#@\s]+", each):
            raise ArgumentTypeError(f"must be like https://example.org:8443, not {each!r}")
    return found


def points(text: str) -> tuple[str, ...]:
    """Operating points separated by commas."""
    check = options.one_of(options.POINT_NAMES)
    return tuple(check(each) for each in listed(text))


def flag(text: str) -> bool:
    """A switch, as its variable writes it."""
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ArgumentTypeError(f"must be true or false, not {text!r}")


def seconds(text: str) -> float:
    """A time of more than 0."""
    value = options.number(text)
    if value <= 0:
        raise ArgumentTypeError(f"must be more than 0, not {text!r}")
    return value


def kl(text: str) -> float:
    """A divergence, nats per token."""
    value = options.number(text)
    if value < 0:
        raise ArgumentTypeError(f"must be at least 0, not {text!r}")
    return value


def part(text: str) -> float:
    """A share of 0 to 1."""
    value = options.number(text)
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"must be from 0 to 1, not {text!r}")
    return value


def share(text: str) -> float:
    """What of all bounds may be promised to hold."""
    value = options.number(text)
    if not 0.5 <= value <= 0.9999:
        raise ArgumentTypeError(f"must be from 0.5 to 0.9999, not {text!r}")
    return value


FLAGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "host": (str, "address to listen on (default 127.0.0.1)"),
    "port": (options.natural, "default 8000; 0 takes a free one"),
    "api-key": (listed, "key that clients must send; several, separated by commas"),
    "insecure": (flag, "listen beyond loopback without a key"),
    "served-model-name": (listed, "names that requests may use, separated by commas; the first is what answers say"),
    "max-model-len": (tokens, "tokens of prompt and answer, such as 4096 or 32k"),
    "points": (points, "operating points to offer, the default first: int8,int4"),
    "threads": (options.positive, "default: the cores this process may use"),
    "kv": (options.one_of(options.KV_NAMES), f"how K and V are kept: {', '.join(options.KV_NAMES)}"),
    "kv-memory": (memory, "bytes for K and V, such as 500M or 2G"),
    "device": (options.one_of(options.DEVICES), "cpu (default), cuda, or auto"),
    "executor": (options.one_of(options.EXECUTORS), "native, torch, or the slow reference in numpy"),
    "speculate": (str, "who drafts tokens: auto (default), suffix, self, a model, or off"),
    "chat-template": (str, "file with a Jinja template in place of the model's own"),
    "request-templates": (flag, "let requests bring a chat template of their own"),
    "max-kl": (kl, "greatest mean KL, nats per token, of the points that are used: measured, and live"),
    "monitor-rate": (part, "share of steps and answers that the monitor runs again (0.02 with --max-kl)"),
    "coverage": (share, "share of the predicted bounds of budgets that is to hold (default 0.99)"),
    "max-queue": (options.positive, "requests in flight before 429 (default 256)"),
    "rate-limit": (seconds, "requests a minute per key, or per address without keys"),
    "max-body": (memory, "bytes of a request body (default 4M)"),
    "receive-timeout": (seconds, "seconds for a request's headers, and for its body (default 10)"),
    "stall-timeout": (seconds, "seconds that a stream may be left unread (default 30)"),
    "idle-timeout": (seconds, "seconds that a realtime connection may stay silent (default 300)"),
    "drain-timeout": (seconds, "seconds to finish what runs after SIGTERM (default 30)"),
    "watchdog": (seconds, "seconds without a step before a busy engine is killed (default 5)"),
    "tls-cert": (str, "certificate chain in PEM form"),
    "tls-key": (str, "its private key"),
    "allow-origin": (origins, "origins that may open the WebSocket, besides the server's own"),
    "log-level": (options.one_of(("debug", "info", "warning", "error")), "default info: one JSON line a request"),
}
"""Flag -> (type, help). The variable is HAOMIAO_ and the flag in capitals."""
SWITCHES = ("insecure", "request-templates")


def configure(parser: ArgumentParser) -> None:
    """Declare the flags."""
    options.add_model(parser)
    for name, (convert, help_) in FLAGS.items():
        shown = f"{help_} [{variable(name)}]"
        if name in SWITCHES:
            parser.add_argument(f"--{name}", action="store_const", const=True, default=None, help=shown)
        else:
            parser.add_argument(f"--{name}", type=convert, default=None, help=shown)
    parser.add_argument("--quiet", action="store_true", help="no start-up line, no progress bar")


def variable(name: str) -> str:
    """The environment's twin of a flag."""
    return "HAOMIAO_" + name.upper().replace("-", "_")


def run(args: Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    model = options.take_model(args)
    given = take_flags(args)

    from haomiao.serve.server import read_template, serve
    from haomiao.serve.settings import Limits, Settings

    def renamed(names: dict[str, str]) -> dict[str, Any]:
        return {field: given[name] for name, field in names.items() if given.get(name) is not None}

    limits = renamed(
        {
            "max-body": "body_bytes",
            "receive-timeout": "receive_seconds",
            "stall-timeout": "stall_seconds",
            "idle-timeout": "idle_seconds",
            "max-queue": "queue",
            "rate-limit": "rate",
            "drain-timeout": "drain_seconds",
            "watchdog": "watchdog_seconds",
        }
    )
    loading = renamed(
        {
            "max-model-len": "max_context",
            "threads": "threads",
            "kv": "kv",
            "kv-memory": "kv_memory",
            "device": "device",
            "executor": "executor",
            "speculate": "speculate",
            "points": "points",
            "max-kl": "max_kl",
            "coverage": "coverage",
            "monitor-rate": "monitor_rate",
        }
    )
    for name in ("revision", "offline"):
        if getattr(args, name) is not None:
            loading[name] = getattr(args, name)
    if given.get("points"):
        loading["point"] = given["points"][0]
    template = given.get("chat-template")
    settings = Settings(
        model=model,
        options=loading,
        chat_template=None if template is None else read_template(template),
        limits=Limits(**limits),
        **renamed(
            {
                "host": "host",
                "port": "port",
                "api-key": "api_keys",
                "insecure": "insecure",
                "served-model-name": "served_names",
                "request-templates": "request_templates",
                "points": "points",
                "max-kl": "max_kl",
                "tls-cert": "tls_cert",
                "tls-key": "tls_key",
                "allow-origin": "origins",
                "log-level": "log_level",
            }
        ),
    )
    return serve(settings, announce=None if args.quiet else announce)


def announce(url: str, hello: Any) -> None:
    """The start-up line: where, what, at which points, with which error."""
    measured = [f"{point} {hello.errors[point]:.4f}" for point in hello.points if point in hello.errors]
    error = f"error {', '.join(measured)} nats/token" if measured else "error not measured"
    terminal.note(f"haomiao: {url} · {hello.model} · points {' '.join(hello.points)} · {error}")


def take_flags(args: Namespace) -> dict[str, Any]:
    """Values by flag, from the command line or the environment. Raises `InputError` naming the variable."""
    values: dict[str, Any] = {}
    for name, (convert, _) in FLAGS.items():
        value = getattr(args, name.replace("-", "_"))
        text = os.environ.get(variable(name))
        if value is None and text:
            try:
                value = convert(text)
            except ArgumentTypeError as error:
                raise InputError(f"{variable(name)} {error}", param=variable(name)) from error
        values[name] = value
    return values
