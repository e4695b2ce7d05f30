"""Corpus, vocabulary and shards: what is read, what is dropped, what is written, and the batches that come out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haomiao.errors import InputError, ModelError
from haomiao.text.tokenizer import Tokenizer
from haomiao.train.corpus import Account, Seen, documents
from haomiao.train.prepare import main, prepare
from haomiao.train.schedule import fall_steps, rate_share
from haomiao.train.settings import CorpusFile, Schedule, read_corpus, read_training
from haomiao.train.shards import Shards
from tests.train.toy import write_data, write_texts

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("toy"))


def test_the_manifest_names_every_file_with_its_licence(data: Path) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    assert [f["path"] for f in manifest["files"]] == ["en.txt", "en-held.txt", "zh.txt", "zh-held.txt"]
    assert {f["licence"] for f in manifest["files"]} == {"CC0"}
    assert all(len(f["sha256"]) == 64 and f["tokens"] > 0 for f in manifest["files"])
    assert manifest["files"][0]["lines_dropped"] == 1
    assert set(manifest["valid"]) == {"en", "zh"}


def test_tokens_are_the_text_and_our_tokenizer_reads_the_vocabulary(data: Path) -> None:
    shards, tokenizer = Shards(data), Tokenizer(str(data))
    text = tokenizer.decode(shards.valid["zh"].tolist()[:-1])
    assert text.startswith("红猫坐在新垫子上。\n")
    assert tokenizer.encode("the 红猫") == Tokenizer(str(data)).encode("the 红猫")
    assert shards.valid["zh"][-1] == 0


def test_every_epoch_takes_every_window_once(data: Path) -> None:
    shards, length = Shards(data), 16
    count = (shards.tokens - 1) // length - 1
    firsts = [tuple(shards.batch(1, i, 1, length)[0]) for i in range(count)]
    stream = np.concatenate(shards._train)
    epochs = [{tuple(stream[o + i * length : o + (i + 1) * length + 1]) for i in range(count)} for o in range(length)]
    assert set(firsts) in epochs


def test_batches_depend_on_seed_and_index_alone(data: Path) -> None:
    one, two = Shards(data), Shards(data)
    for index in (0, 7, 1000):
        assert (one.batch(3, index, 4, 16) == two.batch(3, index, 4, 16)).all()
    assert (one.batch(3, 0, 4, 16) != one.batch(4, 0, 4, 16)).any()


def test_damaged_data_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no prepared data"):
        Shards(tmp_path)
    (tmp_path / "manifest.json").write_text('{"vocab_size": 3}')
    with pytest.raises(ModelError, match="damaged"):
        Shards(tmp_path)
    manifest = json.loads((data / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "train-00000.u16").write_bytes(b"\0\0")
    with pytest.raises(ModelError, match="the manifest says"):
        Shards(tmp_path)


def test_prepared_data_are_not_overwritten(data: Path) -> None:
    with pytest.raises(InputError, match="already"):
        prepare(write_texts(data.parent / "texts"), data.parent / "texts", data)


def test_pairs_become_a_document_in_each_language() -> None:
    found = list(documents(CorpusFile(form="pairs"), "one\t一\ntwo\t二\n", Seen(), Account()))
    assert found == ["one\ntwo", "一\n二"]


def test_one_column_of_a_table_with_commas() -> None:
    file = CorpusFile(path="t.csv", form="pairs", column=0)
    assert list(documents(file, 'text,label\n"yes, please",a\nno,b\n', Seen(), Account())) == ["text\nyes, please\nno"]


def test_labelled_json_gives_its_text() -> None:
    file = CorpusFile(path="t.json", form="labelled")
    text = json.dumps(
        {"train": [["wake me", "alarm"], ["stop", "halt"]], "more": {"test": [["play it", "music"]]}, "n": 3}
    )
    assert list(documents(file, text, Seen(), Account())) == ["wake me\nstop\nplay it"]
    for broken in ("{", "[" * 100_000):
        with pytest.raises(InputError, match="is not JSON"):
            list(documents(file, broken, Seen(), Account()))


def test_held_out_lines_are_dropped_from_training(tmp_path: Path) -> None:
    line = "a line of the held-out text that stands in the training text as well\n"
    (tmp_path / "t.txt").write_text("something of its own that is long enough to be kept, too\n" + line)
    (tmp_path / "v.txt").write_text(line)
    (tmp_path / "corpus.yaml").write_text(
        "vocabulary: 300\nfiles:\n"
        "  - {path: t.txt, language: en, licence: CC0}\n  - {path: v.txt, language: en, licence: CC0, use: valid}\n"
    )
    assert main([str(tmp_path / "corpus.yaml"), "--root", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [f["lines_dropped"] for f in manifest["files"]] == [1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("files: 3", "list of mappings"),
        ("files: [{path: a, language: en}]", "licence"),
        ("files: [{path: a, language: en, licence: x, form: poem}]", "form must be one of"),
        ("vocabulary: 12\nfiles: []", "vocabulary must be"),
        ("colour: red\nfiles: []", "no key 'colour'"),
    ],
)
def test_a_corpus_file_is_checked(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_corpus(tmp_path / "c.yaml")


@pytest.mark.parametrize("name", ["tiny-cpu2.yaml", "tiny-gpu.yaml"])
def test_the_configs_of_the_repository_are_valid(name: str) -> None:
    training = read_training(CONFIGS / name)
    assert training.steps > training.warmup
    assert read_corpus(CONFIGS / "corpus.yaml").vocabulary == 8192


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 5\nwarmup: 5", "leave nothing"),
        ("lenght: 5", "did you mean 'length'"),
        ("precision: f64", "one of f32, bf16"),
        ("batch: 1.5", "whole number"),
        ("compile: 1", "true or false"),
        ("model: 7", "mapping"),
    ],
)
def test_settings_are_checked(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_training(tmp_path / "c.yaml")


@given(
    st.sampled_from(["cosine", "trapezoid"]),
    st.integers(2, 500),
    st.floats(0.01, 1.0),
    st.floats(0.0, 0.9),
    st.data(),
)
def test_rates_rise_then_fall_between_floor_and_one(
    kind: str, steps: int, decay: float, floor: float, data: st.DataObject
) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    schedule = Schedule(steps, kind, warmup, decay, floor)  # type: ignore[arg-type]
    shares = [rate_share(schedule, step) for step in range(steps)]
    assert all(0 < share <= 1 for share in shares[:-1])
    assert shares[:warmup] == sorted(shares[:warmup])
    assert shares[warmup:] == sorted(shares[warmup:], reverse=True)
    assert min(shares[warmup:]) >= floor - 1e-9
    assert fall_steps(schedule) <= steps


def test_a_trapezoid_may_be_lengthened_before_it_falls() -> None:
    short, long = Schedule(100, "trapezoid", 10, 0.3, 0.1), Schedule(200, "trapezoid", 10, 0.3, 0.1)
    assert [rate_share(short, s) for s in range(70)] == [rate_share(long, s) for s in range(70)]
