"""Rows drawn on the device: the twin and the kernels beside `engine.draw`, and whole answers beside the host's draw."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: it reads it once
torch = pytest.importorskip("torch", reason="torch is not installed")

from haomiao.engine import draw as host  # noqa: E402
from haomiao.engine.executors.torch import twins  # noqa: E402
from haomiao.engine.executors.torch.executor import TorchExecutor  # noqa: E402
from haomiao.engine.executors.torch.slow import draws_on  # noqa: E402
from haomiao.errors import EngineError, InputError  # noqa: E402
from haomiao.types import F32, I32, RowDraws, StepBatch  # noqa: E402
from tests.engine.fakes import PatternConstraint, ask, collected, done_of, make_engine, prompt_of  # noqa: E402
from tests.engine.tiny import Shape, Span, blocks_for, make_batch, make_model, tokens_of  # noqa: E402

try:
    import triton  # noqa: F401
except ImportError:
    TRITON = False
else:
    TRITON = os.environ["TRITON_INTERPRET"] == "1"
kernels = pytest.mark.skipif(not TRITON, reason="triton is not installed, or compiles")
KINDS = (False, pytest.param(True, marks=kernels))
CPU = torch.device("cpu")
CLOSE = 1e-6
"""Exponentials differ in the last bits, and with them the edges between tokens."""


class Drawing(NamedTuple):
    """How a row is drawn."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    uniform: float


def row_draws(drawings: list[Drawing | None]) -> RowDraws | None:
    if not any(drawings):
        return None
    columns = np.array([drawing or (0,) * 5 for drawing in drawings]).T
    temperature, top_k, top_p, min_p, uniform = columns
    return RowDraws(
        temperature.astype(np.float32), top_k.astype(np.int32), top_p.copy(), min_p.astype(np.float32), uniform.copy()
    )


def wanted(row: F32, drawing: Drawing) -> tuple[set[int], bool]:
    """What `engine.draw` draws, with what a uniform number beside it would, and whether the first entries decide it."""
    scaled = (row - row.max()) / np.float32(drawing.temperature)
    filters = host.Filters(drawing.top_k, drawing.top_p, float(np.float32(drawing.min_p)))
    near = (drawing.uniform, max(drawing.uniform - CLOSE, 0.0), min(drawing.uniform + CLOSE, 1 - 2**-53))
    walked: list[bool] = []
    bins = host._walk_bins
    host._walk_bins = lambda *given: walked.append(True) or bins(*given)  # type: ignore[assignment,func-returns-value]
    try:
        first = host.draw(scaled, filters, drawing.uniform)
        decided = not walked
        return {first, *(host.draw(scaled, filters, u) for u in near)}, decided
    finally:
        host._walk_bins = bins


def drawn(fast: bool, rows: F32, drawings: list[Drawing | None]) -> I32:
    """What comes out on the device."""
    draws = row_draws(drawings)
    if draws is None:
        return np.full(len(rows), -1, np.int32)
    placed, logits = draws_on(draws, CPU), torch.from_numpy(rows)
    if not fast:
        found: I32 = twins.draw(logits, placed).numpy()
        return found
    from haomiao.engine.executors.torch import drawing

    out = torch.zeros(len(rows), dtype=torch.int32)
    drawing.draw(out, logits, twins.greatest(logits), placed)
    tokens: I32 = out.numpy()
    return tokens


def row_of(vocab: int, spread: float, levels: int | None, hidden: float, seed: int) -> F32:
    """Logits: flat to peaked, with ties where there are few `levels`, a share of them -inf."""
    rng = np.random.default_rng(seed)
    row = rng.normal(size=vocab) * spread
    if levels is not None:
        row = np.round(row * levels / max(spread, 1e-3)) / levels
    row[rng.random(vocab) < hidden] = -np.inf
    row[rng.integers(vocab)] = row.max() if np.isfinite(row.max()) else 0.0
    return row.astype(np.float32)


DRAWINGS = st.builds(
    Drawing,
    temperature=st.sampled_from([1e-6, 0.3, 0.7, 1.0, 1.7, 50.0]).map(lambda value: float(np.float32(value))),
    top_k=st.sampled_from([0, 0, 1, 2, 40, 300, 10**6]),
    top_p=st.sampled_from([1.0, 1.0, 0.95, 0.5, 0.1]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 1.0]),
    uniform=st.one_of(st.sampled_from([0.0, 0.5, 1 - 2**-53]), st.floats(0, 1, exclude_max=True)),
)
ROWS = st.builds(
    row_of,
    vocab=st.sampled_from([1, 5, 127, 300, 2049, 6000]),
    spread=st.sampled_from([0.0, 0.5, 2.0, 5.0]),
    levels=st.sampled_from([None, None, 1, 8]),
    hidden=st.sampled_from([0.0, 0.3, 0.99]),
    seed=st.integers(0, 2**32),
)


@given(row=ROWS, drawing=DRAWINGS)
@settings(max_examples=300)
def test_the_twin_draws_by_the_rule(row: F32, drawing: Drawing) -> None:
    (token,) = drawn(False, row[None], [drawing])
    tokens, decided = wanted(row, drawing)
    assert token in tokens if decided else token == -1


@kernels
@given(row=ROWS, drawing=DRAWINGS)
@settings(max_examples=12)
def test_the_kernels_draw_by_the_rule(row: F32, drawing: Drawing) -> None:
    """All rows that are finite, however flat."""
    (token,) = drawn(True, row[None], [drawing])
    assert token in wanted(row, drawing)[0]


@pytest.mark.parametrize("fast", KINDS)
def test_long_rows(fast: bool) -> None:
    """A vocabulary as models have it; what the first entries do not decide is left open by the twin alone."""
    row = row_of(20_000 if fast else 151_936, 2.0, None, 0.01, seed=4)
    row[[7, 5000, 5001, 5002, 17_000, 19_999]] = [17.0, 18.0, 16.5, 17.5, 17.0, 15.0]
    cases = {
        Drawing(0.5, 0, 0.9, 0.0, 0.4): True,
        Drawing(1.0, 0, 1.0, 0.05, 0.4): True,
        Drawing(1.0, 50, 0.9, 0.0, 0.999): True,
        Drawing(5.0, 0, 1.0, 0.0, 0.5): False,  # nearly flat
    }
    tokens = drawn(fast, np.stack([row] * len(cases)), list(cases))
    for token, (drawing, decided) in zip(tokens, cases.items(), strict=True):
        assert wanted(row, drawing)[1] == decided
        assert token in wanted(row, drawing)[0] if decided or fast else token == -1


@pytest.mark.parametrize("fast", KINDS)
def test_what_is_common_is_decided(fast: bool) -> None:
    for seed, vocab in enumerate((90, 700)):
        rows = np.stack([row_of(vocab, 4.0, None, 0.0, seed=10 * seed + each) for each in range(5)])
        drawings = [
            Drawing(1.0, 0, 0.95, 0.0, 0.3), Drawing(0.7, 40, 1.0, 0.0, 0.99), Drawing(1.0, 0, 1.0, 0.05, 0.7),
            Drawing(0.6, 20, 0.95, 0.0, 0.5), Drawing(0.8, 0, 1.0, 0.0, 0.1),
        ]  # fmt: skip
        for token, row, drawing in zip(drawn(fast, rows, list(drawings)), rows, drawings, strict=True):
            assert token in wanted(row, drawing)[0]


@pytest.mark.parametrize("fast", KINDS)
def test_what_is_not_finite_is_left_open(fast: bool) -> None:
    rows = np.stack([row_of(300, 2.0, None, 0.0, seed=seed) for seed in range(5)])
    rows[0, 299] = np.nan
    rows[1, 3] = np.inf
    rows[2] = -np.inf
    rows[3, :299] = -np.inf
    drawing = Drawing(1.0, 3, 0.9, 0.0, 0.5)
    assert drawn(fast, rows, [drawing, drawing, drawing, drawing, None]).tolist() == [-1, -1, -1, 299, -1]


@pytest.mark.parametrize("fast", KINDS)
def test_ties_and_signed_zeros_go_by_the_index(fast: bool) -> None:
    row = np.zeros((1, 400), np.float32)
    row[0, ::3] = -0.0
    for number in (0.0, 0.3, 0.9):
        drawing = Drawing(1.0, 1, 1.0, 0.0, number)  # all are as good as the first
        assert drawn(fast, row, [drawing]).tolist() == [int(number * 400)]


@pytest.mark.parametrize("fast", KINDS)
def test_company_changes_nothing(fast: bool) -> None:
    rows = np.stack([row_of(300, 3.0, None, 0.1, seed=seed) for seed in range(5)])
    drawings: list[Drawing | None] = [Drawing(0.9, 0, 0.9, 0.0, 0.2 * each) for each in range(5)]
    together = drawn(fast, rows, drawings)
    assert (together >= 0).all()
    for each in (1, 4):
        assert drawn(fast, rows[each : each + 1], drawings[each : each + 1]) == together[each : each + 1]
    some = drawn(fast, rows[::-1].copy(), [None, *drawings[3:0:-1], None])
    assert some.tolist() == [-1, *together[3:0:-1], -1]


# ---- steps and answers ----------------------------------------------------------------------------------------------


def executor_of(fast: bool, monkeypatch: pytest.MonkeyPatch, *, vocab: int = 60) -> TorchExecutor:
    model = make_model(Shape(layers=1, hidden=32, heads=2, kv_heads=1, head_dim=16, neurons=32, vocab=vocab), "f32", 1)
    if fast:  # few programs, since each costs the interpreter milliseconds
        from haomiao.engine.executors.torch import fast as runner
        from haomiao.engine.executors.torch import launch

        monkeypatch.setattr(launch, "BLOCKS", launch.Blocks(gemv_bytes=1 << 20, gemv_most=128, gemm_rows=128))
        monkeypatch.setattr(runner, "BUCKETS", (1, 4))
    return TorchExecutor(
        model.plan,
        model.tensors,
        model.vectors,
        points=("full",),
        kv_blocks=16,
        max_step_tokens=32,
        fast=fast,
    )


def step_of(lengths: list[int], drawings: list[Drawing | None], greedy: list[bool] | None = None) -> StepBatch:
    spans = [Span(tokens_of(n, seed=n, vocab=60), 0, blocks_for(n, 2 * i)) for i, n in enumerate(lengths)]
    batch = make_batch(spans, "full", rows=np.cumsum(lengths) - 1)
    batch.draws = row_draws(drawings)
    batch.greedy = None if greedy is None else np.array(greedy)
    return batch


@pytest.mark.parametrize("fast", KINDS)
def test_steps_return_what_was_drawn(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, padded to a bucket, and in a step too long for one; the row that is left open is here."""
    executor = executor_of(fast, monkeypatch)
    sure, never = Drawing(0.8, 10, 0.9, 0.0, 0.6), Drawing(50.0, 0, 1.0, 0.0, 0.9)
    alone = executor.step(step_of([1], [None]))
    assert alone.drawn is None
    row = alone.logits[0].copy()
    expected = wanted(row, sure)[0]
    for lengths, drawings, greedy in (
        ([1], [sure], None),
        ([1, 1, 1], [sure, None, None], [False, True, True]),
        ([1, 9], [sure, None], [False, False]),
        ([1, 9], [sure, sure], None),
    ):
        result = executor.step(step_of(lengths, drawings, greedy))
        assert result.drawn is not None and result.drawn.dtype == np.int32 and result.drawn.shape == (len(lengths),)
        assert result.drawn[0] in expected
        assert [token >= 0 for token in result.drawn] == [drawing is not None for drawing in drawings]
        assert result.argmax[0] == row.argmax()
        if greedy == [False, False]:  # a row of the step is wanted whole
            np.testing.assert_allclose(result.logits[0], row, rtol=1e-4, atol=1e-4)
    if fast:  # its kernels leave open only what is not finite
        from haomiao.engine.executors.torch import drawing as launches

        draw = launches.draw

        def reluctant(out: Any, *given: Any) -> None:
            draw(out, *given)
            out[0] = -1

        monkeypatch.setattr(launches, "draw", reluctant)
    wide = executor_of(fast, monkeypatch, vocab=3000)
    whole = wide.step(step_of([1, 2], [None, None])).logits.copy()
    result = wide.step(step_of([1, 2], [never, sure], [False, False]))
    assert result.drawn is not None and result.drawn[0] == -1 and result.drawn[1] >= 0
    np.testing.assert_allclose(result.logits[0], whole[0], rtol=1e-4, atol=1e-4)
    batch = step_of([1], [sure])
    batch.logit_rows = np.zeros(0, np.int32)
    with pytest.raises(InputError, match="one temperature for every row"):
        executor.step(batch)


REQUESTS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0, "n": 2},
    {"temperature": 1.2, "top_k": 7, "min_p": 0.02, "min_tokens": 3},
    {"temperature": 0.9, "presence_penalty": 0.5},
    {"temperature": 1.0, "logprobs": 1},
    {"temperature": 1.0, "constraint": PatternConstraint([[3, 4, 5]] * 4)},
    {},
)


def answers(executor: TorchExecutor, seeds: range, tokens: int) -> list[Any]:
    engine = make_engine(executor)  # type: ignore[arg-type]
    found = []
    for seed in seeds:
        requests = [
            ask(prompt_of(3 + index, index), seed=seed, max_tokens=tokens, **fields)
            for index, fields in enumerate(REQUESTS)
        ]
        ids = [engine.submit(request) for request in requests]
        events = engine.run_until(*ids)
        found += [collected(events, each)[0] for each in ids]
    engine.check_integrity()
    return found


@pytest.mark.parametrize("fast", KINDS)
def test_answers_are_those_of_the_hosts_draw(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds, tokens = (range(1), 4) if fast else (range(12), 8)
    ours, theirs = executor_of(fast, monkeypatch), executor_of(fast, monkeypatch)
    counted: list[int] = []
    step = ours.step

    def watched(batch: StepBatch) -> Any:
        result = step(batch)
        counted.append(0 if result.drawn is None else int((result.drawn >= 0).sum()))
        return result

    monkeypatch.setattr(ours, "step", watched)
    theirs.draws = False
    assert answers(ours, seeds, tokens) == answers(theirs, seeds, tokens)
    assert sum(counted) >= 3 * len(seeds) * 2


def test_what_is_left_open_is_drawn_by_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for draws in (True, False):
        executor = executor_of(False, monkeypatch, vocab=3000)
        executor.draws = draws
        engine = make_engine(executor)  # type: ignore[arg-type]
        events = engine.run_until(each := engine.submit(ask(prompt_of(4), seed=5, max_tokens=8, temperature=9.0)))
        found.append(collected(events, each)[0])
    assert found[0] == found[1] and len(found[0]) == 8


@pytest.mark.parametrize("fast", KINDS)
def test_an_overflow_in_the_model_is_told(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = executor_of(fast, monkeypatch)
    next(iter(executor._open().vectors.values())).fill_(float("nan"))
    engine = make_engine(executor)  # type: ignore[arg-type]
    events = engine.run_until(each := engine.submit(ask(prompt_of(4), seed=5, max_tokens=8, temperature=1.0)))
    error = done_of(events, each).error
    assert isinstance(error, EngineError) and "not finite" in str(error)
