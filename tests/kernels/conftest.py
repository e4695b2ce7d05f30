"""Hypothesis without a deadline: the machine may be busy, and time is not what these tests are about."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
