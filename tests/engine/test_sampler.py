"""The sampler against formulas written the naive way, and its draws against the distribution they claim."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.engine.logprobs import any_logprob, log_normalizer, log_softmax_at
from haomiao.engine.masks import contains, is_empty, only_token, to_bool, with_tokens
from haomiao.engine.order import descending, largest
from haomiao.engine.random import uniform
from haomiao.engine.sampler import Sampler, validate
from haomiao.errors import ContextLengthError, EngineError, InputError
from haomiao.types import SamplingParams
from tests.engine.fakes import VOCAB, prompt_of


def row_of(seed: int, vocab: int = VOCAB, levels: int | None = None) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if levels is not None:  # many ties
        return rng.integers(0, levels, size=vocab).astype(np.float32)
    return (rng.standard_normal(vocab) * 2).astype(np.float32)


def mask_of(ids: list[int], vocab: int = VOCAB) -> np.ndarray:
    return with_tokens(np.zeros((vocab + 31) // 32, np.uint32), ids, True, vocab)


def sampler(vocab: int = VOCAB, seed: int = 1, prompt: list[int] | None = None, **params: Any) -> Sampler:
    return Sampler(SamplingParams(**params), vocab_size=vocab, seed=seed, prompt_ids=prompt or [], end_ids=(0,))


def choose(chooser: Sampler, row: np.ndarray, position: int = 0, produced: int = 99, mask: Any = None) -> Any:
    return chooser.choose(row, int(row.argmax()), position=position, produced=produced, mask=mask)


def naive_draw(row: np.ndarray, params: SamplingParams, seed: int, position: int) -> int:
    """Sort everything, filter everything, walk the whole sum."""
    order = sorted(range(len(row)), key=lambda index: (-row[index], index))
    peak = row[order[0]]
    weights = [float(np.exp((row[i] - peak) / np.float32(params.temperature))) for i in order]
    if params.top_k and params.top_k < len(row):
        threshold = row[order[params.top_k - 1]]
        keep = sum(1 for index in order if row[index] >= threshold)
        order, weights = order[:keep], weights[:keep]
    if params.top_p < 1:
        total, before, keep = sum(weights), 0.0, 0
        while keep < len(weights) and before < params.top_p * total:
            before += weights[keep]
            keep += 1
        order, weights = order[:keep], weights[:keep]
    if params.min_p > 0:
        keep = max(1, sum(1 for weight in weights if weight >= np.float32(params.min_p)))
        order, weights = order[:keep], weights[:keep]
    goal, walked = uniform(seed, position, 0) * sum(weights), 0.0
    for index, weight in zip(order, weights, strict=True):
        walked += weight
        if walked > goal:
            return index
    return order[-1]


@given(
    seed=st.integers(0, 10_000),
    vocab=st.sampled_from([61, 300, 1000, 5000]),
    levels=st.sampled_from([None, None, 3]),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 5, 40, 290]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.9, 1.0]),
)
@settings(max_examples=300, deadline=None)
def test_draws_are_those_of_the_naive_walk(seed: int, vocab: int, levels: int | None, **filters: Any) -> None:
    row = row_of(seed, vocab, levels)
    params = SamplingParams(**filters)
    token, _ = choose(Sampler(params, vocab_size=vocab, seed=seed), row, position=seed % 97)
    assert token == naive_draw(row, params, seed, seed % 97)


def test_draws_follow_the_distribution() -> None:
    row = row_of(3, 20)
    chooser = sampler(20, temperature=0.8)
    counts = Counter(choose(chooser, row, position)[0] for position in range(20_000))
    weights = np.exp(row.astype(np.float64) / 0.8)
    expected = 20_000 * weights / weights.sum()
    chi = sum((counts[i] - expected[i]) ** 2 / expected[i] for i in range(20))
    assert chi < 43.8  # 19 degrees of freedom, 0.1 %


def test_samples_differ_and_repeat() -> None:
    row = row_of(4) / 4
    base = sampler(temperature=1.0)
    draws = [[choose(base.fork(sample), row, position)[0] for position in range(30)] for sample in range(3)]
    assert draws[0] != draws[1] != draws[2]
    assert draws[1] == [choose(base.fork(1), row, position)[0] for position in range(30)]
    assert draws[0] != [choose(sampler(seed=2, temperature=1.0), row, p)[0] for p in range(30)]


def test_greedy_takes_the_executors_argmax_without_touching_the_row() -> None:
    row = np.full(VOCAB, np.nan, np.float32)  # would be refused if it were looked at
    assert sampler().choose(row, 17, position=0, produced=5) == (17, None)
    assert sampler().choose(row, 17, position=0, produced=5, mask=mask_of([17, 3])) == (17, None)


@given(seed=st.integers(0, 1000), output=st.lists(st.integers(1, VOCAB - 1), max_size=12))
@settings(max_examples=80, deadline=None)
def test_penalties_are_the_published_ones(seed: int, output: list[int]) -> None:
    row, prompt = row_of(seed), prompt_of(6, seed)
    given_params = {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4}
    bias = {5: 2.5, 9: -100.0}
    chooser = sampler(prompt=prompt, logit_bias=bias, logprobs=3, **given_params)
    for token in output:
        chooser.record(token)
    expected = row.astype(np.float64).copy()
    for token in set(prompt) | set(output):
        expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
    for token, count in Counter(output).items():
        expected[token] -= 0.7 + 0.4 * count
    for token, value in bias.items():
        expected[token] += value
    before = row.copy()
    token, logprob = choose(chooser, row)
    assert token == int(expected.argmax())
    normalizer = np.log(np.exp(expected).sum())
    assert logprob.logprob == pytest.approx(expected[token] - normalizer, abs=1e-5)
    best = sorted(expected - normalizer, reverse=True)[:3]
    assert [value for _, value in logprob.top] == pytest.approx(best, abs=1e-5)
    assert (row == before).all(), "the executor's row is not ours to change"


def test_masks_and_min_tokens() -> None:
    row = row_of(5)
    row[0] = 50.0  # the end is by far the likeliest
    assert choose(sampler(min_tokens=3), row, produced=2)[0] == int(row[1:].argmax()) + 1
    assert choose(sampler(min_tokens=3), row, produced=3)[0] == 0
    allowed = [7, 33, 60]
    best = max(allowed, key=lambda token: row[token])
    assert choose(sampler(), row, mask=mask_of(allowed))[0] == best
    draws = {choose(sampler(temperature=2.0), row, p, mask=mask_of(allowed))[0] for p in range(200)}
    assert draws == set(allowed)
    assert choose(sampler(min_tokens=3), row, produced=0, mask=mask_of([0]))[0] == 0, "the grammar is stronger"
    _, logprob = choose(sampler(logprobs=5), row, mask=mask_of(allowed))
    assert sorted(each for each, _ in logprob.top) == allowed
    assert sum(math.exp(value) for _, value in logprob.top) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(temperature: float) -> None:
    for poison in (np.nan, np.inf):
        row = row_of(1)
        row[3] = poison
        with pytest.raises(EngineError, match="not finite"):
            choose(sampler(temperature=temperature, logprobs=0), row)
    with pytest.raises(EngineError, match="no token is allowed"):
        choose(sampler(temperature=temperature), row_of(1), mask=mask_of([]))


def test_extreme_temperatures_stay_finite() -> None:
    row = row_of(9)
    assert choose(sampler(temperature=1e-9), row)[0] == int(row.argmax())
    assert choose(sampler(temperature=100.0, top_k=1), row)[0] == int(row.argmax())


# ---- the pieces -----------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 1000),
    size=st.integers(1, 700),
    count=st.integers(1, 700),
    levels=st.sampled_from([None, 2, 9]),
    masked=st.floats(0, 1),
)
@settings(max_examples=150, deadline=None)
def test_largest_is_a_prefix_of_the_sort(seed: int, size: int, count: int, levels: int | None, masked: float) -> None:
    row = row_of(seed, size, levels)
    row[np.random.default_rng(seed).random(size) < masked] = -np.inf
    order = [index for index in sorted(range(size), key=lambda index: (-row[index], index)) if row[index] > -np.inf]
    found = descending(row, largest(row, count))
    if count < len(order):
        assert list(found) == [index for index in order if row[index] >= row[order[count - 1]]]
    else:
        assert list(found) == order


@given(vocab=st.integers(1, 200), data=st.data())
@settings(max_examples=100, deadline=None)
def test_masks_are_sets(vocab: int, data: st.DataObject) -> None:
    ids = data.draw(st.sets(st.integers(0, vocab - 1)))
    gone = data.draw(st.sets(st.integers(0, vocab - 1)))
    mask = with_tokens(mask_of(sorted(ids), vocab), gone, False, vocab)
    left = ids - gone
    assert set(np.flatnonzero(to_bool(mask, vocab))) == left
    assert {token for token in range(vocab + 40) if contains(mask, token)} == left
    assert is_empty(mask) == (not left)
    assert only_token(mask) == (next(iter(left)) if len(left) == 1 else None)
    assert set(np.flatnonzero(to_bool(mask, vocab + 70))) == left
    beyond = np.full(10, 0xFFFFFFFF, np.uint32)
    assert np.count_nonzero(to_bool(with_tokens(beyond, [], True, vocab), 320)) == vocab


def test_logprobs_agree_with_float64() -> None:
    row = row_of(11, 5000) * 5
    exact = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64) - row.max()).sum()) - row.max()
    normalizer = log_normalizer(row)
    assert row[17] - normalizer == pytest.approx(exact[17], abs=1e-5)
    assert any_logprob(row, [3], normalizer) == pytest.approx(exact[3], abs=1e-5)
    assert any_logprob(row, [3, 4], normalizer) == pytest.approx(np.log(np.exp(exact[3]) + np.exp(exact[4])), abs=1e-5)
    entry = log_softmax_at(row, 17, 4)
    assert [token for token, _ in entry.top] == list(np.argsort(-exact)[:4])
    assert log_softmax_at(row, 17, 0).top == []


# ---- validation -----------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
BAD: list[tuple[str, Any]] = [
    *(("max_tokens", value) for value in (0, -1, 1.5, True, "5", None, 1 << 4000)),
    *(("min_tokens", value) for value in (-1, 300, 1.0)),
    *(("temperature", value) for value in (-0.1, NAN, INF, "hot", True, None, 1e300, 1 << 4000)),
    *(("top_k", value) for value in (-1, 1.0, False)),
    *(("top_p", value) for value in (0, 0.0, -1, 1.1, NAN)),
    *(("min_p", value) for value in (-0.1, 1.5, NAN)),
    *(("repetition_penalty", value) for value in (0.0, -1, NAN, INF)),
    *(("presence_penalty", value) for value in (-2.1, 2.1, NAN)),
    *(("frequency_penalty", value) for value in (-2.1, 2.1, NAN)),
    *(("seed", value) for value in (1.5, "x", 1 << 64, -(1 << 63) - 1, True)),
    *(("logprobs", value) for value in (-1, 21, 1.0, True)),
    *(("n", value) for value in (0, 17, 1.0, True)),
    *(("ignore_eos", value) for value in (1, None)),
    *(("stop", value) for value in ("text", ("",), (1,), ("x" * 2000,), ("a",) * 17)),
    *(("stop_token_ids", value) for value in ((VOCAB,), (-1,), (1.0,), (True,))),
    *(("logit_bias", value) for value in ({VOCAB: 1.0}, {-1: 1.0}, {"1": 1.0}, {1: NAN}, {1: 101}, [1])),
    ("logit_bias", dict.fromkeys(range(1025), 1.0)),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: repr(value)[:24])
def test_what_is_out_of_range_is_named(name: str, value: Any) -> None:
    vocab = 2000 if isinstance(value, dict) and len(value) > 10 else VOCAB
    with pytest.raises(InputError) as caught:
        validate(SamplingParams(**{name: value}), vocab, 4096)
    assert caught.value.param == name and "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_what_is_in_range_passes() -> None:
    validate(SamplingParams(), VOCAB, 4096)
    validate(
        SamplingParams(
            max_tokens=5, min_tokens=5, temperature=2, top_k=3, top_p=0.1, min_p=1, seed=-(1 << 63), n=16, logprobs=20,
            logit_bias={0: -100, 60: 100.0}, stop=("a",), stop_token_ids=(60,), repetition_penalty=1.1, ignore_eos=True,
        ),
        VOCAB,
        4096,
    )  # fmt: skip
    with pytest.raises(ContextLengthError, match="max_tokens is 5000; the context holds 4096"):
        validate(SamplingParams(max_tokens=5000), VOCAB, 4096)
