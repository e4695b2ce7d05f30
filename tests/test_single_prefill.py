"""`LLM.generate` and `stream` of a constrained answer that there is no time to generate, on the embedded model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("haomiao._core", reason="the compiled core is not built")

from haomiao.api import LLM
from haomiao.errors import BudgetError

PROMPT = "Once upon a time there was a little"


@pytest.fixture(scope="module")
def hurried() -> Iterator[LLM]:
    """A model that nobody measured and that has no time to generate anything under a budget."""
    with LLM(threads=1) as model:
        model._requests._before_budget = None
        admit = model._engine.budgets.admit

        def no_time_to_generate(job: Any, now: int) -> None:
            if job.request.work == "generate" and job.budgeted:
                raise BudgetError("no time", predicted_ms=1e6)
            admit(job, now)

        model._engine.budgets.admit = no_time_to_generate  # type: ignore[method-assign]
        yield model


def test_the_likeliest_is_told_as_the_answer(hurried: LLM) -> None:
    options = [" cat", " dog", " pumpernickel"]
    answer = hurried.generate(PROMPT, choice=options, budget_ms=60_000)
    assert (answer.finish_reason, answer.finish_detail) == ("stop", "single_prefill")
    assert answer.receipt.outcome == "met_single_prefill" and answer.receipt.budget_ms == 60_000
    ids = hurried.tokenize(PROMPT, special=True)
    assert answer.text == hurried.choose(ids, options).option
    assert answer.receipt.completion_tokens == len(answer.token_ids) and answer.logprobs is None
    assert hurried.detokenize(answer.token_ids) == answer.text
    chunks = list(hurried.stream(PROMPT, choice=options, budget_ms=60_000))
    assert "".join(chunk.text for chunk in chunks) == answer.text and chunks[-1].finish_detail == "single_prefill"
    mood = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema = {**mood, "additionalProperties": False}
    assert hurried.generate(PROMPT, json_schema=schema, budget_ms=60_000).text in ('{"ok":true}', '{"ok":false}')


def test_who_allows_no_degrading_or_has_too_many_answers_is_refused(hurried: LLM) -> None:
    for asked in ({"on_budget": "truncate"}, {"on_budget": "refuse"}, {"n": 2}, {"logprobs": 1}, {"regex": "[a-z]+"}):
        options = {"regex": "cat|dog", "budget_ms": 60_000, **asked}
        with pytest.raises(BudgetError):
            hurried.generate(PROMPT, **options)
    plain = hurried.generate(PROMPT, regex="cat|dog")
    assert plain.finish_detail == "constraint_complete" and plain.receipt.outcome is None


def test_a_session_remembers_it(hurried: LLM) -> None:
    session = hurried.session()
    session.feed(PROMPT)
    answer = session.generate(choice=[" cat", " dog"], budget_ms=60_000)
    assert answer.finish_detail == "single_prefill"
    before = session.token_ids
    assert before[-len(answer.token_ids) :] == answer.token_ids
    assert session.generate(max_tokens=3).receipt.cached_tokens > 0
