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
def read_bandwidth(threads: int, megabytes: int, seconds: float) -> float: ...
def int8_peak(threads: int, seconds: float) -> float: ...

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
