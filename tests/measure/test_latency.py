"""The arithmetic of the bench, on moments that the test makes up, and the streaming of several requests at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from haomiao.errors import InputError, ModelError
from haomiao.measure.latency import Run, Workload, measure_latency, run_once, summarize_runs
from haomiao.measure.report import bench_lines, bench_report
from haomiao.metrics.ceilings import Ceilings


class FakeStreamer:
    """Yields as many tokens as asked, `per_chunk` at a time."""

    vocab_size = 50

    def __init__(self, *, per_chunk: int = 1, short: int = 0, fails: bool = False) -> None:
        self.prompts: list[Sequence[int]] = []
        self.options: list[dict[str, Any]] = []
        self._per_chunk, self._short, self._fails = per_chunk, short, fails

    def stream(self, prompt: Sequence[int], **options: Any) -> Iterator[Any]:
        self.prompts.append(prompt)
        self.options.append(options)
        if self._fails:
            raise ModelError("no such thing")
        left = options["max_tokens"] - self._short
        while left > 0:
            yield SimpleNamespace(token_ids=[1] * min(self._per_chunk, left))
            left -= self._per_chunk


def test_one_stream_by_hand() -> None:
    run = Run([[100.0, 110.0, 120.0, 140.0]])
    assert run.prefill_ms == 100.0
    assert run.gaps_ms == [10.0, 10.0, 20.0]
    assert run.decode_rate() == pytest.approx(3 / 0.040)
    result = summarize_runs([run], Workload(prompt_tokens=512, new_tokens=4))
    assert result.prefill_tok_s.median == pytest.approx(5120.0)
    assert (result.itl_p50_ms, result.ttft_ms.median) == (10.0, 100.0)


def test_decode_begins_when_the_last_stream_has_begun() -> None:
    run = Run([[10.0, 20.0, 60.0, 70.0], [50.0, 60.0, 70.0, 80.0]])
    assert run.prefill_ms == 50.0
    assert run.gaps_ms == [10.0, 10.0, 10.0, 10.0]  # the gap 20 -> 60 holds the other stream's prefill
    assert run.decode_rate() == pytest.approx(5 / 0.030)


def test_one_token_has_no_decode() -> None:
    result = summarize_runs([Run([[5.0]])], Workload(prompt_tokens=8, new_tokens=1))
    assert result.decode_tok_s is None
    assert result.itl_p50_ms is None


def test_report_identities_and_keys() -> None:
    run = Run([[100.0, 110.0, 120.0, 140.0]] * 2)
    result = summarize_runs([run], Workload(prompt_tokens=512, new_tokens=4, streams=2))
    report = bench_report(
        result,
        model="m",
        point="int8",
        threads=2,
        bytes_per_step=4e6,
        operations_per_token=1e6,
        ceilings=Ceilings(2, read_gb_s=1.0, int8_gops=50.0),
    )
    promised = "model point threads streams prefill_tok_s decode_tok_s itl_ms ttft_ms bytes_per_token read_gb_s "
    promised += "share_of_bandwidth int8_peak_gops share_of_peak"
    assert set(promised.split()) <= set(report)
    assert set(report["itl_ms"]) == {"p50", "p99"}
    assert report["bytes_per_token"] == 2e6  # two streams share one reading of the weights
    assert report["read_gb_s"] == pytest.approx(report["bytes_per_token"] * report["decode_tok_s"] / 1e9)
    assert report["share_of_bandwidth"] == pytest.approx(report["read_gb_s"])
    assert report["share_of_peak"] == pytest.approx(1e6 * report["prefill_tok_s"] / 1e9 / 50.0)
    assert "p50 10.00 ms" in bench_lines(report)


def test_what_was_not_measured_is_null() -> None:
    result = summarize_runs([Run([[5.0]])], Workload(prompt_tokens=8, new_tokens=1))
    report = bench_report(
        result, model="m", point="full", threads=1, bytes_per_step=None, operations_per_token=None, ceilings=None
    )
    for key in ("decode_tok_s", "read_gb_s", "share_of_bandwidth", "share_of_peak", "bytes_per_token"):
        assert report[key] is None
    assert "(-)" in bench_lines(report)


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("per_chunk", [1, 4])
def test_every_stream_gets_its_own_prompt_and_all_its_tokens(streams: int, per_chunk: int) -> None:
    llm = FakeStreamer(per_chunk=per_chunk)
    seen: list[tuple[int, int]] = []
    workload = Workload(prompt_tokens=6, new_tokens=5, streams=streams, repeat=2, warmup=1)
    result = measure_latency(llm, workload, progress=lambda done, total: seen.append((done, total)))
    assert len(llm.prompts) == 3 * streams
    assert all(len(prompt) == 6 and all(0 <= token < 50 for token in prompt) for prompt in llm.prompts)
    assert all(options["ignore_eos"] for options in llm.options)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert result.ttft_ms.samples == 2 * streams


def test_the_same_seed_gives_the_same_prompts() -> None:
    first, second, other = FakeStreamer(), FakeStreamer(), FakeStreamer()
    measure_latency(first, Workload(prompt_tokens=6, new_tokens=1, repeat=1))
    measure_latency(second, Workload(prompt_tokens=6, new_tokens=1, repeat=1))
    measure_latency(other, Workload(prompt_tokens=6, new_tokens=1, repeat=1, seed=1))
    assert first.prompts == second.prompts != other.prompts


@pytest.mark.parametrize("streams", [1, 2])
def test_failures_reach_the_caller(streams: int) -> None:
    with pytest.raises(ModelError):
        run_once(FakeStreamer(fails=True), [[1]] * streams, 4)
    with pytest.raises(InputError, match="3 of 4"):
        run_once(FakeStreamer(short=1), [[1]] * streams, 4)


@pytest.mark.parametrize(
    "bad", [{"prompt_tokens": 0}, {"new_tokens": 0}, {"streams": 0}, {"repeat": 0}, {"warmup": -1}]
)
def test_workload_ranges(bad: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        Workload(**bad).check()
