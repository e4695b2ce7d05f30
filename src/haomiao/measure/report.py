"""What is said of a measurement: JSON objects, and lines for a person. Arithmetic on results; measures nothing."""

from __future__ import annotations

from typing import Any

from haomiao.measure.latency import LatencyResult
from haomiao.metrics.ceilings import Ceilings


def bench_report(
    result: LatencyResult,
    *,
    model: str,
    point: str,
    threads: int,
    bytes_per_step: float | None,
    operations_per_token: float | None,
    ceilings: Ceilings | None,
) -> dict[str, Any]:
    """The object that `haomiao bench --json` prints. What could not be measured is null, never a guess.

    `bytes_per_step` is what one decode step reads (weights at the point, and K/V of all streams at the middle of the
    answer). All streams share one reading of the weights, so `bytes_per_token` is that divided by the streams, and
    `read_gb_s = bytes_per_token * decode_tok_s`. `share_of_peak` compares prefill's int8 operations with the peak.
    """
    work = result.workload
    decode = result.decode_tok_s.median if result.decode_tok_s else None
    per_token = bytes_per_step / work.streams if bytes_per_step is not None else None
    read = per_token * decode / 1e9 if per_token is not None and decode is not None else None
    gops = operations_per_token * result.prefill_tok_s.median / 1e9 if operations_per_token is not None else None
    return {
        "model": model,
        "point": point,
        "threads": threads,
        "streams": work.streams,
        "prompt_tokens": work.prompt_tokens,
        "new_tokens": work.new_tokens,
        "repeat": work.repeat,
        "prefill_tok_s": result.prefill_tok_s.median,
        "decode_tok_s": decode,
        "itl_ms": {"p50": result.itl_p50_ms, "p99": result.itl_p99_ms},
        "ttft_ms": result.ttft_ms.median,
        "bytes_per_token": per_token,
        "read_gb_s": read,
        "read_ceiling_gb_s": ceilings.read_gb_s if ceilings else None,
        "share_of_bandwidth": read / ceilings.read_gb_s if read is not None and ceilings else None,
        "prefill_gops": gops,
        "int8_peak_gops": ceilings.int8_gops if ceilings else None,
        "share_of_peak": gops / ceilings.int8_gops if gops is not None and ceilings else None,
        "spread": {
            "prefill_tok_s": result.prefill_tok_s.as_dict(),
            "decode_tok_s": result.decode_tok_s.as_dict() if result.decode_tok_s else None,
            "ttft_ms": result.ttft_ms.as_dict(),
        },
    }


def bench_lines(report: dict[str, Any]) -> str:
    """The report for a person. What was not measured is shown as a dash."""

    def show(value: float | None, form: str, unit: str) -> str:
        return "-" if value is None else f"{value:{form}} {unit}"

    def share(value: float | None, of: str) -> str:
        return "-" if value is None else f"{100 * value:.0f} % of {of}"

    itl = report["itl_ms"]
    peak = share(report["share_of_peak"], "the int8 peak")
    bandwidth = share(report["share_of_bandwidth"], "the bandwidth")
    rows = [
        (
            "model",
            f"{report['model']}, point {report['point']}, threads {report['threads']}, streams {report['streams']}",
        ),
        ("prefill", f"{show(report['prefill_tok_s'], '.1f', 'tok/s')}  ({peak})"),
        ("decode", f"{show(report['decode_tok_s'], '.1f', 'tok/s')}"),
        ("read", f"{show(report['read_gb_s'], '.1f', 'GB/s')} while decoding  ({bandwidth})"),
        ("ttft", show(report["ttft_ms"], ".1f", "ms")),
        ("itl", f"p50 {show(itl['p50'], '.2f', 'ms')}  p99 {show(itl['p99'], '.2f', 'ms')}"),
    ]
    return "\n".join(f"{name:<8}  {text}" for name, text in rows)


def accuracy_lines(report: dict[str, Any]) -> str:
    """The report for a person."""

    def show(interval: dict[str, Any], form: str) -> str:
        return f"{interval['estimate']:{form}} [{interval['low']:{form}}, {interval['high']:{form}}]"

    out = [f"{report['model']} at {report['point']} on {report['text']}: {report['tokens']} tokens"]
    if "kl" in report:
        out += [
            f"  KL from {report['against']}     {show(report['kl'], '.5f')} nats/token",
            f"  top-1 agreement  {show(report['top1'], '.4f')}",
            f"  perplexity       {show(report['candidate']['perplexity'], '.3f')}",
            f"  at {report['against']:<13} {show(report['reference']['perplexity'], '.3f')}",
        ]
    else:
        out.append(f"  perplexity  {show(report['perplexity'], '.3f')}  ({show(report['nll'], '.4f')} nats/token)")
    return "\n".join(out)
