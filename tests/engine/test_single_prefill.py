"""The last rung of the ladder: an answer that there is no time to generate is chosen among all that its grammar allows.

On the invented machine of test_deadlines: at int4, with bounds, 0.65 ms a step and 32.5 us a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from haomiao.engine.engine import Engine
from haomiao.engine.request import EngineRequest, TokenEvent
from haomiao.errors import BudgetError, CancelledError, OverloadError
from tests.engine.fakes import (
    FakeExecutor,
    LetterMatcher,
    PatternConstraint,
    ask,
    done_of,
    letter,
    make_engine,
    prompt_of,
    score_options,
    text_of,
    tokens_of,
)
from tests.engine.test_deadlines import within, world

PATTERN = [(1, 2, 3), *[(4,)] * 5, (5, 6), *[(7,)] * 4]
"""Six answers of eleven tokens each."""


class Answers:
    """All answers of the pattern, and how often they were asked for."""

    def __init__(self, pattern: Sequence[Sequence[int]] = PATTERN) -> None:
        self.known = [tuple(answer) for answer in itertools.product(*pattern)]
        self.asked = 0

    def __call__(self) -> list[tuple[int, ...]]:
        self.asked += 1
        return self.known


def finite(answers: Answers, prompt: Sequence[int], **options: Any) -> EngineRequest:
    given = {"max_tokens": 40, "constraint": PatternConstraint(PATTERN), "stop": LetterMatcher, **options}
    return ask(prompt, all_answers=answers, **given)


def likeliest(engine: Engine, prompt: Sequence[int], options: Sequence[tuple[int, ...]], point: str) -> tuple[int, ...]:
    scores = score_options(engine, prompt, options, point=point)
    return options[max(range(len(scores)), key=scores.__getitem__)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("chunk", [16, 512])
def test_the_likeliest_answer_is_told(seed: int, chunk: int) -> None:
    """Whether its options fit into the step of its prompt or not."""
    engine, clock, _ = world(max_step_tokens=chunk)
    answers, prompt = Answers(), prompt_of(20, seed)
    request = finite(answers, prompt, temperature=1.0, point="int4", deadline_ns=within(clock, 7))
    request_id = engine.submit(request)
    events = engine.run_until()
    done, told = done_of(events, request_id), [event for event in events if isinstance(event, TokenEvent)]
    receipt = done.receipt
    assert (done.finish_reason, done.finish_detail, done.scores) == ("stop", "single_prefill", None)
    assert receipt.outcome == "met_single_prefill" and receipt.total_ms <= 7 and receipt.predicted_ms
    assert len(told) == 1 and told[0].sample == 0 and told[0].logprobs is None
    assert {entry.point for entry in receipt.schedule} == {told[0].point} == {"int4"}
    fresh = make_engine(FakeExecutor(max_step_tokens=512), prefix_cache=False)
    best = likeliest(fresh, prompt, answers.known, "int4")
    assert tuple(tokens_of(events, request_id)) == best
    assert text_of(events, request_id) == "".join(map(letter, best))
    assert receipt.completion_tokens == len(best) == 11 and receipt.prompt_tokens == 20
    assert receipt.ttft_ms == receipt.total_ms and receipt.decode_ms == 0 and answers.asked == 1
    engine.check_integrity()


def test_it_is_the_last_rung() -> None:
    """While there is time the answer is generated, though at a lower point or with a close of its own."""
    engine, clock, _ = world(max_step_tokens=512)
    answers = Answers()
    for budget in (60.0, 20.0, 10.0):
        request_id = engine.submit(finite(answers, prompt_of(20), deadline_ns=within(clock, budget)))
        done = done_of(engine.run_until(), request_id)
        assert done.finish_detail == "constraint_complete" and done.receipt.outcome in ("met", "met_lower_point")
    plain = engine.submit(finite(answers, prompt_of(20)))
    assert done_of(engine.run_until(), plain).receipt.outcome is None and answers.asked == 0


def test_a_refusal_names_what_the_cheaper_way_would_take() -> None:
    """Prompt and options in one step; the prompt and ten tokens where nothing may be chosen."""
    answers, step, token = Answers(), 0.5 * 1.3, 0.025 * 1.3
    choice = step + (20 + 66) * token
    for more, needed in (({}, choice), ({"logit_bias": {9: 1.0}}, 11 * step + 30 * token)):
        for late in (0.05, -0.05):
            engine, clock, _ = world(max_step_tokens=512)
            request = finite(answers, prompt_of(20), deadline_ns=within(clock, needed + late), **more)
            if late > 0:
                engine.submit(request)
                continue
            with pytest.raises(BudgetError) as refused:
                engine.submit(request)
            assert refused.value.predicted_ms == pytest.approx(needed)


@pytest.mark.parametrize(
    "kept",
    [
        {"on_budget": "truncate", "min_tokens": 11},
        {"on_budget": "refuse"},
        {"n": 2},
        {"logprobs": 0},
        {"prompt_logprobs": 0},
        {"logit_bias": {4: 1.0}},
        {"stop": LetterMatcher, "stop_token_ids": (9,)},
        {"ignore_eos": True},
        {"max_tokens": 10},
        {"all_answers": None},
        {"all_answers": lambda: ()},
    ],
)
def test_whoever_asks_for_more_is_refused(kept: dict[str, Any]) -> None:
    engine, clock, _ = world(max_step_tokens=512)
    request = {"max_tokens": 40, "constraint": PatternConstraint(PATTERN), "all_answers": Answers(), "stop": None}
    with pytest.raises(BudgetError):
        engine.submit(ask(prompt_of(20), deadline_ns=within(clock, 5), **{**request, **kept}))
    assert not engine.busy


def test_only_the_present_load_forbids_generating() -> None:
    class Watcher:
        outcomes: list[str | None]

        def on_step(self, batch: Any, result: Any) -> None: ...

        def on_finish(self, receipt: Any) -> None:
            self.outcomes.append(receipt.outcome)

    watcher = Watcher()
    watcher.outcomes = []
    engine, clock, _ = world(max_step_tokens=512)
    engine._reporter._observers = (watcher,)
    whole = {"max_tokens": 60, "ignore_eos": True, "on_budget": "refuse"}
    other = engine.submit(ask(prompt_of(60), deadline_ns=within(clock, 90), **whole))
    events = engine.step()
    answers, deadline = Answers(), {"deadline_ns": within(clock, 11)}
    chosen = engine.submit(finite(answers, prompt_of(20, 1), **deadline))
    with pytest.raises(OverloadError):
        engine.submit(finite(answers, prompt_of(20, 2), logit_bias={9: 0.5}, **deadline))
    events += engine.run_until()
    assert done_of(events, chosen).receipt.outcome == "met_single_prefill"
    assert done_of(events, other).receipt.outcome == "met", "what was promised before holds"
    assert watcher.outcomes.count("refused") == 1, "a way that was not taken is no refusal"


def test_a_session_goes_on_from_it_and_cancelling_frees_it() -> None:
    engine, clock, _ = world(max_step_tokens=16)
    session, answers = engine.open_session(), Answers()
    first = engine.submit(finite(answers, prompt_of(40), session=session, point="int4", deadline_ns=within(clock, 8)))
    events = engine.run_until()
    answer = tokens_of(events, first)
    assert done_of(events, first).finish_detail == "single_prefill"
    follow = [*prompt_of(40), *answer, 9]
    again = engine.submit(ask(follow, max_tokens=5, session=session, point="int4"))
    events = engine.run_until()
    assert done_of(events, again).receipt.cached_tokens == 40
    fresh = make_engine(FakeExecutor(max_step_tokens=512), prefix_cache=False)
    assert tokens_of(events, again) == tokens_of(
        fresh.run_until(fresh.submit(ask(follow, max_tokens=5, point="int4"))), 1
    )
    gone = engine.submit(finite(answers, prompt_of(60, 3), deadline_ns=within(clock, 10)))
    engine.step()
    engine.cancel(gone)
    assert isinstance(done_of(engine.settle(), gone).error, CancelledError) and not engine.busy
    engine.check_integrity()


def test_an_answer_whose_text_fails_ends_with_an_error() -> None:
    class Broken(LetterMatcher):
        def push(self, token_id: int) -> str:
            raise RuntimeError("no text")

    engine, clock, _ = world(max_step_tokens=512)
    request_id = engine.submit(finite(Answers(), prompt_of(20), stop=Broken, deadline_ns=within(clock, 5)))
    assert done_of(engine.run_until(), request_id).error is not None and not engine.busy
    engine.check_integrity()
