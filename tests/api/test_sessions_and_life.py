"""`Session`, threads, checkpoints that lack something, and a trained model."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

import haomiao
from haomiao.api import LLM
from haomiao.errors import ContextLengthError, InputError, ModelNotFoundError
from tests.api.tiny import EOS, text_of

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
