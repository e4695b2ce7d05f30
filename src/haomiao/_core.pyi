"""Types of the compiled core (native/bind). One block per binding file."""

from typing import Any

import numpy.typing as npt

# ---- artifact.cc

def parse_artifact(head: npt.NDArray[Any], file_bytes: int) -> list[dict[str, Any]]: ...
