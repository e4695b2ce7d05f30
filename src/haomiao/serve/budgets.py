"""Budgets out of body and headers: the earliest counts. Arithmetic and parsing; knows no clock but what it is given."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from haomiao.engine.request import OnBudget
from haomiao.errors import InputError
from haomiao.serve.schemas import Budgeted, Timed

MAX_BUDGET_MS = 86_400_000.0
_GRPC = re.compile(r"([0-9]{1,8})([HMSmun])")
_GRPC_MS = {"H": 3_600_000.0, "M": 60_000.0, "S": 1000.0, "m": 1.0, "u": 1e-3, "n": 1e-6}


@dataclass(frozen=True, slots=True)
class Budget:
    """What a request may take; times are absolute CLOCK_MONOTONIC nanoseconds."""

    arrival_ns: int
    deadline_ns: int | None = None
    ttft_deadline_ns: int | None = None
    on_budget: OnBudget = "degrade"
    min_point: str | None = None
    max_kl: float | None = None
    delivery_ns: int = 0
    """Of the whole budget, what is set aside for the way from the engine to the client."""

    @property
    def given(self) -> bool:
        """True if there is any."""
        return self.deadline_ns is not None or self.ttft_deadline_ns is not None


def budget_of(arrival_ns: int, body: Timed, headers: Mapping[str, str], max_kl: float | None = None) -> Budget:
    """The budget of a request that arrived at `arrival_ns`. `max_kl` is the server's own bound. Raises `InputError`."""
    whole = [ms for ms in (body.budget_ms, _header(headers), _grpc_timeout(headers)) if ms is not None]
    first = body.ttft_ms if isinstance(body, Budgeted) else None
    bounds = [bound for bound in (body.max_kl, max_kl) if bound is not None]
    return Budget(
        arrival_ns,
        arrival_ns + int(min(whole) * 1e6) if whole else None,
        arrival_ns + int(first * 1e6) if first is not None else None,
        body.on_budget or "degrade",
        body.min_point,
        min(bounds) if bounds else None,
    )


def _header(headers: Mapping[str, str]) -> float | None:
    """X-Budget-Ms: a decimal number of milliseconds."""
    text = headers.get("x-budget-ms")
    if text is None:
        return None
    try:
        value = float(text) if len(text) <= 32 and text.isascii() and "_" not in text else math.nan
    except ValueError:
        value = math.nan
    return _checked(value, "X-Budget-Ms", text)


def _grpc_timeout(headers: Mapping[str, str]) -> float | None:
    """grpc-timeout: at most 8 digits and a unit (gRPC over HTTP/2, "Requests")."""
    text = headers.get("grpc-timeout")
    if text is None:
        return None
    found = _GRPC.fullmatch(text)
    return _checked(int(found[1]) * _GRPC_MS[found[2]] if found else math.nan, "grpc-timeout", text)


def _checked(value: float, name: str, text: str) -> float:
    if not value > 0.0 or math.isinf(value):
        raise InputError(f"{name} must be a time of more than 0, not {text[:40]!r}", param=name)
    return min(value, MAX_BUDGET_MS)
