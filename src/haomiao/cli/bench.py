"""Measure how fast a model runs on this machine, beside the machine's own ceilings; or, with --server, how a server
keeps its deadlines under load.

Of a model: prompts are random token ids, so no tokenizer is needed; end-of-sequence is ignored. The ceilings are
measured first, with the same threads: sequential reads from memory, and int8 multiply-adds. Nothing is drafted unless
--speculate says so: random prompts lead models into loops, whose speed is nobody's.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from haomiao.cli import load, options, terminal
from haomiao.progress import ProgressBar


def configure(parser: ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    options.add_model(parser)
    options.add_runtime(parser)
    options.add_speculation(parser, "off")
    add("--prompt-tokens", type=options.positive, default=512, help="default 512")
    add("--new-tokens", type=options.positive, default=64, help="default 64")
    add("--streams", type=options.positive, default=1, help="requests at once (default 1)")
    add("--repeat", type=options.positive, default=3, help="runs measured, after one that is not (default 3)")
    add("--seed", type=options.natural, default=0, help="of the random prompts, or of the trace (default 0)")
    add("--json", action="store_true", help="print one object last")
    add("--quiet", action="store_true", help="no progress bar")
    load.configure(parser)


def run(args: Namespace) -> int:
    """Ceilings, model, runs, report; or the load of a server."""
    if args.server is not None:
        return load.run(args)
    load.refuse_flags(args)
    model = options.take_model(args)
    given = options.runtime_options(args)

    from haomiao.api import LLM
    from haomiao.measure.latency import Workload, measure_latency
    from haomiao.measure.report import bench_lines, bench_report
    from haomiao.metrics.ceilings import measure_ceilings

    workload = Workload(args.prompt_tokens, args.new_tokens, args.streams, args.repeat, seed=args.seed)
    workload.check()
    # each stream holds a prompt and an answer; a context of its own keeps a long default from being allocated
    given.setdefault("max_context", workload.prompt_tokens + workload.new_tokens)
    given.setdefault("speculate", "off")
    with ProgressBar(quiet=args.quiet) as bar:
        llm = LLM(model, progress=bar, prefix_cache=False, **given)
        try:
            ceilings = measure_ceilings(llm.threads)
            if not args.json:
                print(f"ceilings  {ceilings.read_gb_s:.1f} GB/s read, {ceilings.int8_gops:.0f} int8 Gop/s")
            result = measure_latency(llm, workload, progress=lambda done, total: bar("runs", done, total))
            report = bench_report(
                result,
                model=llm.name,
                point=llm.point,
                threads=llm.threads,
                ceilings=ceilings,
                **reads(llm, workload),
            )
            report["speculate"] = given["speculate"]
        finally:
            llm.close()
    if args.json:
        terminal.write_json(report)
    else:
        print(bench_lines(report))
    return 0


def reads(llm: Any, workload: Any) -> dict[str, Any]:
    """What a decode step in the middle of the answer reads, and what a prompt token computes."""
    from haomiao.measure.bytes import kv_bytes_per_token, operations_per_token, weight_bytes_per_step

    context = workload.prompt_tokens + workload.new_tokens / 2
    weights = weight_bytes_per_step(llm.plan, llm.weights, llm.point)
    kv = kv_bytes_per_token(llm.plan, llm.kv) * context * workload.streams
    return {"bytes_per_step": weights + kv, "operations_per_token": operations_per_token(llm.plan, llm.weights)}
