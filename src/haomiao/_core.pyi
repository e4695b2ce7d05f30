"""Types of the compiled core (native/bind). One block per binding file."""

from typing import Any

import numpy.typing as npt

# ---- kernels.cc

def isas() -> list[str]: ...

class Weight:
    rows: int
    cols: int
    padded_cols: int
    def __init__(
        self,
        encoding: int,
        rows: int,
        cols: int,
        group: int,
        lo_shift: int,
        hi: npt.NDArray[Any],
        lo: npt.NDArray[Any] | None,
        kept: npt.NDArray[Any] | None = None,
    ) -> None: ...

def prepare(isa: str, activation: str, x: npt.NDArray[Any], padded_cols: int) -> npt.NDArray[Any]: ...
def linear(
    isa: str,
    weight: Weight,
    both: bool,
    activation: str,
    prepared: npt.NDArray[Any],
    out: npt.NDArray[Any],
    bias: npt.NDArray[Any] | None,
    tile_begin: int,
    tile_end: int,
) -> None: ...
def read_row(isa: str, weight: Weight, row: int, out: npt.NDArray[Any]) -> None: ...
def quantize_planes(
    x: npt.NDArray[Any], lo_shift: int, scales: npt.NDArray[Any], hi: npt.NDArray[Any], lo: npt.NDArray[Any] | None
) -> bool: ...
def lo_norms(isa: str, weight: Weight, tile: int, norms: npt.NDArray[Any]) -> None: ...
def head_sketch(isa: str, weight: Weight, tile: int, hi: npt.NDArray[Any], norms: npt.NDArray[Any]) -> None: ...
def lengths(isa: str, x: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> None: ...
def head_bound(
    isa: str, weight: Weight, tile: int, norms: npt.NDArray[Any], lengths: npt.NDArray[Any], h: npt.NDArray[Any]
) -> tuple[float, float]: ...
def read_bandwidth(threads: int, megabytes: int, seconds: float) -> float: ...
def int8_peak(threads: int, seconds: float) -> float: ...
def f32_peak(threads: int, seconds: float) -> float: ...

# ---- artifact.cc

def parse_artifact(head: npt.NDArray[Any], file_bytes: int) -> list[dict[str, Any]]: ...

# ---- rowwise.cc

def norm(
    isa: str,
    x: npt.NDArray[Any],
    weight: npt.NDArray[Any],
    bias: npt.NDArray[Any] | None,
    eps: float,
    rms: bool,
    out: npt.NDArray[Any],
) -> None: ...
def rope(isa: str, x: npt.NDArray[Any], dim: int, cos_sin: npt.NDArray[Any]) -> None: ...
def glu(isa: str, gate: npt.NDArray[Any], up: npt.NDArray[Any], function: str, out: npt.NDArray[Any]) -> None: ...
def activate(isa: str, x: npt.NDArray[Any], function: str, out: npt.NDArray[Any]) -> None: ...
def add(isa: str, target: npt.NDArray[Any], source: npt.NDArray[Any]) -> None: ...
def scale_softcap(isa: str, x: npt.NDArray[Any], scale: float, softcap: float) -> None: ...
def argmax(isa: str, x: npt.NDArray[Any]) -> int: ...
def attend(
    isa: str,
    kv: str,
    queries: npt.NDArray[Any],
    k: npt.NDArray[Any],
    v: npt.NDArray[Any],
    scale: float,
    window: int,
    softcap: float,
    tokens_per_call: int,
    splits_per_call: int,
    out: npt.NDArray[Any],
) -> None: ...

# ---- runtime.cc

class Plan:
    def __init__(self, vocab_size: int, max_context: int) -> None: ...
    def matrix(
        self,
        name: str,
        encoding: int,
        rows: int,
        cols: int,
        group: int,
        lo_shift: int,
        hi: npt.NDArray[Any],
        lo: npt.NDArray[Any] | None,
        kept: npt.NDArray[Any] | None = None,
    ) -> None: ...
    def vector(self, name: str, values: npt.NDArray[Any]) -> None: ...
    def layer(self, kv_heads: int, head_dim: int, window: int) -> None: ...
    def buffer(self, name: str, width: int) -> None: ...
    def rope_table(self, dim: int, inv_freq: list[float], attention_factor: float) -> None: ...
    def embed(self, out: str, table: str, scale: float, positions: str) -> None: ...
    def norm(self, out: str, source: str, weight: str, eps: float, kind: str, bias: str) -> None: ...
    def linear(self, out: str, source: str, weight: str, bias: str) -> None: ...
    def head_norm(self, buffer: str, offset: int, heads: int, head_dim: int, weight: str, eps: float) -> None: ...
    def rope(self, buffer: str, offset: int, heads: int, head_dim: int, rope: int) -> None: ...
    def attention(
        self,
        out: str,
        qkv: str,
        layer: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        k_offset: int,
        v_offset: int,
        scale: float,
        window: int,
        softcap: float,
    ) -> None: ...
    def add(self, target: str, source: str) -> None: ...
    def glu(self, out: str, source: str, function: str) -> None: ...
    def activate(self, out: str, source: str, function: str) -> None: ...
    def head(self, source: str, weight: str, bias: str, scale: float, softcap: float) -> None: ...

class Runner:
    threads: int
    active: int
    crowded: bool
    isa: str
    max_context: int
    hidden_size: int
    kv_bytes_per_block: int
    buffer_bytes: int
    rescored: float
    def __init__(
        self,
        plan: Plan,
        isa: str,
        kv: str,
        kv_blocks: int,
        max_step_tokens: int,
        threads: int,
        pin: bool,
        points: list[tuple[str, bool, bool, bool, bool]],
    ) -> None: ...
    def step(
        self,
        point: int,
        token_ids: npt.NDArray[Any],
        span_starts: npt.NDArray[Any],
        past: npt.NDArray[Any],
        block_tables: npt.NDArray[Any],
        logit_rows: npt.NDArray[Any],
        greedy: npt.NDArray[Any] | None,
        copies: npt.NDArray[Any] | None,
        logits: npt.NDArray[Any],
        argmax: npt.NDArray[Any],
        hidden_rows: npt.NDArray[Any] | None = None,
        hidden: npt.NDArray[Any] | None = None,
    ) -> int: ...
    def copy_blocks(self, pairs: npt.NDArray[Any]) -> None: ...
    def profile(self, on: bool) -> None: ...
    def last_step_profile(self) -> list[tuple[str, int]]: ...

def default_threads() -> int: ...
