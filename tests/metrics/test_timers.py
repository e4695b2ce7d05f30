"""The stopwatch, on a clock that the test drives; and the shape of the measured ceilings."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

import haomiao
from haomiao.errors import UnavailableError
from haomiao.metrics.ceilings import measure_ceilings
from haomiao.metrics.timers import Stopwatch


def test_stopwatch() -> None:
    moments = iter([0, 1_000_000, 3_500_000, 4_000_000, 9_000_000])
    watch = Stopwatch(lambda: next(moments))
    assert [watch.mark(), watch.mark(), watch.mark()] == [1.0, 3.5, 4.0]
    assert watch.gaps_ms == [2.5, 0.5]
    assert watch.elapsed_ms() == 9.0
    assert watch.marks_ms == [1.0, 3.5, 4.0]


def test_ceilings_name_threads_and_units(monkeypatch: pytest.MonkeyPatch) -> None:
    core = SimpleNamespace(read_bandwidth=lambda t, mb, s: 10.0 * t, int8_peak=lambda t, s: 100.0 * t)
    monkeypatch.setitem(sys.modules, "haomiao._core", core)
    monkeypatch.setattr(haomiao, "_core", core, raising=False)
    assert measure_ceilings(2).as_dict() == {"threads": 2, "read_gb_s": 20.0, "int8_gops": 200.0}


def test_ceilings_without_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(haomiao, "_core", raising=False)
    monkeypatch.setitem(sys.modules, "haomiao._core", None)
    with pytest.raises(UnavailableError):
        measure_ceilings(1)
