"""An hour of a server under mixed load in which a fifth of the clients hang up: nothing may drift, nothing may leak.

    python benchmarks/soak_server.py [MODEL] --seconds 3600 --rate 6 --threads 2 --name soak-2-threads

Starts `haomiao serve`, offers the workload `mixed` open loop in windows, the same trace in each so that what differs is
the server's doing (the first warms up and is left out), and looks after each at the server from outside: resident
memory, file descriptors and threads of both its processes, KV blocks in use. What clients that stayed saw is compared
between the first and the last quarter of the windows. Ends with a status other than 0 if the 99th percentile drifted by
5 %, resident memory by 2 %, or anything else was left behind. One JSON line last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from haomiao.measure.load import Haomiao, Load, Record, model_of
from haomiao.measure.machine import describe_machine
from haomiao.measure.mix import Mix, Offer, draw_trace, open_mix
from haomiao.measure.wire import Client
from haomiao.metrics.statistics import percentile

RESULTS = Path(__file__).resolve().parent / "results"
QUITTING = (0.005, 0.02, 0.08, 0.3)
"""After which shares of their budgets clients hang up: in the queue, in prefill, while decoding."""
SHARE_QUITTING = 0.2
DRIFT_LIMIT, GROWTH_LIMIT = 0.05, 0.02


def start(arguments: Sequence[str]) -> tuple[subprocess.Popen[str], str]:
    """A server on a free port, once it answers, and its URL."""
    server = subprocess.Popen(
        [sys.executable, "-m", "haomiao", "serve", *arguments, "--port", "0", "--log-level", "error"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    for line in server.stderr:
        found = re.search(r"https?://\S+", line)
        if found:
            return server, found[0]
        print(line, end="", file=sys.stderr)
    raise SystemExit(f"the server ended with status {server.wait()}")


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += family(int(child))
    return found


def census(pid: int) -> dict[str, int]:
    """Resident bytes, open descriptors and threads of the server's processes together."""
    total = {"resident_bytes": 0, "descriptors": 0, "threads": 0}
    for each in family(pid):
        total["resident_bytes"] += int(Path(f"/proc/{each}/statm").read_text().split()[1]) * 4096
        total["descriptors"] += len(list(Path(f"/proc/{each}/fd").iterdir()))
        total["threads"] += len(list(Path(f"/proc/{each}/task").iterdir()))
    return total


async def settled(url: str) -> dict[str, float]:
    """The server's gauges once nothing runs any more (at most 30 s), and no connection of ours is open."""
    for _ in range(60):
        client = Client(url)
        text = (await client.request("GET", "/metrics")).body.decode()
        client.close()
        gauges = {name: float(value) for name, value in re.findall(r"^(\w+:\w+)(?:\{[^}]*\})? (\S+)$", text, re.M)}
        if not gauges.get("vllm:num_requests_running") and not gauges.get("vllm:num_requests_waiting"):
            return gauges
        await asyncio.sleep(0.5)
    raise SystemExit("requests were left running")


async def offer(client: Client, model: str, mix: Mix, trace: list[Offer], rng: Random) -> tuple[list[Record], int]:
    """Offer one window's trace; the records of those who stayed, and how many hung up before their answer."""
    parts: dict[float | None, list[Offer]] = {}
    for each in trace:
        quits = rng.choice(QUITTING) if rng.random() < SHARE_QUITTING else None
        parts.setdefault(quits, []).append(each)
    loads = {p: Load(client, mix, Haomiao(), model=model, patience=p, keep_text=False) for p in parts}
    runs = await asyncio.gather(*(loads[patience].open_loop(part) for patience, part in parts.items()))
    records = {patience: run.records for patience, run in zip(parts, runs, strict=True)}
    left = sum(r.error == "gave up" for patience, part in records.items() if patience is not None for r in part)
    return records.get(None, []), left


async def soak(url: str, pid: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All windows."""
    mix, model = open_mix("mixed"), ""
    seconds = args.seconds / args.windows
    windows = []
    for index in range(args.windows):
        trace = draw_trace(mix, rate=args.rate, count=max(1, round(args.rate * seconds)), seed=args.seed)
        began = time.monotonic()
        client = Client(url)
        model = model or await model_of(client)
        stayed, left = await offer(client, model, mix, trace, Random(args.seed))
        client.close()
        times = [record.end_ms - record.sent_ms for record in stayed if record.status == 200 and record.error is None]
        gauges = await settled(url)
        window = {
            "seconds": round(time.monotonic() - began, 1),
            "offered": len(trace),
            "hung_up": left,
            "answered": len(times),
            "refused": sum(record.status in (422, 429, 503) for record in stayed),
            "failed": sum(record.status >= 500 and record.status not in (503, 504) for record in stayed),
            "p50_ms": round(percentile(times, 50), 3) if times else None,
            "p99_ms": round(percentile(times, 99), 3) if times else None,
            "restarts": gauges.get("haomiao:engine_restarts", 0.0),
            **census(pid),
        }
        windows.append(window)
        print(f"window {index + 1}/{args.windows}: {json.dumps(window)}", file=sys.stderr, flush=True)
    return windows


def judge(windows: list[dict[str, Any]]) -> dict[str, Any]:
    """Drift and growth between quarters. The first window is warm-up, and is left out."""
    rest = windows[1:]
    quarter = max(1, len(rest) // 4)

    def change(name: str) -> float:
        first = statistics.median(w[name] for w in rest[:quarter])
        last = statistics.median(w[name] for w in rest[-quarter:])
        return last / first - 1.0

    report = {
        "p50_drift": change("p50_ms"),
        "p99_drift": change("p99_ms"),
        "resident_growth": change("resident_bytes"),
        "descriptors_left": rest[-1]["descriptors"] - rest[0]["descriptors"],
        "threads_left": rest[-1]["threads"] - rest[0]["threads"],
        "failed": sum(w["failed"] for w in windows),
        "restarts": rest[-1]["restarts"],
        "offered": sum(w["offered"] for w in windows),
        "hung_up": sum(w["hung_up"] for w in windows),
    }
    report["kept"] = bool(
        report["p99_drift"] < DRIFT_LIMIT
        and report["resident_growth"] < GROWTH_LIMIT
        and report["descriptors_left"] <= 0
        and report["threads_left"] <= 0
        and not report["failed"]
        and not report["restarts"]
    )
    return report


def main() -> int:
    """Start, soak, judge, stop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--windows", type=int, default=13)
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second (default 6)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="write benchmarks/results/NAME.json")
    args = parser.parse_args()
    given = [*([args.model] if args.model else []), *(["--threads", str(args.threads)] if args.threads else [])]
    server, url = start(given)
    try:
        windows = asyncio.run(soak(url, server.pid, args))
    finally:
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        status = server.wait(60)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    report = {
        "benchmark": "soak_server",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or None,
        "machine": describe_machine().as_dict(),
        "seconds": args.seconds,
        "rate": args.rate,
        "threads": args.threads,
        **judge(windows),
        "stop": {"status": status, "seconds": round(time.monotonic() - began, 2)},
        "windows": windows,
    }
    if args.name:
        (RESULTS / f"{args.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 0 if report["kept"] and status == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
