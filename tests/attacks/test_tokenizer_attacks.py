"""Hostile tokenizer files: every header field of GGUF, SentencePiece's protobuf and tokenizer.json. One line each."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from haomiao.errors import HaomiaoError
from haomiao.text.sentencepiece_model import SentencePieceModel, serialize
from haomiao.text.tokenizer import Tokenizer
from haomiao.text.vocabulary import PieceType, Vocabulary

HUGE = 1 << 60


def assert_refused(path: Path) -> str:
    with pytest.raises(HaomiaoError) as caught:
        Tokenizer(path)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 600
    return message


def assert_harmless(path: Path) -> None:
    """Either a clear error, or a tokenizer that encodes and decodes without anything else escaping."""
    try:
        tokenizer = Tokenizer(path)
        ids = tokenizer.encode("a hello b\n中 <s> i", special=True)
        assert all(0 <= id_ < tokenizer.vocab_size for id_ in ids)
        assert isinstance(tokenizer.decode(ids), str)
    except HaomiaoError as error:
        assert "\n" not in str(error)


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def text(value: str | bytes, size: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if size is None else size) + data


def strings(values: list[str | bytes], count: int | None = None) -> bytes:
    return struct.pack("<IIQ", 9, 8, len(values) if count is None else count) + b"".join(map(text, values))


def numbers(values: list[int], code: str = "i", kind: int = 5, count: int | None = None) -> bytes:
    packed = struct.pack(f"<{len(values)}{code}", *values)
    return struct.pack("<IIQ", 9, kind, len(values) if count is None else count) + packed


def string(value: str) -> bytes:
    return struct.pack("<I", 8) + text(value)


def number(value: int) -> bytes:
    return struct.pack("<II", 4, value)


def gguf(values: dict[str, bytes], *, version: int = 3, keys: int | None = None, magic: bytes = b"GGUF") -> bytes:
    body = b"".join(text(key) + value for key, value in values.items())
    return magic + struct.pack("<IQQ", version, 0, len(values) if keys is None else keys) + body


BPE_TOKENS: list[str | bytes] = [*"helo", "he", "ll", "hell", "hello", "<s>"]
BPE: dict[str, bytes] = {
    "general.architecture": string("llama"),
    "tokenizer.ggml.model": string("gpt2"),
    "tokenizer.ggml.pre": string("gpt-2"),
    "tokenizer.ggml.tokens": strings(BPE_TOKENS),
    "tokenizer.ggml.token_type": numbers([1] * 8 + [3]),
    "tokenizer.ggml.merges": strings(["h e", "l l", "he ll", "hell o"]),
    "tokenizer.ggml.bos_token_id": number(8),
}
SPM_TOKENS: list[str | bytes] = ["<unk>", "<s>", "</s>", "\u2581", "h", "i", "\u2581h", "hi"]
SPM: dict[str, bytes] = {
    "tokenizer.ggml.model": string("llama"),
    "tokenizer.ggml.tokens": strings(SPM_TOKENS),
    "tokenizer.ggml.scores": numbers([0] * 8, "f", 6),
    "tokenizer.ggml.token_type": numbers([2, 3, 3, 1, 1, 1, 1, 1]),
}


def changed(base: dict[str, bytes], **changes: bytes | None) -> dict[str, bytes]:
    values = dict(base)
    for key, value in changes.items():
        name = f"tokenizer.ggml.{key}"
        if value is None:
            del values[name]
        else:
            values[name] = value
    return values


def test_the_honest_files_load(tmp_path: Path) -> None:
    (tmp_path / "bpe.gguf").write_bytes(gguf(BPE))
    (tmp_path / "spm.gguf").write_bytes(gguf(SPM))
    assert Tokenizer(tmp_path / "bpe.gguf").encode("hello") == [7]
    assert Tokenizer(tmp_path / "spm.gguf").encode("hi hi") == [6, 5, 6, 5]


GGUF_ATTACKS: dict[str, bytes] = {
    "empty": b"",
    "magic": gguf(BPE, magic=b"FUGG"),
    "version 1": gguf(BPE, version=1),
    "version huge": gguf(BPE, version=0xFFFFFFFF),
    "keys 2^60": gguf(BPE, keys=HUGE),
    "keys too many": gguf(BPE, keys=len(BPE) + 1),
    "key length 2^60": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("x", HUGE),
    "string length 2^60": gguf({"tokenizer.ggml.model": struct.pack("<I", 8) + text("x", HUGE)}),
    "tokens 2^60": gguf(changed(BPE, tokens=strings(BPE_TOKENS, HUGE))),
    "tokens one more": gguf(changed(BPE, tokens=strings(BPE_TOKENS, 10))),
    "types 2^60": gguf(changed(BPE, token_type=numbers([1], count=HUGE))),
    "types too few": gguf(changed(BPE, token_type=numbers([1]))),
    "types are strings": gguf(changed(BPE, token_type=strings(BPE_TOKENS))),
    "scores too few": gguf(changed(SPM, scores=numbers([0], "f", 6))),
    "score is NaN": gguf(changed(SPM, scores=struct.pack("<IIQ8f", 9, 6, 8, *[float("nan")] * 8))),
    "score is infinite": gguf(changed(SPM, scores=struct.pack("<IIQ8f", 9, 6, 8, *[float("inf")] * 8))),
    "token not UTF-8": gguf(changed(BPE, tokens=strings([b"\xff\xfe", *BPE_TOKENS[1:]]))),
    "tokens are numbers": gguf(changed(BPE, tokens=numbers([1, 2]))),
    "no tokens": gguf(changed(BPE, tokens=None)),
    "no token at all": gguf(changed(BPE, tokens=strings([]))),
    "token twice": gguf(changed(BPE, tokens=strings([*BPE_TOKENS[:-1], "h"]))),
    "token of a megabyte": gguf(changed(BPE, tokens=strings([*BPE_TOKENS[:-1], "x" * (1 << 20)]))),
    "no merges": gguf(changed(BPE, merges=None)),
    "merge refers nowhere": gguf(changed(BPE, merges=strings(["h e", "x y"]))),
    "merge makes nothing": gguf(changed(BPE, merges=strings(["e h"]))),
    "merge of one": gguf(changed(BPE, merges=strings(["he"]))),
    "merge not UTF-8": gguf(changed(BPE, merges=strings([b"\xff \xff"]))),
    "merges are numbers": gguf(changed(BPE, merges=numbers([1]))),
    "model unknown": gguf(changed(BPE, model=string("rot13"))),
    "model a number": gguf(changed(BPE, model=number(1))),
    "model missing": gguf(changed(BPE, model=None)),
    "pre unknown": gguf(changed(BPE, pre=string("nobody"))),
    "array of arrays": gguf(changed(BPE, extra=struct.pack("<IIQ", 9, 9, 1))),
    "type unknown": gguf(changed(BPE, extra=struct.pack("<I", 99))),
    "bert without UNK": gguf(changed(BPE, model=string("bert"))),
    "charsmap too short": gguf(changed(SPM, model=string("t5"), precompiled_charsmap=numbers([1, 2], "B", 0))),
    "charsmap size 2^32": gguf(changed(SPM, model=string("t5"), precompiled_charsmap=numbers([255] * 12, "B", 0))),
    "the same key twice": gguf(BPE, keys=len(BPE) + 1) + text("tokenizer.ggml.model") + string("gpt2"),
}


@pytest.mark.parametrize("name", GGUF_ATTACKS)
def test_gguf_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUF_ATTACKS[name])
    assert_refused(path)


@pytest.mark.parametrize("base", [BPE, SPM], ids=["bpe", "spm"])
def test_gguf_truncated_anywhere(base: dict[str, bytes], tmp_path: Path) -> None:
    data = gguf(base)
    path = tmp_path / "model.gguf"
    for size in range(0, len(data), 3):
        path.write_bytes(data[:size])
        assert_refused(path)


@pytest.mark.parametrize("base", [BPE, SPM], ids=["bpe", "spm"])
def test_gguf_with_any_byte_changed(base: dict[str, bytes], tmp_path: Path) -> None:
    rng = random.Random(0)
    data = gguf(base)
    path = tmp_path / "model.gguf"
    for position in range(0, len(data), 2):
        path.write_bytes(data[:position] + bytes([rng.randrange(256)]) + data[position + 1 :])
        assert_harmless(path)


def test_special_ids_outside_the_vocabulary_are_none(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(changed(BPE, bos_token_id=number(0xFFFFFFFF), eos_token_id=number(4_000_000))))
    tokenizer = Tokenizer(path)
    assert tokenizer.bos_id is None and tokenizer.eos_ids == ()


# ---- SentencePiece --------------------------------------------------------------------------------------------------


def model(unigram: bool = False, charsmap: bytes = b"") -> bytes:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "h", "i", "\u2581h"]
    types = [int(PieceType.UNKNOWN), *[int(PieceType.CONTROL)] * 2, *[int(PieceType.BYTE)] * 256, *[1] * 4]
    vocabulary = Vocabulary(tokens, types, [-float(id_) for id_ in range(len(tokens))], unk_id=0, charsmap=charsmap)
    return serialize(SentencePieceModel(vocabulary, unigram, 1, 2, None))


@pytest.mark.parametrize("unigram", [False, True])
def test_model_truncated_or_changed(unigram: bool, tmp_path: Path) -> None:
    rng = random.Random(0)
    data = model(unigram)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    assert Tokenizer(path).decode(Tokenizer(path).encode("hi 中")) == "hi 中"
    for _ in range(120):
        path.write_bytes(data[: rng.randrange(len(data))])
        assert_harmless(path)
        position = rng.randrange(len(data))
        path.write_bytes(data[:position] + bytes([rng.randrange(256)]) + data[position + 1 :])
        assert_harmless(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 100,
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # a piece of 2^63 bytes
        b"\x0a\x80" * 50,
        b"\x08\x01" * 50,
        b"\x0b" * 10,
        b"not a model at all, only text",
        model()[:-40] + b"\x12\x03\x18\x04",
        model() + model(),
        model(charsmap=b"\0\0\0\0"),
        model(charsmap=b"\xff\xff\xff\xff" + b"x" * 40),
    ],
)
def test_model_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    assert_refused(path)


def test_charsmap_that_points_outside(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "tokenizer.model"
    for _ in range(40):
        units = struct.pack("<64I", *(rng.getrandbits(32) for _ in range(64)))
        path.write_bytes(model(charsmap=struct.pack("<I", len(units)) + units + b"abc"))
        assert_harmless(path)


# ---- tokenizer.json and what lies beside it -------------------------------------------------------------------------

HONEST: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "BPE", "vocab": {"h": 0, "i": 1, "hi": 2}, "merges": ["h i"]},
}


def with_model(**changes: Any) -> dict[str, Any]:
    return HONEST | {"model": HONEST["model"] | changes}


def added(**changes: Any) -> dict[str, Any]:
    token = {"id": 3, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False}
    return HONEST | {"added_tokens": [token | {"normalized": False, "special": True} | changes]}


JSON_ATTACKS: dict[str, Any] = {
    "a list": [],
    "no model": {"version": "1.0"},
    "empty vocabulary": with_model(vocab={}, merges=[]),
    "id 2^60": with_model(vocab={"h": HUGE}, merges=[]),
    "id negative": with_model(vocab={"h": -1}, merges=[]),
    "id a float": with_model(vocab={"h": 0.5}, merges=[]),
    "vocab a list": with_model(vocab=["h"]),
    "merge nowhere": with_model(merges=["x y"]),
    "merge a number": with_model(merges=[1]),
    "type unknown": with_model(type="Magic"),
    "added id 2^60": added(id=HUGE),
    "added a number": HONEST | {"added_tokens": [5]},
    "bad regex": HONEST
    | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
    "decoder unknown": HONEST | {"decoder": {"type": "Shell"}},
}


@pytest.mark.parametrize("name", JSON_ATTACKS)
def test_json_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(JSON_ATTACKS[name]))
    assert_refused(path)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"null", b"\0" * 1000, b"{}" * 3]
)
def test_json_that_is_none_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    assert_refused(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("id_", [4_000_000_000, 1 << 24, 100])
def test_sparse_ids_stay_inside_the_vocabulary_or_are_refused(id_: int, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(with_model(vocab={"h": 0, "i": id_}, merges=[])))
    assert_harmless(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {str(HUGE): {"content": "<x>"}}}),
        ("tokenizer_config.json", {"chat_template": "x" * (3 << 20)}),
        ("tokenizer_config.json", []),
        ("generation_config.json", "text"),
        ("special_tokens_map.json", 5),
    ],
)
def test_files_beside_it_are_refused(name: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(HONEST))
    (tmp_path / name).write_text(json.dumps(value))
    assert_refused(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": 5, "eos_token": ["x"], "add_bos_token": "yes"},
        {"eos_token": {"content": {"content": "x"}}, "chat_template": {"a": 1}},
        {"added_tokens_decoder": {"x": 1, "-1": {"content": "a"}, "2": {"content": "h"}, "9": {"content": 7}}},
        {"haomiao": {"tokenizer": "tokenizer.model", "flags": 5}},
        {"chat_template": [{"name": "default"}, 5, {"name": "default", "template": "{{ 1 }}"}]},
    ],
)
def test_odd_config_values_are_left_alone(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(HONEST))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [HUGE, -1, "x", True, 2]}))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eos_ids == (2,) and tokenizer.encode("hi") == [2]


def test_catastrophic_pattern_does_not_hang(tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(HONEST | {"pre_tokenizer": split}))
    tokenizer = Tokenizer(tmp_path)
    try:
        ids = tokenizer.encode("a" * 40 + "b")
    except HaomiaoError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(ids, list)


@pytest.mark.parametrize(
    ("vocab", "merges"),
    [
        ("[]", ""),
        ('{"a": 1.5}', ""),
        ('{"a": 0, "b": 0}', ""),
        ('{"a": 0}', "a"),
        ('{"a": 0}', "a b"),
        ('{"a": 1152921504606846976}', ""),
        ('{"a": true}', ""),
        ("{}", ""),
    ],
)
def test_vocab_and_merges_are_refused(vocab: str, merges: str, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(vocab)
    (tmp_path / "merges.txt").write_text(merges)
    assert_refused(tmp_path)
