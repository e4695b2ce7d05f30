"""What training needs of the machine, and the one line that says so where it is missing. Imports torch for nobody."""

from __future__ import annotations

import importlib.util

from haomiao.errors import UnavailableError


def require_torch(what: str) -> None:
    """Raises `UnavailableError` if PyTorch is not installed; `what` is what cannot be done without it."""
    if importlib.util.find_spec("torch") is None:
        raise UnavailableError(f"{what} needs PyTorch: pip install 'haomiao[torch]'", code="torch_missing")
