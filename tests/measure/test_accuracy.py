"""Perplexity and agreement on models whose answers are known in advance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.errors import InputError
from haomiao.measure.accuracy import (
    Question,
    measure_against,
    measure_agreement,
    measure_choices,
    measure_perplexity,
)
from haomiao.measure.report import ACCURACY_COLUMNS, accuracy_rows, point_report

VOCAB = 7


def uniform(ids: Sequence[int]) -> np.ndarray:
    return np.zeros((len(ids), VOCAB), np.float32)


def knows_the_next(ids: Sequence[int]) -> np.ndarray:
    """All but certain of `token + 1`."""
    rows = np.full((len(ids), VOCAB), -30.0, np.float32)
    rows[np.arange(len(ids)), (np.array(ids) + 1) % VOCAB] = 30.0
    return rows


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=40), st.integers(2, 50))
def test_a_uniform_model_has_the_vocabulary_as_perplexity(ids: list[int], window: int) -> None:
    result = measure_perplexity(uniform, ids, window=window)
    assert result.perplexity.estimate == pytest.approx(VOCAB)
    full, rest = divmod(len(ids), window)
    assert result.tokens == full * (window - 1) + max(rest - 1, 0)


def test_windows_weigh_by_their_tokens() -> None:
    ids = [0, 1, 2, 3, 0, 0]  # window of 4: three right guesses; window of 2: one wrong
    result = measure_perplexity(knows_the_next, ids, window=4)
    assert result.tokens == 4
    assert result.nll.estimate == pytest.approx(60.0 / 4, rel=1e-6)
    assert result.nll.low <= result.nll.estimate <= result.nll.high


def test_agreement_with_itself_and_with_another() -> None:
    ids = list(range(VOCAB)) * 4
    same = measure_agreement(knows_the_next, knows_the_next, ids, window=8)
    assert (same.kl.estimate, same.top1.estimate) == (0.0, 1.0)
    other = measure_agreement(knows_the_next, uniform, ids, window=8)
    assert other.kl.estimate == pytest.approx(math.log(VOCAB))
    assert other.reference.perplexity.estimate == pytest.approx(1.0)
    assert other.candidate.perplexity.estimate == pytest.approx(VOCAB)
    assert other.tokens == other.reference.tokens == 24
    assert set(other.as_dict()) == {"kl", "kl_median", "kl_p99", "top1", "reference", "candidate", "tokens"}
    assert other.kl_median <= other.kl_p99


def test_the_reference_may_return_a_view_that_the_next_call_overwrites() -> None:
    buffer = np.zeros((8, VOCAB), np.float32)

    def through_a_buffer(model: object) -> object:
        def call(ids: Sequence[int]) -> np.ndarray:
            buffer[: len(ids)] = model(ids)  # type: ignore[operator]
            return buffer[: len(ids)]

        return call

    result = measure_agreement(through_a_buffer(knows_the_next), through_a_buffer(uniform), range(VOCAB), window=8)
    assert result.kl.estimate == pytest.approx(math.log(VOCAB))


def test_progress_ends_at_all_tokens() -> None:
    seen: list[tuple[int, int]] = []
    measure_perplexity(uniform, [0] * 10, window=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 10), (8, 10), (10, 10)]


def test_refusals() -> None:
    with pytest.raises(InputError, match="2 tokens"):
        measure_perplexity(uniform, [1])
    with pytest.raises(InputError, match="window"):
        measure_perplexity(uniform, [1, 2], window=1)
    with pytest.raises(InputError, match="finite"):
        measure_perplexity(lambda ids: np.full((len(ids), VOCAB), np.nan, np.float32), [1, 2])
    with pytest.raises(InputError, match="rows"):
        measure_perplexity(lambda ids: uniform(ids)[1:], [1, 2])
    with pytest.raises(InputError, match="vocabular"):
        measure_agreement(uniform, lambda ids: uniform(ids)[:, 1:], [1, 2])


def test_several_candidates_are_measured_as_if_alone() -> None:
    ids = list(range(VOCAB)) * 4
    calls: list[int] = []

    def counted(ids: Sequence[int]) -> np.ndarray:
        calls.append(len(ids))
        return knows_the_next(ids)

    both = measure_against(counted, {"a": uniform, "b": knows_the_next}, ids, window=8)
    assert len(calls) == 4
    assert both["a"] == measure_agreement(knows_the_next, uniform, ids, window=8)
    assert both["b"].kl.estimate == 0


def test_choices_count_what_is_right() -> None:
    questions = [Question("q", ("a", "b"), i % 2) for i in range(10)]
    assert measure_choices(lambda prompt, choices: 1, questions).estimate == 0.5
    with pytest.raises(InputError, match="no questions"):
        measure_choices(lambda prompt, choices: 0, [])


def test_reports_show_what_was_measured_and_dashes_for_the_rest() -> None:
    ids = list(range(VOCAB)) * 4
    alone = point_report(measure_perplexity(uniform, ids, window=8))
    both = point_report(measure_agreement(knows_the_next, uniform, ids, window=8))
    assert alone["kl_mean"] is None
    assert both["kl_mean"] == pytest.approx(math.log(VOCAB))
    rows = accuracy_rows({"points": {"int8": alone, "int4": both}})
    assert rows[0][:3] == ("int8", "7.000 ± 0.000", "-")
    assert rows[1][2] == "1.94591 ± 0.00000"
    assert all(len(row) == len(ACCURACY_COLUMNS) for row in rows)
