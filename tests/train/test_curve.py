"""Loss against tokens over several logs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from haomiao.errors import InputError
from haomiao.train.curve import loss_against_tokens


def log(folder: Path, name: str, *lines: dict[str, float]) -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def test_a_log_goes_on_where_the_one_before_ended(tmp_path: Path) -> None:
    first = log(tmp_path, "a", {"tokens": 10, "loss": 8.0}, {"valid_loss": 7.0}, {"tokens": 20, "loss": 6.0})
    second = log(tmp_path, "b", {"step": 0, "valid_loss": 5.0}, {"tokens": 10, "loss": 4.0}, {"tokens": 20, "loss": 2})
    assert loss_against_tokens([first, second], 2) == [(20, 7.0), (40, 3.0)]
    assert loss_against_tokens([first, second], 4) == [(10, 8.0), (20, 6.0), (30, 4.0), (40, 2.0)]


def test_a_line_counts_for_its_tokens(tmp_path: Path) -> None:
    path = log(tmp_path, "a", {"tokens": 30, "loss": 4.0}, {"tokens": 40, "loss": 8.0})
    assert loss_against_tokens([path], 1) == [(40, 5.0)]


def test_a_share_without_a_line_is_left_out(tmp_path: Path) -> None:
    path = log(tmp_path, "a", {"tokens": 30, "loss": 4.0}, {"tokens": 40, "loss": 2.0})
    assert loss_against_tokens([path], 4) == [(30, 4.0), (40, 2.0)]


def test_a_log_without_a_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no loss"):
        loss_against_tokens([log(tmp_path, "a", {"valid_loss": 1.0})], 3)
