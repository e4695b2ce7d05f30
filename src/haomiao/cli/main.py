"""Entry point: finds the command, runs it, and turns every ending into an exit code and at most one line on stderr.

Imports nothing but the standard library and the error table, so that `--help` and mistakes in typing cost nothing.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import NoReturn

from haomiao import __version__
from haomiao.errors import EXIT_INTERRUPTED, HaomiaoError, InputError

COMMANDS = {
    "generate": "continue a prompt",
    "chat": "talk with a model",
    "choose": "the likeliest of several continuations, from one reading of the prompt",
    "serve": "serve a model over HTTP: OpenAI's API, budgets in milliseconds, receipts",
    "tokenize": "text on standard input -> token ids",
    "detokenize": "token ids on standard input -> text",
    "compress": "quantize and prune a checkpoint into an artifact, its error measured",
    "distill": "let a student learn from a teacher: recover what compression lost (needs PyTorch)",
    "finetune": "teach a model a task from examples (needs PyTorch)",
    "bench": "measure speed against this machine's ceilings",
    "eval": "measure perplexity, KL divergence and task accuracy of every operating point",
    "doctor": "what this machine has, and what would run how fast on it",
    "pull": "download a model and prepare it",
    "ls": "list prepared models",
    "rm": "remove prepared models",
    "show": "what a model is; --verify checks every byte of an artifact",
}
"""Name -> what it does. The module `haomiao.cli.<name>` holds the command."""

WITHOUT_BLAS = ("generate", "chat", "tokenize", "detokenize", "serve")
"""Commands that multiply no matrices in numpy."""

EXIT_PIPE = 141  # 128 + SIGPIPE, as for any program whose reader went away


class Parser(ArgumentParser):
    """Refuses with one line (an `InputError`) instead of the usage text; flags are never guessed from a prefix."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)", code="invalid_usage")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (docs/ARCHITECTURE.md, section 11); never raises."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = dispatch(arguments)
        sys.stdout.flush()
        return code
    except HaomiaoError as error:
        complain(error, str(error))
        return error.exit_code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # whatever is left in the buffer must not raise again while the interpreter shuts down
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except SystemExit as leave:  # argparse's --help and --version
        return leave.code if isinstance(leave.code, int) else 0
    except Exception as error:  # a mistake of ours: still one line, the rest on request
        complain(error, f"internal error: {type(error).__name__}: {error} (HAOMIAO_DEBUG=1 shows where)")
        return 1


def dispatch(arguments: list[str]) -> int:
    """Parse `arguments` and run the command they name."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"haomiao {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see haomiao --help"
        raise InputError(f"there is no command {name!r}; {hint}", code="invalid_usage")
    if name in WITHOUT_BLAS:  # its threads take numpy 60 ms to start, and would spin beside the engine's
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    module = importlib.import_module(f"haomiao.cli.{name}")
    parser = Parser(prog=f"haomiao {name}", description=module.__doc__, allow_abbrev=False)
    module.configure(parser)
    return int(module.run(parser.parse_intermixed_args(rest)))


def overview() -> str:
    """The text of `haomiao --help`."""
    lines = ["usage: haomiao COMMAND [MODEL] ...", "", "A real-time LLM engine.", "", "commands:"]
    lines += [f"  {name:<12}{what}" for name, what in COMMANDS.items()]
    lines += [
        "",
        "MODEL is a Hugging Face id or directory, a GGUF file, or an artifact; without one, generate and chat run the",
        "embedded model. `haomiao COMMAND --help` lists a command's flags.",
    ]
    return "\n".join(lines)


def complain(error: BaseException, line: str) -> None:
    """One line on stderr; with HAOMIAO_DEBUG=1 the traceback too."""
    if os.environ.get("HAOMIAO_DEBUG") == "1":
        traceback.print_exception(error, file=sys.stderr)
    print(f"haomiao: {' '.join(line.split())}", file=sys.stderr)
