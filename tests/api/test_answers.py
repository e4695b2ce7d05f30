"""`LLM`: answers, embeddings, choices, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

import haomiao
from haomiao.api import LLM, Completion
from haomiao.errors import BudgetError, ContextLengthError, InputError
from tests.api.tiny import BOS, EOS, text_of


def test_what_a_model_says_of_itself(llm: LLM) -> None:
    assert llm.points == ("int8", "int4") and llm.point == "int8" and llm.kv == "bf16"
    assert llm.max_context == 256 and llm.vocab_size == 260 and llm.threads == 1 and llm.isa
    assert llm.name and llm.tokenizer is not None and llm.eos_ids == (EOS,)
    assert llm.plan.family == "llama" and "embed" in " ".join(llm.weights)


def test_generate_text(llm: LLM) -> None:
    answer = llm.generate("The sea", max_tokens=20)
    assert isinstance(answer, Completion)
    assert answer.receipt.prompt_tokens == 8, "BOS and seven bytes"
    assert len(answer.token_ids) <= 20 and answer.finish_reason in ("stop", "length")
    visible = [token for token in answer.token_ids if token < EOS]
    assert answer.text == llm.detokenize(visible)
    assert answer.receipt.model == llm.name and answer.receipt.seed is not None
    assert llm.generate("The sea", max_tokens=20).token_ids == answer.token_ids
    assert llm.generate(llm.tokenize("The sea", special=True), max_tokens=20).token_ids == answer.token_ids
    assert llm.generate(np.array(llm.tokenize("The sea", special=True)), max_tokens=20).token_ids == answer.token_ids


def test_generate_follows_the_logits(llm: LLM) -> None:
    prompt = llm.tokenize("abc", special=True)
    answer = llm.generate(prompt, max_tokens=6, logprobs=2, ignore_eos=True)
    logits = llm.logits([*prompt, *answer.token_ids])
    assert logits.shape == (len(prompt) + 6, 260) and logits.dtype == np.float32
    for index, entry in enumerate(answer.logprobs or ()):
        row = logits[len(prompt) - 1 + index].astype(np.float64)
        exact = row - row.max() - math.log(np.exp(row - row.max()).sum())
        assert entry.token_id == int(row.argmax()) == entry.top[0][0]
        assert entry.logprob == pytest.approx(exact[entry.token_id], abs=1e-3)
    scored = llm.generate(prompt, max_tokens=1, prompt_logprobs=0)
    assert [entry.token_id for entry in scored.prompt_logprobs or ()] == prompt[1:]


def test_several_prompts_and_samples(llm: LLM) -> None:
    single = [llm.generate(text, max_tokens=9) for text in ("one", "two")]
    both = llm.generate(["one", "two"], max_tokens=9)
    assert [answer.token_ids for answer in both] == [answer.token_ids for answer in single]
    samples = llm.generate("one", max_tokens=9, n=3, temperature=1.5, seed=4)
    assert [answer.index for answer in samples] == [0, 1, 2]
    assert len({tuple(answer.token_ids) for answer in samples}) == 3
    again = llm.generate("one", max_tokens=9, n=3, temperature=1.5, seed=4)
    assert [answer.token_ids for answer in again] == [answer.token_ids for answer in samples]


def test_streams_are_the_same_answer_in_pieces(llm: LLM) -> None:
    whole = llm.generate("Once", max_tokens=25, ignore_eos=True, logprobs=1)
    chunks = list(llm.stream("Once", max_tokens=25, ignore_eos=True, logprobs=1))
    assert text_of(chunks) == whole.text and len(chunks) == 25
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
    assert [entry for chunk in chunks for entry in chunk.logprobs or ()] == whole.logprobs
    assert [chunk.finish_reason for chunk in chunks] == [None] * 24 + ["length"]
    assert chunks[-1].receipt is not None and chunks[-1].finish_detail == "max_tokens"
    two = list(llm.stream("Once", max_tokens=5, n=2, seed=1, temperature=1.0, ignore_eos=True))
    assert sorted(chunk.index for chunk in two if chunk.finish_reason) == [0, 1]


def test_a_closed_stream_frees_its_kv(llm: LLM) -> None:
    engine = llm._driver._engine
    before = engine.pool.available
    stream = llm.stream("Once", max_tokens=100, ignore_eos=True)
    next(stream)
    assert engine.pool.available < before
    stream.close()
    assert engine.pool.available == before and not engine.busy
    with llm.stream("Once", max_tokens=100, ignore_eos=True) as stream:
        next(stream)
    stream = llm.stream("Once", max_tokens=100, ignore_eos=True)
    del stream
    assert not engine.busy and engine.pool.available == before
    engine.check_integrity()


def test_stop_strings(llm: LLM) -> None:
    whole = llm.generate("stop", max_tokens=40, ignore_eos=True)
    stop = next(whole.text[at : at + 1] for at in range(5, len(whole.text)) if whole.text[at].isascii())
    for form in (stop, (stop,), [stop, "no such thing"]):
        cut = llm.generate("stop", max_tokens=40, ignore_eos=True, stop=form)
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert (cut.finish_reason, cut.finish_detail) == ("stop", "stop_string")


def test_max_tokens_defaults_to_what_fits(llm: LLM) -> None:
    answer = llm.generate("x" * 200, ignore_eos=True)
    assert len(answer.token_ids) == 256 - 201
    with pytest.raises(ContextLengthError, match="301 tokens"):
        llm.generate("x" * 300)
    with pytest.raises(ContextLengthError, match=r"201 tokens and 100 more .* 256"):
        llm.generate("x" * 200, max_tokens=100)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 99}, "n"),
        ({"point": "full"}, "point"),
        ({"budget_ms": 0}, "budget_ms"),
        ({"budget_ms": float("nan")}, "budget_ms"),
        ({"budget_ms": True}, "budget_ms"),
        ({"ttft_ms": "soon"}, "ttft_ms"),
        ({"sampling": {"n": 1}}, "sampling"),
        ({"regex": "a", "choice": ["b"]}, "choice"),
        ({"logit_bias": {999: 1}}, "logit_bias"),
        ({"stop": [1]}, "stop"),
        ({"prompt_logprobs": 99}, "prompt_logprobs"),
        ({"salt": "text"}, "salt"),
    ],
)
def test_what_is_wrong_is_named(llm: LLM, options: dict[str, Any], param: str) -> None:
    with pytest.raises(InputError) as caught:
        llm.generate("a", **options)
    assert caught.value.param == param and "\n" not in str(caught.value)
    with pytest.raises(InputError):
        llm.stream("a", **options)


def test_wrong_prompts_are_named(llm: LLM) -> None:
    for prompt in ([], [260], [-1], [1.5], [True], ["a", 1], b"bytes", 5, None, {"a": 1}, "\ud800"):
        with pytest.raises(InputError):
            llm.generate(prompt)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        llm.logits([])


def test_sampling_params_and_single_ones(llm: LLM) -> None:
    params = haomiao.SamplingParams(max_tokens=4, temperature=1.0, seed=3, ignore_eos=True)
    answer = llm.generate("a", sampling=params)
    assert len(answer.token_ids) == 4
    assert answer.token_ids == llm.generate("a", max_tokens=4, temperature=1.0, seed=3, ignore_eos=True).token_ids
    assert len(llm.generate("a", sampling=params, max_tokens=6).token_ids) == 6


def test_points_share_one_model(llm: LLM) -> None:
    rich, poor = (llm.generate("point", max_tokens=12, point=point, ignore_eos=True) for point in ("int8", "int4"))
    assert [entry.point for entry in poor.receipt.schedule] == ["int4"]
    assert poor.receipt.cached_tokens == 0, "what int8 computed is not reused at int4"
    assert (llm.logits([1, 2, 3], point="int4") != llm.logits([1, 2, 3])).any()
    assert rich.receipt.schedule[0].point == "int8"


def test_budgets(llm: LLM) -> None:
    kept = llm.generate("a", max_tokens=2, budget_ms=60_000)
    assert kept.receipt.outcome == "met" and kept.receipt.budget_ms == pytest.approx(60_000)
    assert kept.receipt.predicted_ms is not None and 0 < kept.receipt.predicted_ms <= 60_000
    with pytest.raises(BudgetError, match="even an idle machine needs") as refused:
        llm.generate("a" * 100, max_tokens=2, budget_ms=0.001)
    assert refused.value.predicted_ms is not None and refused.value.predicted_ms > 0.001
    chosen = llm.choose("It is ", ["alpha", "beta"], budget_ms=60_000, on_budget="refuse")
    assert chosen.receipt.outcome == "met" and chosen.scores == llm.choose("It is ", ["alpha", "beta"]).scores
    for wrong in ({"on_budget": "hope"}, {"min_point": "int2"}, {"max_kl": -1.0}, {"budget_ms": 0}, {"ttft_ms": True}):
        with pytest.raises(InputError) as caught:
            llm.generate("a", max_tokens=2, **{"budget_ms": 1000, **wrong})
        assert caught.value.param in wrong
    with pytest.raises(InputError, match="not a parameter of a choice"):
        llm.choose("a", ["b"], ttft_ms=3)


def test_embed(llm: LLM) -> None:
    one = llm.embed("the sea")
    assert one.vector.shape == (64,) and one.vector.dtype == np.float32
    assert float(np.square(one.vector).sum()) == pytest.approx(1.0, abs=1e-5)
    assert one.token_ids[0] == BOS and one.receipt.prompt_tokens == len(one.token_ids)
    again, other = llm.embed([one.token_ids, [1, 2, 3]])
    np.testing.assert_array_equal(again.vector, one.vector)
    assert float(other.vector @ one.vector) < 0.999
    (plain,) = llm.embed(["the sea"], normalize=False, budget_ms=60_000)
    np.testing.assert_allclose(plain.vector / np.linalg.norm(plain.vector), one.vector, atol=1e-6)
    assert plain.receipt.outcome in ("met", "met_lower_point")
    assert EOS not in llm.embed("a</s>").token_ids, "special tokens are text"
    with pytest.raises(InputError, match="not a parameter of an embedding"):
        llm.embed("x", temperature=1.0)
    with pytest.raises(InputError, match="text must be text"):
        llm.embed(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="empty"):
        llm.embed([])
    with pytest.raises(ContextLengthError):
        llm.embed([1] * 300)
    assert llm.embed(np.array([1, 2, 3])).token_ids == [1, 2, 3]


def test_choose(llm: LLM) -> None:
    options = ["alpha", "beta", "be", "gamma ray"]
    choice = llm.choose("It is ", options)
    expected = []
    for option in options:
        ids = [*llm.tokenize("It is " + option, special=True), EOS]
        logits = llm.logits(ids).astype(np.float64)
        rows = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        start = len(ids) - len(option) - 1
        expected.append(sum(rows[position - 1, ids[position]] for position in range(start, len(ids))))
    assert choice.scores == pytest.approx(expected, abs=1e-3)
    assert choice.index == int(np.argmax(expected)) and choice.option == options[choice.index]
    normalized = llm.choose("It is ", options, normalize=True)
    assert normalized.scores == pytest.approx(
        [score / (len(option) + 1) for score, option in zip(expected, options, strict=True)], abs=1e-3
    )
    from_ids = llm.choose(llm.tokenize("It is ", special=True), options)
    assert from_ids.scores == pytest.approx(choice.scores, abs=1e-3)
    for wrong in ([], "text", [""], [1]):
        with pytest.raises(InputError, match="option"):
            llm.choose("a", wrong)  # type: ignore[arg-type]


def test_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi</s>"}]
    answer = llm.chat(messages, max_tokens=6, ignore_eos=True)
    stream = llm.chat(messages, stream=True, max_tokens=6, ignore_eos=True)
    assert text_of(list(stream)) == answer.text
    assert answer.receipt.prompt_tokens >= len("<user>hi</s><assistant>"), "what a user writes is no control token"


def test_constraints(llm: LLM) -> None:
    import re

    assert llm.generate("say ", choice=["yes", "no"]).text in ("yes", "no")
    assert re.fullmatch(r"[a-c]{3}-\d\d", llm.generate("code ", regex=r"[a-c]{3}-\d\d").text)
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    found = llm.generate("json ", json_schema={**schema, "additionalProperties": False}, max_tokens=60)
    assert isinstance(json.loads(found.text)["ok"], bool) and found.finish_reason == "stop"
    sampled = llm.generate("say ", choice=["yes", "no"], n=3, temperature=1.0, seed=2)
    assert {answer.text for answer in sampled} <= {"yes", "no"}
