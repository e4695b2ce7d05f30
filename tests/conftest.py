"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# No timed assertions: a busy machine is not a failure. In CI the examples are always the same, so that it judges the
# change and not the dice; everywhere else (a developer, .ci/nightly) they are new each time.
settings.register_profile("haomiao", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("haomiao")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data beside the checkout (`HAOMIAO_SHARED`, else `../shared`). A user has none: those tests are skipped."""
    path = Path(os.environ.get("HAOMIAO_SHARED", Path(__file__).resolve().parent.parent.parent / "shared"))
    if not (path / "data").is_dir():
        pytest.skip("the shared data folder is not here")
    return path
