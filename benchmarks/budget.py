"""Are budgets kept? Requests of mixed classes in this process, open loop, at a share of this machine's capacity.

Usage: python -m benchmarks.budget [--model M] [--threads N] [--requests 3000] [--load 0.8] [--json FILE]

Classes: four-way choices over a cached prefix, extractions of 16 tokens, chats of 64, long prompts with 32. Capacity is
measured first, with the same mix in a closed loop; budgets are three times each class's median latency on the idle
machine, rounded up, and stay fixed. Arrivals are Poisson, seeded. What is printed: the share of admitted requests that
ended inside budget + max(one step, 5 ms), the truncated and refused shares, the median of bound / actual, measured
coverage of step and request bounds, latency of refusals; a neighbour process that starts in the middle of an answer; a
choice with a cached prefix against one prefill step of its new tokens; and the first token of a session that was fed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from haomiao import LLM
from haomiao.engine.request import DoneEvent, EngineRequest
from haomiao.errors import BudgetError, HaomiaoError, OverloadError
from haomiao.types import Receipt, SamplingParams

MS = 1_000_000
PREFIX = 512


@dataclass(frozen=True)
class Kind:
    """A class of requests: its share of arrivals, and what one asks."""

    name: str
    share: float
    prompt: int
    tokens: int
    choice: bool = False


KINDS = (
    Kind("choice", 0.60, 20, 0, choice=True),
    Kind("extract", 0.25, 48, 16),
    Kind("chat", 0.10, 64, 64),
    Kind("summary", 0.05, 400, 32),
)


class Bench:
    """One open model and a seeded stream of requests."""

    def __init__(self, llm: LLM, seed: int) -> None:
        self.llm = llm
        self.engine = llm.engine  # from now on nobody else steps it
        self.random = np.random.default_rng(seed)
        self.prefix = self._ids(PREFIX)
        self.budgets: dict[str, float] = {}

    def _ids(self, count: int) -> list[int]:
        return [int(token) for token in self.random.integers(300, self.llm.vocab_size - 1, size=count)]

    def request(self, kind: Kind, arrival: int | None = None, on_budget: Any = "degrade") -> EngineRequest:
        """A new request of that kind; with `arrival` it has its class's budget."""
        time_fields: dict[str, Any] = {}
        if arrival is not None:
            deadline = arrival + int(self.budgets[kind.name] * MS)
            time_fields = {"arrival_ns": arrival, "deadline_ns": deadline, "on_budget": on_budget}
        if kind.choice:
            options = tuple(tuple(self._ids(2)) for _ in range(4))
            return EngineRequest([*self.prefix, *self._ids(kind.prompt)], work="choose", options=options, **time_fields)
        sampling = SamplingParams(max_tokens=kind.tokens, ignore_eos=True)
        return EngineRequest(self._ids(kind.prompt), sampling=sampling, speculate="off", **time_fields)

    def alone(self, kind: Kind, repeat: int) -> list[float]:
        """Milliseconds of requests that have the machine to themselves."""
        times = []
        for _ in range(repeat):
            begun = time.monotonic_ns()
            self.engine.run_until(self.engine.submit(self.request(kind)))
            times.append((time.monotonic_ns() - begun) / MS)
        return times

    def capacity(self, seconds: float) -> float:
        """Requests of the mix a second, closed loop with eight at a time."""
        live, done = 0, 0
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            while live < 8:
                self.engine.submit(self.request(self.draw()))
                live += 1
            ended = sum(isinstance(event, DoneEvent) for event in self.engine.step())
            live -= ended
            done += ended
        rate = done / (time.monotonic() - begun)
        self.engine.run_until()
        return rate

    def draw(self) -> Kind:
        return KINDS[int(self.random.choice(len(KINDS), p=[kind.share for kind in KINDS]))]


def open_loop(bench: Bench, requests: int, rate: float) -> dict[str, Any]:
    """Poisson arrivals at `rate` a second, submitted by a thread of their own, as a server does."""
    gaps = bench.random.exponential(1 / rate, size=requests)
    kinds = [bench.draw() for _ in range(requests)]
    plans = [(kind, bench.request(kind)) for kind in kinds]
    engine = bench.engine
    names: dict[int, str] = {}
    refused: list[tuple[str, float, str]] = []
    late: list[float] = []
    finished = threading.Event()
    arrived = threading.Condition()

    def arrive() -> None:
        due = time.monotonic_ns()
        for gap, (kind, plan) in zip(gaps, plans, strict=True):
            due += int(gap * 1e9)
            while (left := due - time.monotonic_ns()) > 0:
                time.sleep(left / 1e9)
            late.append((time.monotonic_ns() - due) / MS)
            request = EngineRequest(
                plan.prompt_ids,
                work=plan.work,
                options=plan.options,
                sampling=plan.sampling,
                speculate=plan.speculate,
                arrival_ns=due,
                deadline_ns=due + int(bench.budgets[kind.name] * MS),
            )
            begun = time.monotonic_ns()
            try:
                names[engine.submit(request)] = kind.name
            except (BudgetError, OverloadError) as error:
                refused.append((kind.name, (time.monotonic_ns() - begun) / MS, type(error).__name__))
            with arrived:
                arrived.notify()
        finished.set()
        with arrived:
            arrived.notify()

    before = engine.cost.counters(), (engine.budgets.promises.stated, engine.budgets.promises.kept)
    client = threading.Thread(target=arrive)
    client.start()
    receipts: list[tuple[str, Receipt, HaomiaoError | None]] = []
    last_steps: list[float] = []
    slowest = 0
    while not finished.is_set() or engine.busy:
        if not engine.busy:
            if not engine.idle():
                with arrived:
                    arrived.wait(0.001)
            continue
        begun = time.monotonic_ns()
        ended = [event for event in engine.step() if isinstance(event, DoneEvent)]
        elapsed = time.monotonic_ns() - begun
        receipts += [(names.get(event.request_id, "?"), event.receipt, event.error) for event in ended]
        last_steps += [elapsed / MS] * len(ended)
        slowest = max(slowest, elapsed)
    client.join()
    return account(bench, requests, receipts, last_steps, refused, late, slowest / MS, before)


def account(
    bench: Bench,
    requests: int,
    receipts: list[tuple[str, Receipt, HaomiaoError | None]],
    last_steps: list[float],
    refused: list[tuple[str, float, str]],
    late: list[float],
    slowest_ms: float,
    before: tuple[dict[str, int], tuple[int, int]],
) -> dict[str, Any]:
    """What became of the requests. `last_steps` are the milliseconds of the steps in which they ended."""
    over = [receipt.total_ms - (receipt.budget_ms or 0) for _, receipt, _ in receipts]
    failed = [error is not None for _, _, error in receipts]
    kept = [by <= max(step, 5.0) and not wrong for by, step, wrong in zip(over, last_steps, failed, strict=True)]
    strictly = [by <= 5.0 and not wrong for by, wrong in zip(over, failed, strict=True)]
    whole = [r for _, r, error in receipts if error is None and r.outcome in ("met", "met_lower_point")]
    ratios = [r.predicted_ms / r.total_ms for r in whole if r.predicted_ms and r.total_ms]
    steps = bench.engine.cost.counters()
    promises = bench.engine.budgets.promises
    by_class = {}
    for kind in KINDS:
        mine = [(r, error) for name, r, error in receipts if name == kind.name]
        by_class[kind.name] = {
            "budget_ms": bench.budgets[kind.name],
            "admitted": len(mine),
            "refused": sum(name == kind.name for name, _, _ in refused),
            "outcomes": dict(Counter(str(r.outcome) for r, _ in mine)),
            "total_ms": percentiles([r.total_ms for r, _ in mine]),
            "bound_over_actual": percentiles(
                [
                    r.predicted_ms / r.total_ms
                    for r, e in mine
                    if e is None and r.outcome != "truncated" and r.predicted_ms
                ]
            ),
        }
    return {
        "requests": requests,
        "admitted": len(receipts),
        "refused": len(refused),
        "refused_by": dict(Counter(kind for _, _, kind in refused)),
        "refusal_ms": percentiles([milliseconds for _, milliseconds, _ in refused]),
        "kept_within_tolerance": sum(kept) / max(1, len(kept)),
        "not_kept": len(kept) - sum(kept),
        "not_within_5_ms": len(strictly) - sum(strictly),
        "late": [
            {"over_ms": round(by, 3), "last_step_ms": round(step, 3)}
            for by, step in zip(over, last_steps, strict=True)
            if by > 0
        ],
        "worst_over_budget_ms": max(over, default=0.0),
        "truncated_share": sum(r.outcome == "truncated" for _, r, _ in receipts) / max(1, len(receipts)),
        "outcomes": dict(Counter(str(r.outcome) for _, r, _ in receipts)),
        "bound_over_actual": percentiles(ratios),
        "step_coverage": rate_of(steps["inside"] - before[0]["inside"], steps["steps"] - before[0]["steps"]),
        "request_coverage": rate_of(promises.kept - before[1][1], promises.stated - before[1][0]),
        "client_lag_ms": percentiles(late),
        "slowest_step_ms": slowest_ms,
        "classes": by_class,
    }


def neighbour(bench: Bench, kind: Kind, seconds: float) -> dict[str, Any]:
    """A busy process for every core starts in the middle of an answer whose budget fits without it."""
    alone = float(np.median(bench.alone(kind, 5)))
    tokens = int(min(1500, kind.tokens * seconds * 1e3 / alone))
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    arrival = time.monotonic_ns()
    budget = alone * tokens / kind.tokens * 1.6
    request = EngineRequest(
        bench._ids(kind.prompt),
        sampling=sampling,
        speculate="off",
        arrival_ns=arrival,
        deadline_ns=arrival + int(budget * MS),
    )
    request_id = bench.engine.submit(request)
    intruders: list[Any] = []
    try:
        while bench.engine.busy:
            if not intruders and time.monotonic_ns() - arrival > budget * MS / 4:
                intruders = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(2)]
                for process in intruders:
                    process.start()
            for event in bench.engine.step():
                if isinstance(event, DoneEvent) and event.request_id == request_id:
                    receipt = event.receipt
    finally:
        for process in intruders:
            process.terminate()
            process.join()
    return {
        "budget_ms": budget,
        "predicted_ms": receipt.predicted_ms,
        "total_ms": receipt.total_ms,
        "outcome": receipt.outcome,
        "tokens": f"{receipt.completion_tokens} of {tokens}",
        "schedule": [[entry.point, entry.steps] for entry in receipt.schedule],
        "switched": len({entry.point for entry in receipt.schedule}) > 1,
    }


def _spin() -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        pass


def cached_choice(bench: Bench, repeat: int) -> dict[str, Any]:
    """Four options after a cached prefix and 20 new tokens, in turns with one prefill step of 20 tokens there."""
    choice = KINDS[0]
    bench.alone(choice, 5)
    whole, step = [], []
    for _ in range(repeat):
        whole += bench.alone(choice, 1)
        request = EngineRequest([*bench.prefix, *bench._ids(choice.prompt)], work="prefill")
        begun = time.monotonic_ns()
        bench.engine.run_until(bench.engine.submit(request))
        step.append((time.monotonic_ns() - begun) / MS)
    ratio = float(np.percentile(whole, 99) / np.median(step))
    return {"choice_ms": percentiles(whole), "prefill_step_ms": percentiles(step), "p99_over_step": ratio}


def fed_session(llm: LLM, repeat: int) -> dict[str, Any]:
    """Words are fed as they come; then the time from the last word to the first token, in steps of one token."""
    words = ("Once upon a time there was a king who lived in a great house by", "the sea")
    first, step = [], []
    with llm.session() as session:
        for _ in range(repeat):
            session.replace(words[0])
            begun = time.monotonic_ns()
            session.feed(" " + words[-1], compute=False)
            stream = session.stream(max_tokens=8, remember=False, ignore_eos=True, speculate="off")
            stamps = [time.monotonic_ns() for _ in stream]
            first.append((stamps[0] - begun) / MS)
            step.append(float(np.median(np.diff(stamps[:-1]))) / MS)
    return {
        "first_token_ms": percentiles(first),
        "step_ms": percentiles(step),
        "steps": float(np.median(first) / np.median(step)),
    }


def percentiles(numbers: list[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile, greatest."""
    if not numbers:
        return {}
    p50, p90, p99 = np.percentile(numbers, [50, 90, 99])
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "max": float(max(numbers))}


def rate_of(inside: int, of: int) -> dict[str, float]:
    return {"stated": 0.99, "measured": inside / of if of else float("nan"), "count": of}


def loaded(bench: Bench, args: argparse.Namespace, begun: float) -> dict[str, Any]:
    """Budgets from the idle machine, capacity, then the open loop."""
    for kind in KINDS:
        bench.alone(kind, 3)
    alone = {kind.name: float(np.median(bench.alone(kind, 15))) for kind in KINDS}
    bench.budgets = {name: float(np.ceil(args.factor * milliseconds)) for name, milliseconds in alone.items()}
    capacity = bench.capacity(6.0)
    print(f"idle medians {alone} ms; capacity {capacity:.1f} requests/s", flush=True)
    found = {"calibration_s": time.monotonic() - begun, "idle_ms": alone}
    found |= {"capacity_per_s": capacity, "load": args.load}
    open_loop(bench, 300, args.load * capacity)  # warms up
    return found | {"open_loop": open_loop(bench, args.requests, args.load * capacity)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--requests", type=int, default=3000, help="0: the choice and the session alone")
    parser.add_argument("--load", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--factor", type=float, default=3.0, help="budget / median latency on the idle machine")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    sys.setswitchinterval(0.0005)  # as the server does: Python's own 5 ms would be a whole refusal
    with LLM(args.model, threads=args.threads, speculate="off") as llm:
        begun = time.monotonic()
        llm.calibrate(again=True)
        bench = Bench(llm, args.seed)
        found: dict[str, Any] = {
            "machine": machine(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "command": " ".join(sys.argv[1:]),
            "model": llm.name,
            "threads": llm.threads,
            "isa": llm.isa,
        }
        if args.requests:
            found |= loaded(bench, args, begun)
        found["cached_choice"] = cached_choice(bench, 150)
        found["session"] = fed_session(llm, 60)
        if args.requests:
            found["neighbour"] = neighbour(bench, KINDS[2], 2.0)
    for name, value in found.items():
        print(f"{name:>16}: {value}")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))
    return 0


def machine() -> str:
    """The processor's name and number of cores."""
    from haomiao.measure.machine import describe_machine

    about = describe_machine()
    return f"{about.processor or platform.processor()}, {about.allowed} of {about.cores} cores"


def commit() -> str:
    """The commit of the working tree, or nothing."""
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":
    raise SystemExit(main())
