"""What is said of a measurement: JSON objects, and lines for a person. Arithmetic on results; measures nothing."""

from __future__ import annotations

from typing import Any

from haomiao.measure.accuracy import AgreementResult, PerplexityResult
from haomiao.measure.latency import LatencyResult
from haomiao.metrics.ceilings import Ceilings
from haomiao.metrics.statistics import Interval


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


def point_report(result: PerplexityResult | AgreementResult) -> dict[str, Any]:
    """What `haomiao eval --json` says of a point. `_pm` is half the width of the 95 % interval; null: not measured."""
    agreement = result if isinstance(result, AgreementResult) else None
    perplexity = (agreement.candidate if agreement else result).perplexity  # type: ignore[union-attr]
    return {
        "perplexity": perplexity.estimate,
        "perplexity_pm": half_width(perplexity),
        "kl_mean": agreement.kl.estimate if agreement else None,
        "kl_pm": half_width(agreement.kl) if agreement else None,
        "kl_median": agreement.kl_median if agreement else None,
        "kl_p99": agreement.kl_p99 if agreement else None,
        "top1": agreement.top1.estimate if agreement else None,
        "top1_pm": half_width(agreement.top1) if agreement else None,
    }


def half_width(interval: Interval) -> float:
    """The `pm` of `estimate ± pm`."""
    return (interval.high - interval.low) / 2


ACCURACY_COLUMNS = ("point", "perplexity", "KL mean", "median", "p99", "top-1", "ms/token", "MB/token", "task")


def accuracy_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table of `haomiao eval`, one row a point; `-` for what was not measured."""

    def show(value: float | None, form: str, pm: float | None = None) -> str:
        if value is None:
            return "-"
        return f"{value:{form}}" + ("" if pm is None else f" ± {pm:{form}}")

    rows: list[tuple[str, ...]] = []
    for name, figures in report["points"].items():
        task = figures.get("task") or {}
        rows.append(
            (
                name,
                show(figures.get("perplexity"), ".3f", figures.get("perplexity_pm")),
                show(figures.get("kl_mean"), ".5f", figures.get("kl_pm")),
                show(figures.get("kl_median"), ".5f"),
                show(figures.get("kl_p99"), ".4f"),
                show(figures.get("top1"), ".4f", figures.get("top1_pm")),
                show(figures.get("ms_per_token"), ".2f"),
                show(None if figures.get("bytes") is None else figures["bytes"] / 1e6, ".1f"),
                show(task.get("accuracy"), ".3f", task.get("accuracy_pm")),
            )
        )
    return rows
