"""From the last word to the first token: /v1/realtime with the text fed ahead, against the whole text at the end.

    python benchmarks/realtime.py                              # the embedded model
    python benchmarks/realtime.py model.gguf --name qwen2.5-0.5b --words 300

Starts `haomiao serve` and speaks to it over loopback. In every turn a text of so many words is said word by word and
read ahead; then the last word, the commit and the request for an answer are sent together, and the clock runs from
that moment to the first delta. Another text is then sent whole, to a fresh session. The unit is a step: the median time
between tokens of the same answers, by their receipts; the target is 1.5 of them. Speculation is off, since its
steps are of other lengths. Prints the ceilings first, then medians and extremes, one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

from websockets.sync.client import ClientConnection, connect

RESULTS = Path(__file__).resolve().parent / "results"
WORDS = (
    "the",
    "river",
    "and",
    "small",
    "house",
    "by",
    "old",
    "trees",
    "under",
    "snow",
    "light",
    "of",
    "morning",
    "birds",
)


class Session:
    """One connection."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self.hear("session.created")

    def say(self, kind: str, **fields: Any) -> None:
        """Send an event."""
        self._socket.send(json.dumps({"type": kind, **fields}))

    def hear(self, kind: str) -> dict[str, Any]:
        """The next event of a kind."""
        while True:
            event: dict[str, Any] = json.loads(self._socket.recv(timeout=120))
            if event["type"] == kind:
                return event
            if event["type"] == "error":
                raise SystemExit(event["error"]["message"])

    def finish(self, last: str, tokens: int) -> dict[str, float]:
        """Say the last word and ask; milliseconds to the first delta, and of a step."""
        start = time.perf_counter()
        self.say("input_text_buffer.append", text=last)
        self.say("input_text_buffer.commit")
        self.say("response.create", response={"max_output_tokens": tokens, "ignore_eos": True})
        first = 0.0
        while True:
            event = json.loads(self._socket.recv(timeout=120))
            if event["type"] == "response.output_text.delta":
                first = first or 1e3 * (time.perf_counter() - start)
            elif event["type"] == "response.done":
                receipt = event["response"]["haomiao"]["receipt"]
                step = receipt["decode_ms"] / (receipt["completion_tokens"] - 1)
                cached = receipt["cached_tokens"] / receipt["prompt_tokens"]
                return {"first_ms": first, "step_ms": step, "engine_ms": receipt["ttft_ms"], "cached": cached}


def text_of(rng: Random, words: int) -> list[str]:
    """Words, each with the space before it."""
    return [" " + rng.choice(WORDS) for _ in range(words)]


def turn(url: str, words: list[str], tokens: int, *, ahead: bool) -> dict[str, float]:
    """One turn in a session of its own."""
    with connect(url.replace("http", "ws", 1) + "/v1/realtime", proxy=None, compression=None) as socket:
        session = Session(socket)
        session.say("session.update", session={"prompt_format": "text"})
        session.hear("session.updated")
        if ahead:
            for start in range(0, len(words) - 1, 8):  # a recognizer's pieces
                session.say("input_text_buffer.append", text="".join(words[start : min(start + 8, len(words) - 1)]))
                session.hear("input_text_buffer.computed")
            return session.finish(words[-1], tokens)
        return session.finish("".join(words), tokens)


def main() -> None:
    """Serve, take turns, print."""
    from haomiao.measure.machine import describe_machine
    from haomiao.metrics.ceilings import measure_ceilings
    from haomiao.metrics.statistics import summarize

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="default: the embedded model")
    parser.add_argument("--name", default="haomiao-tiny", help="of the result file")
    parser.add_argument("--words", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    ceilings = measure_ceilings(args.threads)
    print(f"ceilings: read {ceilings.read_gb_s:.1f} GB/s, int8 {ceilings.int8_gops:.0f} Gop/s, {args.threads} threads")
    command = [sys.executable, "-m", "haomiao", "serve", "--port", "0", "--threads", str(args.threads)]
    command += ["--speculate", "off", *([args.model] if args.model else [])]
    found: dict[str, list[dict[str, float]]] = {"fed ahead": [], "at the end": []}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            url = next(match[1] for line in server.stderr if (match := re.search(r"(http://\S+) · ", line)))
            rng = Random(0)
            for index in range(args.turns + 2):
                for name, ahead in (("fed ahead", True), ("at the end", False)):
                    figures = turn(url, text_of(rng, args.words), args.tokens, ahead=ahead)
                    if index >= 2:  # the first turns warm up
                        found[name].append(figures)
        finally:
            server.terminate()
            server.stderr.read()
    step = summarize([each["step_ms"] for runs in found.values() for each in runs])
    result: dict[str, Any] = {
        "benchmark": "realtime",
        "model": args.name,
        "machine": describe_machine().as_dict(),
        "ceilings": ceilings.as_dict(),
        "settings": {name: getattr(args, name) for name in ("words", "tokens", "turns", "threads")},
        "step_ms": step.as_dict(),
    }
    print(f"step        {step.median:.2f} ms [{step.low:.2f}, {step.high:.2f}]")
    for name, runs in found.items():
        first = summarize([each["first_ms"] for each in runs])
        inside = summarize([each["engine_ms"] for each in runs])
        steps = first.median / step.median
        result[name] = {"first_ms": first.as_dict(), "engine_ms": inside.as_dict(), "steps": steps}
        result[name]["cached"] = summarize([each["cached"] for each in runs]).median
        shown = f"{first.median:.2f} ms [{first.low:.2f}, {first.high:.2f}] = {steps:.2f} steps"
        print(f"{name:<11} {shown}, of them in the engine {inside.median:.2f} ms")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"realtime-{args.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
