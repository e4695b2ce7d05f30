"""The lines that are measured: a shape, a file, the work of one sample, and what the machine would allow.

Arithmetic only. A line's limit is the machine's own: bytes that one token must read against the measured bandwidth, or
operations of a prompt's linear layers against the register-only int8 peak. Both are those of the file, so that every
engine that runs it stands beside the same number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from haomiao.measure.shapes import SHAPES

Work = Literal["decode", "prefill", "itl", "coldstart", "memory"]
WEIGHT_BYTES = {"Q4_0": 18 / 32, "Q8_0": 34 / 32}  # a block of 32: float16 scale and codes
KV_BYTES = {"bf16": 2.0, "int8": 34 / 32}
BUSY_SPIN = "one process that spins, beside"


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table. A sample is one run of `work` by one engine."""

    name: str
    shape: str
    file: str
    work: Work
    prompt: int = 512
    new: int = 64
    streams: int = 1
    kv: str = "bf16"
    neighbour: bool = False
    engines: tuple[str, ...] = ("haomiao", "llama.cpp", "openvino", "programs")
    """Which can do it: `programs` are those of --peer."""
    target: str = ""
    """What the project asks of itself, in words."""
    ratio: float | None = None
    """Its least ratio to the best peer, in favour of ours."""
    share: float | None = None
    """Its least share of the limit."""

    @property
    def point(self) -> str:
        """Our operating point for the file."""
        return "int8" if self.file == "Q8_0" else "int4"

    @property
    def metric(self) -> str:
        """What the line is judged by."""
        return {"itl": "p99_ms", "coldstart": "exit_ms"}.get(self.work, "tok_s")

    @property
    def lower_is_better(self) -> bool:
        """Times are; rates are not."""
        return self.metric.endswith("_ms")

    @property
    def context(self) -> int:
        """Tokens that a sequence comes to."""
        return self.prompt + self.new + 1

    def bytes_per_step(self) -> float:
        """Weights and cached K and V that one decode step reads, at the middle of the answer."""
        shape = SHAPES[self.shape]
        weights = (shape.body_weights + shape.head_weights) * WEIGHT_BYTES[self.file]
        kv = 2 * shape.layers * shape.kv_heads * shape.head_dim * KV_BYTES[self.kv]
        return weights + kv * (self.prompt + self.new / 2) * self.streams

    def limit_tok_s(self, read_gb_s: float, int8_gops: float) -> float | None:
        """Tokens per second that the machine allows; None for times."""
        if self.work in ("decode", "memory"):
            return self.streams * read_gb_s * 1e9 / self.bytes_per_step()
        if self.work == "prefill":
            return int8_gops * 1e9 / SHAPES[self.shape].operations_per_token()
        return None


_QWEN, _LLAMA, _SEVEN = "qwen2.5-0.5b", "llama-3.2-1b", "llama-2-7b"
_NO_OPENVINO = ("haomiao", "llama.cpp", "programs")  # it prefills anew for every answer, or loads for minutes
_BENCH = ("haomiao", "llama.cpp", "programs")

LINES: dict[str, Line] = {
    line.name: line
    for line in (
        Line("decode-0.5b-int4", _QWEN, "Q4_0", "decode", target="1.15x, 92 % of bandwidth", ratio=1.15, share=0.92),
        Line("decode-1b-int4", _LLAMA, "Q4_0", "decode", target="1.15x, 92 % of bandwidth", ratio=1.15, share=0.92),
        Line("decode-0.5b-int8", _QWEN, "Q8_0", "decode", target="1.1x", ratio=1.1),
        Line(
            *("streams-0.5b-4", _QWEN, "Q4_0", "decode", 32, 64, 4),
            engines=_BENCH,
            target="3x llama.cpp's batched decode",
            ratio=3.0,
        ),
        Line(
            *("streams-0.5b-8", _QWEN, "Q4_0", "decode", 32, 64, 8),
            engines=_BENCH,
            target="3.5x llama.cpp's batched decode",
            ratio=3.5,
        ),
        Line("prefill-0.5b-512", _QWEN, "Q4_0", "prefill", target="1.4x, 70 % of peak", ratio=1.4, share=0.7),
        Line("prefill-1b-512", _LLAMA, "Q4_0", "prefill", target="1.3x, 70 % of peak", ratio=1.3, share=0.7),
        Line("prefill-0.5b-4096", _QWEN, "Q4_0", "prefill", 4096, target="1.4x", ratio=1.4),
        Line(
            *("decode-0.5b-8192", _QWEN, "Q4_0", "decode", 8192, 48, 1, "int8"),
            engines=_NO_OPENVINO,
            target="80 % of the speed at 512",
        ),
        Line("coldstart-0.5b", _QWEN, "Q4_0", "coldstart", 8, 1, engines=("haomiao", "programs"), target="400 ms"),
        Line("itl-0.5b", _QWEN, "Q4_0", "itl", 64, 256, engines=("haomiao", "llama.cpp"), target="p99/p50 1.25"),
        Line(
            *("itl-0.5b-neighbour", _QWEN, "Q4_0", "itl", 64, 256),
            neighbour=True,
            engines=("haomiao", "llama.cpp"),
            target="no worse than llama.cpp",
            ratio=1.0,
        ),
        Line(
            *("decode-7b-int4", _SEVEN, "Q4_0", "memory", 32, 24),
            engines=_NO_OPENVINO,
            target="inside 8 GB, 92 % of bandwidth",
            share=0.92,
        ),
    )
}
