"""How each engine is asked for a sample: a worker process that stays, or a program that is run once a sample.

A program is anything that takes llama-bench's flags; its neighbours llama-batched-bench and llama-completion or
llama-cli, where they lie beside it, do the lines that llama-bench cannot. Knows nothing about results.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from peerlib.lines import Line

Sample = dict[str, Any]
PROMPT = "The capital of France is"
WORKERS = Path(__file__).with_name("workers.py")
LLAMA_KV = {"bf16": "f16", "int8": "q8_0"}  # llama.cpp's own default, and its 8 bits


class Missing(Exception):
    """This engine cannot do this line; says why."""


class Engine(Protocol):
    """One line by one engine."""

    pid: int | None
    """The process that stays, if one does."""

    def sample(self, seed: int) -> Sample: ...

    def close(self) -> None: ...


class Worker:
    """A process of workers.py, started by the interpreter that has the engine."""

    def __init__(self, python: str, engine: str, line: Line, model: Path, threads: int) -> None:
        settings = {
            "model": str(model),
            "work": line.work,
            "point": line.point,
            "prompt": line.prompt,
            "new": line.new,
            "streams": line.streams,
            "kv": line.kv,
            "context": line.context,
            "threads": threads,
        }
        self._process = subprocess.Popen(
            [python, str(WORKERS), engine, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._engine = engine
        self.pid: int | None = self._process.pid
        self._expect("ready")

    def _expect(self, start: str) -> str:
        """The next line that begins so; a library's own chatter is passed over."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return line.removeprefix(start)
        raise Missing(f"{self._engine} ended early with status {self._process.wait()} (its own words are above)")

    def sample(self, seed: int) -> Sample:
        """One run."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seed}\n")
        self._process.stdin.flush()
        found: Sample = json.loads(self._expect("sample "))
        return found

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Program:
    """llama-bench or a program that takes its flags."""

    pid = None

    def __init__(self, path: Path, line: Line, model: Path, threads: int) -> None:
        self._line, self._model, self._threads = line, model, threads
        self._path = path
        if line.work == "coldstart":
            self._path = beside(path, "llama-completion", "llama-cli")
        elif line.streams > 1:
            self._path = beside(path, "llama-batched-bench")
        elif line.work == "itl":
            raise Missing("llama-bench tells no times of single tokens")
        self._help = run([str(self._path), "--help"], check=False, errors=True)

    def sample(self, seed: int) -> Sample:
        """One run, loading included, which is not counted unless it is the question."""
        if self._line.work == "coldstart":
            return self._cold_start()
        if self._line.streams > 1:
            return {"tok_s": batched_rate(run(self._command_batched(), errors=True))}
        return {"tok_s": bench_rate(run(self._command_bench()))}

    def close(self) -> None:
        """Nothing stays."""

    def _common(self) -> list[str]:
        return [str(self._path), "-m", str(self._model), "-t", str(self._threads)]

    def _command_bench(self) -> list[str]:
        line = self._line
        command = [*self._common(), "-r", "1", "-o", "json"]
        if line.kv != "bf16":
            command += ["-fa", "1", "-ctk", LLAMA_KV[line.kv], "-ctv", LLAMA_KV[line.kv]]
        if line.prompt > 1024:  # a warm-up would be a whole prompt
            command += ["--no-warmup"] if "--no-warmup" in self._help else ["-w", "0"]
        if line.work == "prefill":
            return [*command, "-p", str(line.prompt), "-n", "0"]
        if "--n-depth" in self._help:
            return [*command, "-p", "0", "-n", str(line.new), "-d", str(line.prompt)]
        return [*command, "-p", "0", "-n", "0", "-gp", f"{line.prompt},{line.new}"]

    def _command_batched(self) -> list[str]:
        line = self._line
        tokens = str((line.prompt + line.new) * line.streams + 64)
        sizes = ["-npp", str(line.prompt), "-ntg", str(line.new), "-npl", str(line.streams)]
        return [*self._common(), "-c", tokens, "-b", "2048", "-ub", "512", *sizes]

    def _cold_start(self) -> Sample:
        command = [*self._common(), "-p", PROMPT, "-n", "1", "--temp", "0", "-c", "512"]
        wanted = ("--no-warmup", "--no-display-prompt", "-no-cnv", "--simple-io")
        return timed_start([*command, *(flag for flag in wanted if flag in self._help)])


class ColdStart:
    """`haomiao generate` as a person would start it."""

    pid = None

    def __init__(self, model: Path, threads: int, point: str) -> None:
        self._command = [sys.executable, "-m", "haomiao", "generate", str(model), PROMPT, "--max-tokens", "1"]
        self._command += ["--threads", str(threads), "--point", point, "--quiet"]
        run(self._command)  # whatever is made once is made now

    def sample(self, seed: int) -> Sample:
        """One process from start to end."""
        return timed_start(self._command)

    def close(self) -> None:
        """Nothing stays."""


def beside(program: Path, *names: str) -> Path:
    """A program of the same folder. Raises `Missing`."""
    for name in names:
        if (program.parent / name).is_file():
            return program.parent / name
    raise Missing(f"there is no {' or '.join(names)} beside {program.name}")


def run(command: list[str], *, check: bool = True, errors: bool = False) -> str:
    """Standard output, and standard error if `errors`. Raises `Missing` with the end of that where it failed."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if check and done.returncode:
        raise Missing(f"{Path(command[0]).name} ended with status {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout + (done.stderr if errors else "")


def timed_start(command: list[str]) -> Sample:
    """Milliseconds from the start of a process to the first byte on its standard output, and to its end."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, bufsize=0
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    first_ms = 1e3 * (time.perf_counter() - start)
    process.stdout.read()
    status = process.wait()
    if status:
        raise Missing(f"{Path(command[0]).name} ended with status {status}")
    return {"first_ms": first_ms if first else None, "exit_ms": 1e3 * (time.perf_counter() - start)}


def bench_rate(output: str) -> float:
    """Tokens per second of the only test in llama-bench's JSON."""
    try:
        found = json.loads(output[output.index("[") : output.rindex("]") + 1])
        return float(found[-1]["avg_ts"])
    except (ValueError, LookupError, TypeError) as error:
        raise Missing(f"not llama-bench's JSON: {output[-200:]!r}") from error


def batched_rate(output: str) -> float:
    """Decode tokens per second of all streams (S_TG) in llama-batched-bench's table."""
    rows = [line.strip("| \n").split("|") for line in output.splitlines() if line.startswith("|")]
    numbers = [row for row in rows if len(row) == 10 and row[0].strip().isdigit()]
    if not numbers:
        raise Missing(f"not llama-batched-bench's table: {output[-200:]!r}")
    return float(numbers[-1][7])


class Others:
    """How many cores' worth of time other programs took while something of ours ran (Linux; elsewhere None).

    On a machine that is shared, or in use, a sample that others disturbed says nothing about an engine.
    """

    def __init__(self, workers: list[int]) -> None:
        """`workers` are the processes of ours that run on."""
        self._workers = workers
        self._busy, self._own, self._time = _busy_seconds(), self._ours(), time.monotonic()

    def cores(self) -> float | None:
        """Cores since the beginning, time that the hypervisor kept for itself included."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        taken = busy - self._busy - (self._ours() - self._own)
        return max(0.0, taken / (time.monotonic() - self._time))

    def _ours(self) -> float:
        own = os.times()
        seconds = own.user + own.system + own.children_user + own.children_system
        for pid in self._workers:
            with contextlib.suppress(OSError):  # it ended, and is among the children's
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return seconds


def _busy_seconds() -> float | None:
    """Seconds that all cores together have spent on anything, stolen time included."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    user, nice, system, _, _, *interrupts_and_steal = (int(field) for field in fields[1:9])
    return (user + nice + system + sum(interrupts_and_steal)) / os.sysconf("SC_CLK_TCK")


class Neighbour:
    """A process that spins while a sample is taken."""

    def __enter__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def environment_python(folder: Path) -> str:
    """The interpreter of a virtual environment."""
    return str(folder / "bin" / "python")


def install(folder: Path) -> None:
    """Make the peers' environments: llama-cpp-python built for this processor, OpenVINO GenAI as published."""
    for name, package, flags in (
        ("llama", "llama-cpp-python", ["--no-binary", "llama-cpp-python"]),
        ("openvino", "openvino-genai", []),
    ):
        home = folder / name
        if not (home / "done").exists():
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
            environment = os.environ | {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
            command = [environment_python(home), "-m", "pip", "install", "--quiet", *flags, package, "numpy"]
            subprocess.run(command, check=True, env=environment)
            (home / "done").touch()
