"""`haomiao bench --server`: offer a workload to a server, open loop, and print what it was worth.

No model is opened here, and nothing heavy is imported: this process is the client alone.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from haomiao.cli import options, terminal
from haomiao.errors import InputError
from haomiao.progress import ProgressBar

DIALECTS = ("haomiao", "openai")
ARRIVALS = ("poisson", "bursts", "uniform")


def configure(parser: ArgumentParser) -> None:
    """Declare the flags of --server, in a group of their own. None: not given, so that a stray one can be refused."""
    add = parser.add_argument_group("load on a server").add_argument
    add("--server", metavar="URL", help="http://host:port of an OpenAI-compatible server; --model names its model")
    add("--workload", help="mixed (default), choice, chat, long, or a .json or .yaml file")
    add("--rate", type=options.number, help="requests a second on average (default 10)")
    add("--requests", type=options.positive, help="how many (default 300)")
    add("--arrivals", type=options.one_of(ARRIVALS), help="poisson (default), bursts, uniform")
    add("--closed", type=options.positive, metavar="N", help="N clients that wait for their answers, instead of --rate")
    add("--warmup", type=options.natural, help="requests before those that count (default 8)")
    add("--budget-scale", type=options.number, metavar="X", help="multiply every budget (default 1)")
    add("--patience", type=options.number, metavar="X", help="hang up after X budgets (default 2; 0: never)")
    add("--dialect", type=options.one_of(DIALECTS), help="haomiao (default), or openai: say nothing of budgets")
    add("--api-key", metavar="KEY", help="sent as a bearer token [HAOMIAO_API_KEY]")
    add("--trace", metavar="FILE", help="offer this trace, as --save-trace wrote it")
    add("--save-trace", metavar="FILE", help="write what was offered, one request a line")
    add("--records", metavar="FILE", help="write what came back with every moment, one request a line")
    add("--insecure", action="store_const", const=True, help="https: take any certificate")


FLAGS = (
    *("workload", "rate", "requests", "arrivals", "closed", "warmup", "budget_scale", "patience", "dialect"),
    *("api_key", "trace", "save_trace", "records", "insecure"),
)


def refuse_flags(args: Namespace) -> None:
    """Raise `InputError` if a flag that needs --server was given without it."""
    for name in FLAGS:
        if getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} needs --server", code="invalid_usage", param=name)


def run(args: Namespace) -> int:
    """Trace, load, report."""
    import asyncio

    from haomiao.measure.attainment import summarize_load

    mix, trace = prepare(args)
    with ProgressBar(quiet=args.quiet) as bar:
        try:
            load = asyncio.run(offer(args, mix, trace, bar))
        except KeyboardInterrupt:
            terminal.note("interrupted: nothing is reported")
            raise
    if args.records:
        write_lines(args.records, [record.as_dict() for record in load.records])
    report = {
        "server": args.server,
        "rate": args.rate if args.closed is None else None,
        "closed": args.closed,
        "arrivals": args.arrivals or "poisson",
        "seed": args.seed,
        **summarize_load(load, mix),
    }
    if not args.json:
        print_table(report)
    terminal.write_json(report)
    return 0


def prepare(args: Namespace) -> tuple[Any, Any]:
    """The mix and the trace that the flags name."""
    from haomiao.measure import mix as mixes

    scale = 1.0 if args.budget_scale is None else args.budget_scale
    if scale <= 0:
        raise InputError("--budget-scale must be more than 0", param="budget_scale")
    if args.rate is None:
        args.rate = 10.0
    mix = mixes.open_mix(args.workload or "mixed").scaled(scale).check()
    if args.trace:
        trace = mixes.load_trace(Path(args.trace), mix)
    else:
        count = args.requests or 300
        trace = mixes.draw_trace(mix, rate=args.rate, count=count, seed=args.seed, arrivals=args.arrivals or "poisson")
    if args.save_trace:
        try:
            mixes.save_trace(Path(args.save_trace), trace)
        except OSError as error:
            raise InputError(
                f"cannot write {args.save_trace}: {error.strerror or error}", param="save_trace"
            ) from error
    return mix, trace


async def offer(args: Namespace, mix: Any, trace: Any, bar: Any) -> Any:
    """Warm up, then send the trace."""
    from haomiao.measure.load import DIALECTS as KNOWN
    from haomiao.measure.load import Load, model_of
    from haomiao.measure.wire import Client

    key = args.api_key or os.environ.get("HAOMIAO_API_KEY")
    client = Client(args.server, api_key=key, tls_verify=not args.insecure)
    patience = 2.0 if args.patience is None else args.patience or None
    try:
        model = args.model or args.positional_model or await model_of(client)
        load = Load(client, mix, KNOWN[args.dialect or "haomiao"](), model=model, patience=patience)
        warmup = 8 if args.warmup is None else args.warmup
        if warmup:
            first = await load.closed_loop(trace[:warmup], 1)
            refuse_broken(first.records)
        if args.closed is not None:
            return await load.closed_loop(trace, args.closed)
        return await load.open_loop(trace, progress=lambda done, total: bar("requests", done, total))
    finally:
        client.close()


def refuse_broken(records: Any) -> None:
    """Raise `InputError` if not one of the first requests got an answer that the server itself stands by."""
    known = [record for record in records if record.status in (200, 422, 429, 503, 504) or record.error == "gave up"]
    if records and not known:
        worst = records[-1]
        said = worst.error or f"status {worst.status}, {worst.code}"
        raise InputError(f"the server answers none of the first {len(records)} requests: {said}", code="no_answer")


def write_lines(path: str, rows: list[dict[str, Any]]) -> None:
    """JSON lines. Raises `InputError` if the file cannot be written."""
    import msgspec

    try:
        Path(path).write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}", param="records") from error


def print_table(report: dict[str, Any]) -> None:
    """The report for a person: a row for every class, then what holds for all."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if os.isatty(1) else 132, highlight=False, markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    heads = ("class", "budget", "offered", "on time", "useful", "refused", "truncated", "late of admitted")
    for index, head in enumerate((*heads, "ttft p50 / p99", "itl p50 / p99", "e2e p50 / p99")):
        table.add_column(head, justify="left" if index == 0 else "right")
    for name, row in [*report["classes"].items(), ("all", report)]:
        budget = row.get("budget_ms")
        shares = (row[key] for key in ("on_time", "useful", "refused", "truncated", "late_among_admitted"))
        table.add_row(
            name,
            "" if budget is None else f"{budget:g} ms",
            str(row["offered"]),
            *("-" if share is None else f"{100 * share:.1f} %" for share in shares),
            *(pair(row[key]) for key in ("ttft_ms", "itl_ms", "e2e_ms")),
        )
    console.print(table)
    for line in remarks(report):
        console.print(line)


def pair(percentiles: dict[str, float] | None) -> str:
    """`p50 / p99` in milliseconds."""
    return "-" if percentiles is None else f"{percentiles['p50']:.1f} / {percentiles['p99']:.1f}"


def remarks(report: dict[str, Any]) -> list[str]:
    """What the table leaves out, a line each."""
    lag = report["send_lag_ms"]
    out = [f"goodput {report['goodput_per_s']:.2f} requests/s on time, of {show_rate(report['offered_per_s'])} offered"]
    if report["notice_ms"] is not None:
        notice, share = report["notice_ms"], report["notice_share_of_budget_p99"]
        of_budget = "" if share is None else f" ({100 * share:.1f} % of the budget)"
        out.append(f"refusals told in p50 {notice['p50']:.1f} ms, p99 {notice['p99']:.1f} ms{of_budget}")
    receipts = report["receipts"]
    if receipts is not None and receipts["coverage"] is not None:
        out.append(
            f"bounds: {100 * receipts['coverage']:.2f} % kept, median bound / actual {receipts['tightness']:.2f}; "
            f"client's clock less the receipt's: median {receipts['clock_error_ms']['p50']:.2f} ms"
        )
    if report["failed"] or report["expired"]:
        out.append(f"failed {100 * report['failed']:.1f} %, expired in the queue {100 * report['expired']:.1f} %")
    if lag is not None:
        void = "  VOID: the client was late, so this says nothing about the server" if report["void"] else ""
        out.append(f"send lag p50 {lag['p50']:.2f} ms, p99 {lag['p99']:.2f} ms{void}")
    return out


def show_rate(rate: float | None) -> str:
    """Requests a second."""
    return "-" if rate is None else f"{rate:.2f}/s"
