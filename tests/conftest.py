"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data beside the checkout (`HAOMIAO_SHARED`, else `../shared`). A user has none: those tests are skipped."""
    path = Path(os.environ.get("HAOMIAO_SHARED", Path(__file__).resolve().parent.parent.parent / "shared"))
    if not (path / "data").is_dir():
        pytest.skip("the shared data folder is not here")
    return path
