"""Useful attainment under overload: the same weights and the same seeded traces, offered to Haomiao and to others.

    python benchmarks/deadlines.py model.gguf --llama-server PATH --name qwen2.5-0.5b-q4_0
    python benchmarks/deadlines.py model.gguf --llama-server PATH --vllm-python PYTHON --vllm-model DIRECTORY

The mix is `mixed` of `haomiao bench` (60 % four-way choices, 25 % extractions, 10 % chats, 5 % long summaries). Servers
run one after another on all cores allowed; the client is one process beside them, counted as a neighbour.

1. Unloaded, one client: the median time of each class on each server. A class's budget is three times the *best* one.
2. llama-server's `-np` is tuned: the one of --slots that answers most requests a second with as many clients. The best
   baseline's figure is the capacity that loads are multiples of.
3. Every load and seed: open-loop Poisson (or bursts, with --arrivals), the same trace to every server, another one for
   every load: a prompt that comes twice is half answered by a cache. llama-server runs stock, and behind an
   earliest-deadline proxy (benchmarks/baselines.py), which is the opponent.
4. rho-99: the greatest rate at which 99 % are on time, by doubling or halving, then --probes bisections on a
   logarithmic scale, each with a trace of its own, the n-th probe's the same for everybody.

Useful attainment is the sum of scores by the deadline over all requests offered (`measure.attainment.score`).
Differences are paired by request; intervals are bootstrapped over requests. Random weights serve for speed only: no
answer is judged right or wrong, only in time and whole. Deadlines count from when a request was due, so the client's
own lateness is in everybody's time alike; a cell whose client was late by more than a tenth of the shortest budget is
marked void. The client runs at a niceness of -10 where that is permitted, as if on a machine of its own. Prints the
machine's ceilings first, a row a cell, and one JSON line last, which benchmarks/results/deadlines-<name>.json keeps.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from baselines import (
    EdfProxy,
    Haomiao,
    Stock,
    VllmPriority,
    free_port,
    haomiao_command,
    llama_command,
    llama_python_command,
    running,
    vllm_command,
)
from peerlib.results import commit_of

from haomiao.measure.attainment import is_on_time, score, summarize_load
from haomiao.measure.load import Client, Dialect, Load, Run, model_of
from haomiao.measure.mix import BUILT_IN, Mix, RequestClass, draw_trace
from haomiao.metrics.statistics import bootstrap_mean, percentile

RESULTS = Path(__file__).resolve().parent / "results"
CONTEXT = 2048
CLIENT_NICE = -10


@dataclass(slots=True)
class Contender:
    """A server, and how it is told of deadlines."""

    name: str
    command: Callable[[int], list[str]]
    """By port."""
    dialect: Callable[[dict[str, float], str], Dialect]
    """By what a request of each class takes unloaded, and the server's address."""
    unloaded_ms: dict[str, float] = field(default_factory=dict)
    capacity: float = 0.0


def offer(url: str, mix: Mix, dialect: Dialect, run: Callable[[Load], Any], patience: float | None) -> Run:
    """One run against a server that is up."""

    async def go() -> Run:
        client = Client(url)
        try:
            load = Load(client, mix, dialect, model=await model_of(client), patience=patience)
            await load.closed_loop(draw_trace(mix, rate=1, count=6, seed=999), 1)
            result: Run = await run(load)
            return result
        finally:
            client.close()

    return asyncio.run(go())


def without_budgets(mix: Mix) -> Mix:
    """The same work with nothing to keep."""
    return Mix(mix.name, tuple(msgspec.structs.replace(kind, budget_ms=None, ttft_ms=None) for kind in mix.classes))


def unloaded(url: str, mix: Mix, dialect: Dialect, count: int) -> dict[str, float]:
    """Median milliseconds of each class, one client."""
    found = {}
    for kind in without_budgets(mix).classes:
        alone = Mix(kind.name, (kind,))
        trace = draw_trace(alone, rate=1, count=count, seed=7)
        run = offer(url, alone, dialect, lambda load, trace=trace: load.closed_loop(trace, 1), None)
        times = [record.end_ms - record.sent_ms for record in run.records if record.status == 200 and not record.error]
        if not times:
            raise SystemExit(f"class {kind.name} is not answered: {run.records[0].status} {run.records[0].code}")
        found[kind.name] = percentile(times, 50)
    return found


def capacity(url: str, mix: Mix, dialect: Dialect, clients: int, count: int) -> float:
    """Requests a second that are answered, so many clients waiting for their answers."""
    trace = draw_trace(mix, rate=1, count=count, seed=8)
    run = offer(url, without_budgets(mix), dialect, lambda load: load.closed_loop(trace, clients), None)
    whole = [record for record in run.records if record.status == 200 and not record.error]
    return 1e3 * len(whole) / run.elapsed_ms


def budgets(mix: Mix, times: list[dict[str, float]], factor: float) -> Mix:
    """The mix with each class's budget at `factor` times the best unloaded median."""

    def with_budget(kind: RequestClass) -> RequestClass:
        return msgspec.structs.replace(kind, budget_ms=factor * min(each[kind.name] for each in times))

    return Mix(mix.name, tuple(map(with_budget, mix.classes)))


def contenders(args: argparse.Namespace, folder: Path, mix: Mix) -> list[Contender]:
    """Who takes part; llama-server with the number of slots that serves most."""
    threads = args.threads
    found = [
        Contender(
            "haomiao",
            lambda port: haomiao_command(args.model, port, threads, CONTEXT, args.points),
            lambda expected, url: Haomiao(),
        )
    ]
    if args.llama_server:
        rates = {}
        for slots in args.slots:
            port = free_port()
            one = llama_command(args.llama_server, args.model, port, threads, CONTEXT, slots)
            with running(one, port, folder / f"llama-{slots}.log") as url:
                rates[slots] = capacity(url, mix, Stock(), slots, args.requests // 2)
            print(f"llama-server -np {slots}: {rates[slots]:.2f} requests/s")
        best = max(rates, key=rates.__getitem__)

        def command(port: int) -> list[str]:
            return llama_command(args.llama_server, args.model, port, threads, CONTEXT, best)

        found.append(
            Contender(f"llama-server -np {best} + EDF", command, lambda expected, url: EdfProxy(best, expected, url))
        )
        found.append(Contender(f"llama-server -np {best}", command, lambda expected, url: Stock()))
        for contender in found[1:]:
            contender.capacity = rates[best]
    if args.llama_python:

        def one_by_one(port: int) -> list[str]:
            return llama_python_command(args.llama_python, args.model, port, threads, CONTEXT)

        found.append(Contender("llama-cpp-python + EDF", one_by_one, lambda expected, url: EdfProxy(1, expected)))
    if args.vllm_python:
        found.append(
            Contender(
                "vllm priority",
                lambda port: vllm_command(args.vllm_python, args.vllm_model or args.model, port, threads, CONTEXT),
                lambda expected, url: VllmPriority(),
            )
        )
    return found


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All three parts."""
    mix = BUILT_IN["mixed"]
    taking_part = contenders(args, folder, mix)
    for contender in taking_part:
        port = free_port()
        with running(contender.command(port), port, folder / "server.log") as url:
            plain = Stock() if contender.name.startswith("llama") else contender.dialect({}, url)
            contender.unloaded_ms = unloaded(url, mix, plain, args.unloaded)
            if not contender.capacity:
                contender.capacity = max(capacity(url, mix, plain, n, args.requests // 2) for n in args.slots)
        times = "  ".join(f"{name} {value:.1f} ms" for name, value in contender.unloaded_ms.items())
        print(f"{contender.name}: unloaded {times}; capacity {contender.capacity:.2f} requests/s")
    others = [each for each in taking_part if each.name != "haomiao"] or taking_part
    unit = max(each.capacity for each in others)
    mix = budgets(mix, [each.unloaded_ms for each in taking_part], args.factor)
    print("budgets: " + "  ".join(f"{kind.name} {kind.budget_ms:.0f} ms" for kind in mix.classes))
    cells: dict[str, dict[str, list[Run]]] = {}
    found: dict[str, Any] = {}
    for contender in taking_part:
        port = free_port()
        with running(contender.command(port), port, folder / "server.log") as url:
            cells[contender.name] = {}
            for place, load in enumerate(args.loads):
                runs = cells[contender.name][f"{load:g}"] = []
                for seed in range(args.seeds):
                    runs.append(one_run(args, contender, url, mix, load * unit, 100 * place + seed))
            if args.probes and contender.name not in args.no_rho:
                found[contender.name] = rho99(args, contender, url, mix, unit)
                print(f"{contender.name}: rho-99 {found[contender.name]['per_s']:.2f} requests/s", flush=True)
    return {
        "unit_per_s": unit,
        "budgets_ms": {kind.name: kind.budget_ms for kind in mix.classes},
        "contenders": {
            each.name: {"unloaded_ms": each.unloaded_ms, "capacity_per_s": each.capacity} for each in taking_part
        },
        "cells": report(cells, mix),
        "rho99": found,
    }


def one_run(
    args: argparse.Namespace, contender: Contender, url: str, mix: Mix, rate: float, seed: int, least: int = 40
) -> Run:
    """One trace, open loop."""
    count = max(least, min(args.requests, int(rate * args.seconds)))
    trace = draw_trace(mix, rate=rate, count=count, seed=seed, arrivals=args.arrivals)
    return offer(url, mix, contender.dialect(contender.unloaded_ms, url), lambda each: each.open_loop(trace), 1.0)


def rho99(args: argparse.Namespace, contender: Contender, url: str, mix: Mix, unit: float) -> dict[str, Any]:
    """The greatest rate that was found with 99 % on time, 0 if none was, and every probe."""
    kinds = {kind.name: kind for kind in mix.classes}
    probes: list[dict[str, float]] = []

    def holds(rate: float) -> bool:
        run = one_run(args, contender, url, mix, rate, 10_000 + len(probes), least=100)
        on_time = sum(is_on_time(record, kinds[record.offer.kind]) for record in run.records) / len(run.records)
        probes.append({"per_s": rate, "on_time": on_time, "requests": len(run.records)})
        return on_time >= 0.99

    rate, factor = unit / 2, 2.0
    if not holds(rate):
        factor = 0.5
    while len(probes) <= args.probes:
        rate *= factor
        if holds(rate) != (factor > 1):
            break
    low, high = (rate / 2, rate) if factor > 1 else (rate, 2 * rate)
    for _ in range(args.probes):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(middle) else (low, middle)
    held = [probe["per_s"] for probe in probes if probe["on_time"] >= 0.99]
    return {"per_s": max(held, default=0.0), "of_unit": max(held, default=0.0) / unit, "probes": probes}


def report(cells: dict[str, dict[str, list[Run]]], mix: Mix) -> dict[str, Any]:
    """By load: every contender's attainment with its interval, and ours less each of the others', paired."""
    kinds = {kind.name: kind for kind in mix.classes}

    def scores(runs: list[Run]) -> list[float]:
        return [score(record, kinds[record.offer.kind]) for run in runs for record in run.records]

    rows: dict[str, Any] = {}
    for load in next(iter(cells.values())):
        row: dict[str, Any] = rows.setdefault(load, {})
        for name, by_load in cells.items():
            whole = Run([record for run in by_load[load] for record in run.records], by_load[load][0].elapsed_ms)
            summary = summarize_load(whole, mix)
            row[name] = {
                "useful": bootstrap_mean(scores(by_load[load])).as_dict(),
                **{key: summary[key] for key in ("offered", "on_time", "refused", "truncated", "late_among_admitted")},
                **{
                    key: summary[key]
                    for key in ("failed", "send_lag_ms", "void", "receipts", "notice_share_of_budget_p99")
                },
                "by_class": {kind: about["useful"] for kind, about in summary["classes"].items()},
            }
            if name != "haomiao" and "haomiao" in cells:
                ours, theirs = scores(cells["haomiao"][load]), scores(by_load[load])
                difference = [mine - other for mine, other in zip(ours, theirs, strict=True)]
                row[name]["ours_less"] = bootstrap_mean(difference).as_dict()
        best = max((about["useful"]["estimate"] for name, about in row.items() if name != "haomiao"), default=0.0)
        shown = "  ".join(
            f"{name} {about['useful']['estimate']:.3f} [{about['useful']['low']:.3f}, {about['useful']['high']:.3f}]"
            f" on time {about['on_time']:.2f} refused {about['refused']:.2f}{' VOID' if about['void'] else ''}"
            for name, about in row.items()
        )
        print(f"load {load}: {shown}")
        if best and "haomiao" in row:
            row["ratio_to_best"] = row["haomiao"]["useful"]["estimate"] / best
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="GGUF file that all read")
    add("--name", help="of the result file; default: the model's name")
    add("--llama-server", metavar="PATH")
    add("--llama-python", metavar="PYTHON", help="interpreter with llama-cpp-python[server], where no llama-server is")
    add("--vllm-python", metavar="PYTHON", help="interpreter with vLLM for the CPU")
    add("--vllm-model", metavar="DIRECTORY", help="the same weights as a Hugging Face directory")
    add("--points", default="int8,int4", help="of ours; int4 for a file whose codes have four bits (default int8,int4)")
    add("--loads", type=lambda text: [float(each) for each in text.split(",")], default=[0.5, 0.9, 1.2, 2.0, 4.0])
    add("--slots", type=lambda text: [int(each) for each in text.split(",")], default=[1, 2, 4, 8])
    add("--seeds", type=int, default=5)
    add("--requests", type=int, default=200, help="at most, of one trace")
    add("--seconds", type=float, default=20.0, help="about how long one trace is")
    add("--unloaded", type=int, default=10, help="requests a class for the unloaded medians")
    add("--probes", type=int, default=3, help="bisections for rho-99 (default 3; 0: none)")
    add("--no-rho", action="append", default=[], metavar="NAME", help="a contender whose rho-99 is not looked for")
    add("--factor", type=float, default=3.0, help="budget / best unloaded median")
    add("--arrivals", default="poisson", choices=("poisson", "bursts", "uniform"))
    add("--threads", type=int)
    args = parser.parse_args()

    from haomiao.measure.machine import default_threads, describe_machine
    from haomiao.metrics.ceilings import measure_ceilings

    args.threads = args.threads or default_threads()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, CLIENT_NICE)
    ceilings = measure_ceilings(args.threads)
    print(f"ceilings: read {ceilings.read_gb_s:.1f} GB/s, int8 {ceilings.int8_gops:.0f} Gop/s, {args.threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(args, Path(folder))
    result = {
        "benchmark": "deadlines",
        "model": Path(args.model).name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit_of(RESULTS.parent),
        "machine": describe_machine().as_dict(),
        "ceilings": ceilings.as_dict(),
        "settings": {
            name: getattr(args, name)
            for name in (
                "points",
                "loads",
                "slots",
                "seeds",
                "requests",
                "seconds",
                "probes",
                "factor",
                "arrivals",
                "threads",
            )
        },
        "client_nice": os.getpriority(os.PRIO_PROCESS, 0),
        **measured,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"deadlines-{args.name or Path(args.model).stem}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
