"""`LLM` and `Session` on a tiny random checkpoint with a byte-level tokenizer, run by the reference executor."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("haomiao._core", reason="the compiled core is not built")

import haomiao
from haomiao.api import LLM, Chunk, Completion
from haomiao.errors import BudgetError, ContextLengthError, InputError, ModelNotFoundError
from tests.golden.checkpoint import random_checkpoint

EOS, BOS = 256, 257
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_tokenizer(directory: Path) -> None:
    """Every byte is a token; `</s>` ends, `<s>` begins a prompt."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<s>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.numpy import save_file

    directory = tmp_path_factory.mktemp("tiny")
    (directory / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    save_file(random_checkpoint(CONFIG, 3), str(directory / "model.safetensors"))
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAOMIAO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def llm(checkpoint: Path, cache: None) -> Iterator[LLM]:
    with LLM(checkpoint, executor="reference") as opened:
        yield opened


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


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


# ---- sessions -------------------------------------------------------------------------------------------------------


def test_a_session_gives_the_answer_of_its_whole_text(llm: LLM) -> None:
    with llm.session() as session:
        assert session.feed("Hel") == 4
        assert session.feed("lo wor") == 10
        session.feed("ld")
        expected = llm.generate("Hello world", max_tokens=8, ignore_eos=True)
        answer = session.generate(max_tokens=8, ignore_eos=True)
        assert answer.token_ids == expected.token_ids and answer.text == expected.text
        assert answer.receipt.cached_tokens == 11, "only the last token was computed again"
        assert session.token_ids == [*llm.tokenize("Hello world", special=True), *answer.token_ids]
        session.feed(" and")
        longer = session.generate(max_tokens=5, remember=False)
        assert longer.token_ids == llm.generate(session.token_ids, max_tokens=5).token_ids
        assert session.text == "Hello world" + answer.text + " and"
    with pytest.raises(InputError, match="closed"):
        session.feed("more")


def test_corrections_compute_only_the_changed_tail(llm: LLM) -> None:
    with llm.session() as session:
        session.feed("turn the light on")
        session.rewind(2)
        assert session.text == "turn the light "
        session.feed("off")
        answer = session.generate(max_tokens=4, remember=False)
        assert answer.token_ids == llm.generate("turn the light off", max_tokens=4).token_ids
        session.replace("turn the heat off")
        answer = session.generate(max_tokens=4)
        assert answer.token_ids == llm.generate("turn the heat off", max_tokens=4).token_ids
        session.truncate(4)
        assert session.text == "turn"
        for wrong in (-1, 99, 1.0, True):
            with pytest.raises(InputError, match="cut to"):
                session.truncate(wrong)  # type: ignore[arg-type]
        with pytest.raises(ContextLengthError):
            session.feed("x" * 300)
        assert session.text == "turn", "what is refused was not added"
        with pytest.raises(InputError, match="one answer"):
            session.generate(n=2)


def test_a_session_streams_and_chooses(llm: LLM) -> None:
    with llm.session() as session:
        session.feed("The answer is ")
        choice = session.choose(["yes", "no"])
        assert choice.scores == pytest.approx(llm.choose("The answer is ", ["yes", "no"]).scores, abs=1e-3)
        chunks = list(session.stream(max_tokens=5, ignore_eos=True))
        assert session.text == "The answer is " + text_of(chunks)
        stream = session.stream(max_tokens=50, ignore_eos=True)
        first = next(stream)
        stream.close()
        assert session.text == "The answer is " + text_of(chunks) + first.text
        session.generate(max_tokens=1)
    llm._driver._engine.check_integrity()


# ---- life -----------------------------------------------------------------------------------------------------------


def test_threads_may_share_a_model(llm: LLM) -> None:
    expected = [llm.generate(f"thread {index}", max_tokens=10).token_ids for index in range(4)]
    found: dict[int, list[int]] = {}

    def work(index: int) -> None:
        found[index] = llm.generate(f"thread {index}", max_tokens=10).token_ids

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[index] for index in range(4)] == expected


def test_a_checkpoint_without_a_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    with LLM(tmp_path, executor="reference", max_context=64, kv="f32") as llm:
        assert llm.tokenizer is None and llm.max_context == 64 and llm.eos_ids == (EOS,) and llm.kv == "f32"
        assert llm.logits([1, 2, 3]).shape == (3, 260)
        answer = llm.generate([1, 2, 3], max_tokens=4)
        assert answer.text == "" and answer.token_ids
        for action in (
            lambda: llm.generate("text"),
            lambda: llm.tokenize("a"),
            llm.session,
            lambda: llm.choose("a", ["b"]),
        ):
            with pytest.raises(InputError, match="no tokenizer"):
                action()
    llm.close()
    with pytest.raises(InputError, match="closed"):
        llm.generate([1])


def test_arguments_of_a_model_are_checked(checkpoint: Path) -> None:
    for options, param in (
        ({"point": "int3"}, "point"),
        ({"kv": "f16"}, "kv"),
        ({"threads": 0, "executor": "native"}, "threads"),
        ({"executor": "quantum"}, "executor"),
        ({"max_context": 100_000}, "max_context"),
        ({"kv_memory": 10}, "kv_memory"),
    ):
        with pytest.raises(InputError) as caught:
            LLM(checkpoint, **{"executor": "reference", **options})
        assert caught.value.param == param, options
    with pytest.raises(ModelNotFoundError):
        LLM(checkpoint / "nothing here", offline=True)


def test_chat_without_a_template_is_chatml(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    with LLM(tmp_path, executor="reference") as llm:
        answer = llm.chat([{"role": "user", "content": "hi"}], max_tokens=2)
        assert answer.receipt.prompt_tokens > len("<|im_start|>user")
        with pytest.raises(InputError, match="messages"):
            llm.chat([])


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, haomiao; assert 'numpy' not in sys.modules; assert 'LLM' in dir(haomiao); "
        "haomiao.SamplingParams; assert 'haomiao.api' not in sys.modules; haomiao.LLM; "
        "assert not {'torch', 'transformers', 'tokenizers', 'llguidance', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = haomiao.nothing_like_it


# ---- a trained model ------------------------------------------------------------------------------------------------


def test_stories260k_tells_what_llama2c_tells(shared: Path) -> None:
    expected = (shared / "data/stories260K/expected_greedy_from_bos.txt").read_text(encoding="utf-8")
    with LLM(shared / "data/stories260K/hf", point="full", executor="reference") as llm:
        answer = llm.generate("", max_tokens=200)
        assert expected.startswith(answer.text.strip()) or answer.text.strip().startswith(expected.strip())
        assert len(answer.text) > 400


# ---- speculation ----------------------------------------------------------------------------------------------------


def test_speculation_changes_no_answer(llm: LLM, checkpoint: Path) -> None:
    options: list[dict[str, Any]] = [
        {"max_tokens": 40},
        {"max_tokens": 30, "temperature": 0.8, "seed": 5, "logprobs": 2, "repetition_penalty": 1.1},
        {"max_tokens": 30, "regex": "[ab]{3,20}c"},
        {"max_tokens": 24, "temperature": 1.0, "seed": 7, "n": 2},
        {"max_tokens": 40, "stop": "e", "ignore_eos": True},
    ]

    def told(model: LLM, way: str | None) -> list[Any]:
        found: list[Any] = []
        for each in options:
            answer = model.generate("the sea the sea the s", **each, **({} if way is None else {"speculate": way}))
            answers = answer if isinstance(answer, list) else [answer]
            found.append([(one.token_ids, one.text, one.finish_detail, one.logprobs) for one in answers])
        return found

    expected = told(llm, "off")
    assert told(llm, None) == told(llm, "suffix") == told(llm, "self") == expected
    with LLM(checkpoint, executor="reference", speculate=checkpoint) as drafted:  # as slow as the model itself
        receipt = drafted.generate("the sea", max_tokens=40, ignore_eos=True).receipt
        assert receipt.as_dict()["drafted_tokens"] == receipt.drafted_tokens >= receipt.accepted_tokens
        assert receipt.drafted_tokens, "it is tried before it is given up"
        assert told(drafted, None) == expected


def test_ways_to_speculate_that_there_are_not(llm: LLM, checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    with pytest.raises(InputError, match="speculate must be one of off, auto, suffix, self, not 'draft'"):
        llm.generate("a", speculate="draft")
    with pytest.raises(InputError, match="speculate must be"):
        LLM(checkpoint, executor="reference", speculate=3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="needs a model with the points int4 and int8"):
        LLM(checkpoint, executor="reference", point="full", speculate="self")
    with pytest.raises(ModelNotFoundError):
        LLM(checkpoint, executor="reference", offline=True, speculate=str(tmp_path / "nothing"))
    other = {**CONFIG, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(other), encoding="utf-8")
    save_file(random_checkpoint(other, 3), str(tmp_path / "model.safetensors"))
    with pytest.raises(InputError, match="its vocabulary is another one"):
        LLM(checkpoint, executor="reference", speculate=str(tmp_path))
