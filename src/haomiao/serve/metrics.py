"""What /metrics says. Names end as vLLM's do, so that dashboards carry over with another prefix; labels are bounded.

Fed with receipts and with the engine's pulse; knows nothing about HTTP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from haomiao.serve.messages import Stats
from haomiao.types import Receipt

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

PREFIX = "haomiao:"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)
OUTCOMES = frozenset(["met", "met_lower_point", "met_single_prefill", "truncated", "missed", "refused"])


class Metrics:
    """All metrics of one server."""

    def __init__(self, model: str = "") -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry: CollectorRegistry = CollectorRegistry()
        self._gauges: dict[str, Any] = {}

        def counter(name: str, help_: str, *labels: str) -> Any:
            return Counter(PREFIX + name, help_, labels, registry=self.registry)

        def gauge(name: str, help_: str) -> Any:
            return Gauge(PREFIX + name, help_, registry=self.registry)

        def histogram(name: str, help_: str, buckets: tuple[float, ...] = SECONDS) -> Any:
            return Histogram(PREFIX + name, help_, buckets=buckets, registry=self.registry)

        self._make_gauge = gauge
        self.http = counter("http_requests", "Requests by route and status", "route", "status")
        self.success = counter("request_success", "Answers by finish reason", "finished_reason")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.generation_tokens = counter("generation_tokens", "Tokens of answers")
        self.prefix_queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self.prefix_hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self.ttft = histogram("time_to_first_token_seconds", "From the request's headers to the first token")
        self.itl = histogram("inter_token_latency_seconds", "Mean between tokens of one answer", TOKEN_SECONDS)
        self.e2e = histogram("e2e_request_latency_seconds", "From the request's headers to the last token")
        self.queue = histogram("request_queue_time_seconds", "Waiting")
        self.prefill = histogram("request_prefill_time_seconds", "Reading the prompt")
        self.decode = histogram("request_decode_time_seconds", "Writing the answer")
        self.running = gauge("num_requests_running", "Sequences that hold KV")
        self.waiting = gauge("num_requests_waiting", "Sequences that wait for KV or their turn")
        self.kv_usage = gauge("kv_cache_usage_perc", "Share of the KV blocks in use (1 is all)")
        self.budgets = counter("budget_requests", "Requests with a budget by outcome", "outcome")
        self.budget_used = histogram("budget_used_ratio", "Time taken / budget", RATIOS)
        self.predictions = counter("predictions", "Answers whose time was predicted")
        self.covered = counter("predictions_covered", "Those that took no longer than predicted")
        self.prediction_ratio = histogram("prediction_ratio", "Predicted bound / time taken", RATIOS)
        self.point_tokens = counter("point_tokens", "Tokens computed by operating point", "point")
        self.error = gauge("estimated_error_kl", "Error of the last answer as measured for its points, nats per token")
        self.restarts = gauge("engine_restarts", "Crashes and hangs of the engine since the server started")
        self.up = gauge("engine_up", "1 if the engine answers")

    def finish(self, receipt: Receipt, finish_reason: str) -> None:
        """One sample ended with an answer."""
        self.success.labels(finish_reason).inc()
        self.generation_tokens.inc(receipt.completion_tokens)
        self.prompt_tokens.inc(receipt.prompt_tokens)
        self.prefix_queries.inc(receipt.prompt_tokens)
        self.prefix_hits.inc(receipt.cached_tokens)
        self.e2e.observe(receipt.total_ms / 1e3)
        self.queue.observe(receipt.queue_ms / 1e3)
        self.prefill.observe(receipt.prefill_ms / 1e3)
        self.decode.observe(receipt.decode_ms / 1e3)
        if receipt.ttft_ms is not None:
            self.ttft.observe(receipt.ttft_ms / 1e3)
        if receipt.completion_tokens > 1:
            self.itl.observe(receipt.decode_ms / 1e3 / (receipt.completion_tokens - 1))
        for entry in receipt.schedule:
            self.point_tokens.labels(entry.point).inc(entry.tokens)
        if receipt.estimated_error is not None:
            self.error.set(receipt.estimated_error)
        self.outcome(receipt)

    def outcome(self, receipt: Receipt | None, refused: bool = False) -> None:
        """What became of a budget."""
        if refused or receipt is None:
            self.budgets.labels("refused").inc()
            return
        if receipt.outcome in OUTCOMES:
            self.budgets.labels(receipt.outcome).inc()
        if receipt.budget_ms:
            self.budget_used.observe(receipt.total_ms / receipt.budget_ms)
        if receipt.predicted_ms is not None and receipt.total_ms > 0:
            self.predictions.inc()
            self.prediction_ratio.observe(receipt.predicted_ms / receipt.total_ms)
            if receipt.total_ms <= receipt.predicted_ms:
                self.covered.inc()

    def render(self, stats: Stats, *, up: bool, restarts: int) -> bytes:
        """The text of /metrics."""
        from prometheus_client import generate_latest

        self.up.set(1.0 if up else 0.0)
        self.restarts.set(restarts)
        self.running.set(stats.running)
        self.waiting.set(stats.waiting)
        self.kv_usage.set(1.0 - stats.kv_free / stats.kv_blocks if stats.kv_blocks else 0.0)
        for name, value in list(stats.gauges.items())[:64]:
            if name not in self._gauges:
                self._gauges[name] = self._make_gauge(name, "Reported by the engine")
            self._gauges[name].set(value)
        return bytes(generate_latest(self.registry))
