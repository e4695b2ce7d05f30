"""Instruction sets: choice, force and refusal; the ceilings are numbers."""

from __future__ import annotations

import pytest

from haomiao import _core
from haomiao.errors import UnavailableError
from haomiao.kernels import isa


def test_scalar_is_always_there_and_last() -> None:
    names = isa.available()
    assert names[-1] == "scalar"
    assert len(set(names)) == len(names)


def test_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HAOMIAO_ISA", raising=False)
    assert isa.selected() == isa.available()[0]
    monkeypatch.setenv("HAOMIAO_ISA", "scalar")
    assert isa.selected() == "scalar"
    monkeypatch.setenv("HAOMIAO_ISA", "mmx")
    with pytest.raises(UnavailableError, match="mmx"):
        isa.selected()


def test_ceilings_are_positive() -> None:
    assert _core.read_bandwidth(1, 8, 0.0) > 0
    assert _core.int8_peak(1, 0.0) > 0
    assert _core.f32_peak(1, 0.0) > 0
    assert len(isa.allowed_cores()) >= 1
    for threads, megabytes in ((0, 8), (1, 0), (5000, 8)):
        with pytest.raises(ValueError, match="must be"):
            _core.read_bandwidth(threads, megabytes, 0.0)
    with pytest.raises(ValueError, match="threads"):
        _core.int8_peak(0, 0.0)
    with pytest.raises(ValueError, match="threads"):
        _core.f32_peak(0, 0.0)
