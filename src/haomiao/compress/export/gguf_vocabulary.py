"""An artifact's tokenizer as GGUF metadata. Knows the format's keys (ggml, docs/gguf.md), nothing about weights.

Two kinds are written: `gpt2` (byte-level BPE, with the name of its pre-tokenizer) and `llama` (SentencePiece BPE, with
scores). What was written is read back by our own reader and compared on texts: a vocabulary that cuts them otherwise is
refused. llama.cpp applies no Unicode normalization; neither do the texts need any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from haomiao.compress.export.gguf_file import Value
from haomiao.errors import ModelError, UnsupportedModelError
from haomiao.text.files import read_bytes, read_object
from haomiao.text.pretokenizers import PRE_TOKENIZERS
from haomiao.text.tokenizer import Tokenizer
from haomiao.text.vocabulary import PieceType

KEY = "tokenizer.ggml."
PROBES = (
    "Hello, world! It's 3.14159 o'clock; we've 1234567 reasons.",
    "The quick  brown   fox\n\n\tjumps over\r\n the lazy dog's tail   ",
    "你好,世界!今天天气真好。第12345号 文件；“引号”",
    "def f(x):\n    return x**2 + 10 % 7  # naïve café — ≤ ∑ 🙂👍🏽\n",
    "Смысл жизни こんにちは 안녕하세요 ١٢٣ ½ ",
    " leading and trailing \u3000",
)
"""Texts on which the written vocabulary must give the artifact's own ids."""


def vocabulary(directory: Path, size: int) -> dict[str, Value]:
    """The `tokenizer.*` keys of the tokenizer in `directory`, padded to the model's `size` tokens.

    A directory without a tokenizer gives a vocabulary of kind `none`: the model takes token ids. Raises
    `UnsupportedModelError` for kinds that GGUF has no exact words for, `ModelError` for more tokens than the model has.
    """
    if not (directory / "tokenizer.json").is_file():
        return {KEY + "model": "none"}
    tokenizer = Tokenizer(directory)
    if tokenizer.vocab_size > size:
        raise ModelError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {size}")
    marker = read_object(directory / "tokenizer_config.json").get("haomiao")
    if isinstance(marker, dict) and (directory / "tokenizer.model").is_file():
        found = _scored(directory / "tokenizer.model", size)
    else:
        found = _from_json(read_object(directory / "tokenizer.json"), size)
    return found | _specials(tokenizer)


def check(path: Path, directory: Path) -> None:
    """Refuse a file whose vocabulary does not cut the probes as the artifact's. Raises `UnsupportedModelError`."""
    ours, theirs = Tokenizer(directory), Tokenizer(path)
    for text in PROBES:
        if ours.encode(text, special=True) != theirs.encode(text, special=True):
            raise UnsupportedModelError(
                f"this tokenizer cannot be exported to GGUF exactly: {text[:24]!r} would be cut otherwise"
            )


def _scored(path: Path, size: int) -> dict[str, Value]:
    from haomiao.text.sentencepiece_model import parse

    model = parse(read_bytes(path), path.name)
    pieces = model.vocabulary
    if model.unigram:
        raise UnsupportedModelError("unigram tokenizers cannot be exported to GGUF")
    return {
        KEY + "model": "llama",
        KEY + "pre": "default",
        **_lists(dict(enumerate(pieces.tokens)), dict(enumerate(map(int, pieces.types))), size),
        KEY + "scores": _padded_scores(list(pieces.scores), size),
        KEY + "add_space_prefix": pieces.add_dummy_prefix,
    }


def _from_json(data: Mapping[str, Any], size: int) -> dict[str, Value]:
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise UnsupportedModelError("only BPE tokenizers can be exported to GGUF")
    texts = {int(id_): token for token, id_ in model["vocab"].items()}
    types = dict.fromkeys(texts, int(PieceType.NORMAL))
    for added in data.get("added_tokens") or ():
        texts[added["id"]] = added["content"]
        types[added["id"]] = int(PieceType.CONTROL if added["special"] else PieceType.USER_DEFINED)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or ()]
    if model.get("byte_fallback"):
        return _from_merges(data, texts, types, merges, size)
    kept = bool(model.get("ignore_merges"))
    return {
        KEY + "model": "gpt2",
        KEY + "pre": pre_tokenizer(data.get("pre_tokenizer"), kept),
        **_lists(texts, types, size),
        KEY + "merges": merges,
    }


def _from_merges(
    data: Mapping[str, Any], texts: dict[int, str], types: dict[int, int], merges: Sequence[str], size: int
) -> dict[str, Value]:
    """SentencePiece BPE as tokenizer.json states it: a piece's score is the place of the first merge that makes it."""
    ids = {token: id_ for id_, token in texts.items()}
    scores = dict.fromkeys(texts, -float(len(merges) + 1))
    for rank, merge in reversed(list(enumerate(merges))):
        left, _, right = merge.partition(" ")
        if left + right in ids:
            scores[ids[left + right]] = -float(rank)
    for token, id_ in ids.items():
        if len(token) == 6 and token.startswith("<0x"):
            types[id_] = int(PieceType.BYTE)
    unknown = ids.get(str(data["model"].get("unk_token")))
    if unknown is not None:
        types[unknown] = int(PieceType.UNKNOWN)
    prefixed = '"Prepend"' in repr(data.get("normalizer")).replace("'", '"') or (
        isinstance(data.get("pre_tokenizer"), dict)
        and data["pre_tokenizer"].get("type") == "Metaspace"
        and data["pre_tokenizer"].get("prepend_scheme", "always") != "never"
    )
    return {
        KEY + "model": "llama",
        KEY + "pre": "default",
        **_lists(texts, types, size),
        KEY + "scores": _padded_scores([scores.get(id_, 0.0) for id_ in range(size)], size),
        KEY + "add_space_prefix": prefixed,
        **({} if unknown is None else {KEY + "unknown_token_id": unknown}),
    }


def pre_tokenizer(described: Any, ignore_merges: bool) -> str:
    """The name in `tokenizer.ggml.pre` of a pre-tokenizer as tokenizer.json describes it. Raises
    `UnsupportedModelError` for one that no name stands for."""
    from haomiao.text.pretokenizers import PreTokenizer

    steps = described.get("pretokenizers", [described]) if isinstance(described, dict) else []
    gpt2 = PRE_TOKENIZERS["gpt-2"].patterns
    patterns: list[str] = []
    for step in steps:
        kind = step.get("type")
        if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append(step.get("pattern", {}).get("Regex"))
        elif kind == "Digits" and step.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            patterns += gpt2 if step.get("use_regex", True) else ()
        else:
            raise UnsupportedModelError(f"pre-tokenizer {str(kind)[:40]!r} cannot be exported to GGUF")
    wanted = PreTokenizer(tuple(patterns), ignore_merges=ignore_merges)
    for name, known in PRE_TOKENIZERS.items():
        if (known.patterns, known.ignore_merges) == (wanted.patterns, wanted.ignore_merges) and known.byte_level:
            return name
    raise UnsupportedModelError("llama.cpp has no name for this tokenizer's way of cutting words")


def _lists(texts: Mapping[int, str], types: Mapping[int, int], size: int) -> dict[str, Value]:
    """Tokens and types for every id of the model; those that the tokenizer lacks are unused."""
    return {
        KEY + "tokens": [texts.get(id_, f"[PAD{id_}]") for id_ in range(size)],
        KEY + "token_type": np.array([types.get(id_, int(PieceType.UNUSED)) for id_ in range(size)], np.int32),
    }


def _padded_scores(scores: Sequence[float], size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array([*scores, *[0.0] * (size - len(scores))], np.float32)


def _specials(tokenizer: Tokenizer) -> dict[str, Value]:
    found: dict[str, Value] = {
        KEY + "add_bos_token": tokenizer.add_bos,
        KEY + "add_eos_token": bool(tokenizer.suffix_ids),
    }
    if tokenizer.bos_id is not None:
        found[KEY + "bos_token_id"] = tokenizer.bos_id
    for key, id_ in zip(("eos_token_id", "eot_token_id"), tokenizer.eos_ids, strict=False):
        found[KEY + key] = id_
    padding = tokenizer.token_id(tokenizer.declared_tokens.get("pad_token", ""))
    if padding is not None:
        found[KEY + "padding_token_id"] = padding
    if tokenizer.chat_template is not None:
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found
