"""Talk with a model. The conversation is kept until `/exit` (or end of input).

Ctrl-C ends the answer that is being given, not the program. From a pipe, every line of standard input is one turn.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from haomiao.cli import options, terminal
from haomiao.errors import HaomiaoError
from haomiao.progress import ProgressBar

PLAIN_STOP = "\nUser:"
HELP = "/exit leaves, /clear forgets the conversation, /help shows this"


def configure(parser: ArgumentParser) -> None:
    """Declare the flags."""
    options.add_model(parser)
    options.add_runtime(parser)
    options.add_speculation(parser)
    options.add_sampling(parser)
    options.add_constraints(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    options.add_budget(parser)
    parser.add_argument("--json", action="store_true", help="print one object at the end instead of the text")
    parser.add_argument("--quiet", action="store_true", help="no receipt lines, no progress bar")


def run(args: Namespace) -> int:
    """Converse until the input ends."""
    model = options.take_model(args)
    asked = options.sampling_options(args)

    from haomiao.api import LLM

    with ProgressBar(quiet=args.quiet) as bar:
        llm = LLM(model, progress=bar, **options.runtime_options(args))
    try:
        talk = Conversation(llm, asked, system=args.system, as_json=args.json, quiet=args.quiet)
        return talk.interactive() if sys.stdin.isatty() else talk.piped()
    finally:
        llm.close()


class Conversation:
    """The messages so far, and how the next answer is asked for and shown."""

    def __init__(
        self, llm: Any, asked: dict[str, Any], *, system: str | None = None, as_json: bool = False, quiet: bool = False
    ) -> None:
        self._llm = llm
        self._asked = asked
        self._system = system
        self._as_json = as_json
        self._quiet = quiet
        self._receipt: Any = None
        self.messages: list[dict[str, str]] = []
        self.clear()
        self._templated = getattr(llm.tokenizer, "chat_template", None) is not None
        if not self._templated:
            terminal.note("this model has no chat template: it continues the conversation as plain text")

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def interactive(self) -> int:
        """Prompt, answer, repeat. Ends with `/exit` or end of input."""
        import contextlib

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history, where Python was built with it
        terminal.note(HELP)
        while True:
            try:
                line = input("> ")
            except EOFError:
                terminal.note("")
                return 0
            except KeyboardInterrupt:
                terminal.note(f"\n{HELP}")
                continue
            if not self.command(line.strip()):
                return 0

    def command(self, line: str) -> bool:
        """Obey one line. False if it asks to leave. A request that fails is reported and the conversation goes on."""
        if line == "/exit":
            return False
        if line == "/clear":
            self.clear()
        elif line == "/help":
            terminal.note(HELP)
        elif line:
            try:
                self.answer(line)
            except HaomiaoError as error:
                terminal.note(f"haomiao: {error}")
        return True

    def piped(self) -> int:
        """Every line that is not empty is one turn; the first that fails ends the command."""
        for line in terminal.read_input("standard input").splitlines():
            if line.strip() == "/exit":
                break
            if line.strip():
                self.answer(line)
        if self._as_json:
            receipt = self._receipt.as_dict() if self._receipt is not None else {}
            terminal.write_json({"messages": self.messages, "receipt": receipt})
        return 0

    def _ask(self) -> Any:
        """A stream of the next answer."""
        if self._templated:
            return self._llm.chat(list(self.messages), stream=True, **self._asked)
        stops = (*self._asked.get("stop", ()), PLAIN_STOP)
        return self._llm.stream(plain_text(self.messages), **{**self._asked, "stop": stops})

    def answer(self, question: str) -> None:
        """Ask, stream the answer, remember both. Of an answer that was interrupted, what was shown is remembered.

        If the request fails before it says anything, the question is taken back.
        """
        self.messages.append({"role": "user", "content": question})
        said: list[str] = []
        receipt = finish_reason = None
        stream = iter(self._ask())
        try:
            for chunk in stream:
                said.append(chunk.text)
                if not self._as_json:
                    terminal.write_text(chunk.text)
                finish_reason = chunk.finish_reason or finish_reason
                receipt = chunk.receipt or receipt
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            finish_reason = "interrupted"
        except HaomiaoError:
            self.messages.pop()
            raise
        finally:
            close = getattr(stream, "close", None)  # ends the request in the engine
            if close is not None:
                close()
        spoken = "".join(said)
        self.messages.append({"role": "assistant", "content": spoken if self._templated else spoken.strip()})
        self._receipt = receipt or self._receipt
        if not self._as_json:
            terminal.write_text("\n")
            if not self._quiet and receipt is not None:
                terminal.note(terminal.receipt_line(receipt.as_dict(), finish_reason))


def plain_text(messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation as a transcript that breaks off where the assistant speaks next."""
    lines = [
        message["content"] if message["role"] == "system" else f"{message['role'].capitalize()}: {message['content']}"
        for message in messages
    ]
    return "\n".join([*lines, "Assistant:"])
