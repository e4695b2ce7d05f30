"""The mapped vocabulary gives the ids of the library, for whole texts and odd ones, and distrusts its file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.errors import ModelError
from haomiao.text import merging, table
from haomiao.text.tokenizer import Tokenizer


def prepared(source: Path, target: Path) -> Tokenizer:
    """A copy of a tokenizer's directory with a table in it, loaded."""
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    data = table.make_table((target / "tokenizer.json").read_bytes(), (target / "tokenizer_config.json").read_bytes())
    assert data is not None
    (target / table.FILE).write_bytes(data)
    return Tokenizer(target)


def is_quick(tokenizer: Tokenizer) -> bool:
    return tokenizer._parts.quick is not None and tokenizer._backend is None


@pytest.fixture(scope="module")
def quick(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return prepared(tiny_directory, tmp_path_factory.mktemp("table") / "tiny")


@pytest.fixture(scope="module")
def quick_qwen(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return prepared(shared / "data/tokenizers/qwen2.5", tmp_path_factory.mktemp("table") / "qwen")


def assert_same(quick: Tokenizer, library: Tokenizer, text: str) -> None:
    for special in (False, True):
        ids = quick.encode(text, special)
        assert ids == library.encode(text, special)
        assert quick.decode(ids) == library.decode(ids)


@given(text=st.text(alphabet="helo wĽ<|>_imstardx\n  é中", max_size=60))
@settings(deadline=None)
def test_any_text_gives_the_ids_of_the_library(quick: Tokenizer, tiny: Tokenizer, text: str) -> None:
    assert_same(quick, tiny, text)
    assert is_quick(quick)


@given(
    parts=st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "<think>", "hello", " wo", "ll ", ""]), max_size=8)
)
@settings(deadline=None)
def test_added_tokens_are_cut_as_the_library_cuts_them(quick: Tokenizer, tiny: Tokenizer, parts: list[str]) -> None:
    assert_same(quick, tiny, "".join(parts))


def test_everything_said_of_the_tokenizer_is_the_same(quick: Tokenizer, tiny: Tokenizer) -> None:
    names = ("bos_id", "eos_ids", "special_ids", "prefix_ids", "suffix_ids", "vocab_size", "strips_leading_space")
    for name in (*names, "chat_template", "added_tokens", "declared_tokens", "add_bos"):
        assert getattr(quick, name) == getattr(tiny, name), name
    for id_ in range(tiny.vocab_size):
        assert quick.token_bytes(id_) == tiny.token_bytes(id_)
        text = tiny.backend.id_to_token(id_)
        assert quick.token_id(text) == tiny.token_id(text) == id_
    assert quick.token_id("nothing of this name") is None
    assert is_quick(quick)


def test_the_ids_of_a_real_vocabulary(quick_qwen: Tokenizer, qwen: Tokenizer, samples: list[str]) -> None:
    for text in samples:
        assert_same(quick_qwen, qwen, text)
    assert_same(quick_qwen, qwen, "<|im_start|>user\nWhat's 3,141.59 in 中文?<|im_end|>\n<|endoftext|>")
    assert is_quick(quick_qwen)


def test_a_vocabulary_whose_words_are_whole(tiny_directory: Path, tmp_path: Path) -> None:
    """`ignore_merges`: a word that is a token is that token, though no merge leads to it."""
    shutil.copytree(tiny_directory, tmp_path / "source")
    file = json.loads((tmp_path / "source/tokenizer.json").read_text())
    file["model"]["ignore_merges"] = True
    file["model"]["merges"] = [m for m in file["model"]["merges"] if m != ["hell", "o"]]
    (tmp_path / "source/tokenizer.json").write_text(json.dumps(file))
    quick, library = prepared(tmp_path / "source", tmp_path / "quick"), Tokenizer(tmp_path / "source")
    for text in ("hello", "hello hell", "xhello"):
        assert_same(quick, library, text)
    assert quick.encode("hello") == [library.token_id("hello")]
    assert is_quick(quick)


@pytest.mark.parametrize("text", ["h" * (merging.MAX_WORD_BYTES + 1), "hello " * (merging.MAX_CHARACTERS // 6 + 1)])
def test_what_is_too_long_is_left_to_the_library(
    tiny_directory: Path, tiny: Tokenizer, tmp_path: Path, text: str
) -> None:
    quick = prepared(tiny_directory, tmp_path / "tiny")
    assert_same(quick, tiny, text)
    assert not is_quick(quick)


def test_who_asks_for_the_backend_gets_it(tiny_directory: Path, tiny: Tokenizer, tmp_path: Path) -> None:
    quick = prepared(tiny_directory, tmp_path / "tiny")
    assert json.loads(quick.to_json()) == json.loads(tiny.to_json())
    assert_same(quick, tiny, "hello world<|im_end|>")
    quick.save(tmp_path / "saved")
    assert Tokenizer(tmp_path / "saved").encode("hello") == tiny.encode("hello")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_table_of_other_files_is_not_used(tiny_directory: Path, tmp_path: Path, name: str) -> None:
    assert is_quick(prepared(tiny_directory, tmp_path / "tiny"))
    path = tmp_path / "tiny" / name
    path.write_text(path.read_text() + "\n")
    assert not is_quick(Tokenizer(tmp_path / "tiny"))


def test_tokens_that_only_the_config_declares_are_in_the_table(tiny_directory: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_directory, tmp_path / "source")
    size = Tokenizer(tiny_directory).vocab_size
    declared = {str(size): {"content": "<|extra|>", "special": True}}
    (tmp_path / "source/tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": declared}))
    quick = prepared(tmp_path / "source", tmp_path / "quick")
    assert quick.encode("<|extra|>", special=True) == [size]
    assert is_quick(quick)
    assert_same(quick, Tokenizer(tmp_path / "source"), "hello<|extra|>")
    assert quick.backend.token_to_id("<|extra|>") == size


def test_other_kinds_of_tokenizer_have_no_table(shared: Path) -> None:
    assert table.make_table((shared / "data/tokenizers/llama2/tokenizer.json").read_bytes(), b"") is None
    assert table.make_table(b"{}", b"") is None
    assert table.make_table(b"\xff", b"") is None


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_a_damaged_table_is_one_clear_error_or_other_ids(
    tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    target = tmp_path_factory.mktemp("damaged") / "tiny"
    prepared(tiny_directory, target)
    path = target / table.FILE
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    for _ in range(data.draw(st.integers(1, 6))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        tokenizer = Tokenizer(target)
        ids = tokenizer.encode("hello world<|im_end|> <think>", special=True)
        assert all(0 <= id_ < tokenizer.vocab_size for id_ in ids)
        tokenizer.decode(ids)
    except ModelError as error:
        assert "\n" not in str(error)
