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
def read_bandwidth(threads: int, megabytes: int, seconds: float) -> float: ...
def int8_peak(threads: int, seconds: float) -> float: ...

# ---- artifact.cc

def parse_artifact(head: npt.NDArray[Any], file_bytes: int) -> list[dict[str, Any]]: ...
