"""Tokenizers rebuilt from GGUF metadata, segmenting exactly as llama.cpp does.

Knows nothing about tensors. Keys and defaults are the format's (ggml, docs/gguf.md; llama.cpp, src/llama-vocab.cpp,
`llama_vocab::impl::load`). Kinds: `gpt2` and `gemma4` (BPE), `llama` (SentencePiece BPE), `t5` (unigram), `bert`
(WordPiece). Differences from llama.cpp, on purpose: control tokens are never segments of content, and tokens for
filling in the middle do not end an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from haomiao.errors import ModelError, ModelNotFoundError, UnsupportedModelError
from haomiao.text import library
from haomiao.text.decoding import SPACE
from haomiao.text.gguf_metadata import read_metadata
from haomiao.text.parts import Parts
from haomiao.text.pieces import scored_parts
from haomiao.text.pretokenizers import PRE_TOKENIZERS
from haomiao.text.sentencepiece_model import SentencePieceModel
from haomiao.text.vocabulary import PieceType, Vocabulary

KEY = "tokenizer.ggml."
_NORMAL = PieceType.NORMAL
KINDS = ("gpt2", "gemma4", "whitespace", "llama", "t5", "bert")
"""Values of `tokenizer.ggml.model` that can be rebuilt."""
_END_TEXTS = """
    <|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|>
    <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <eos> <end_of_utterance> <turn|> <|tool_response> <｜end▁of▁sentence｜>
    [e~[
"""
END_TEXTS = frozenset(_END_TEXTS.split())
"""Tokens that end an answer, whatever the file says of them (llama.cpp's end-of-generation list)."""
_DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "t5": {"eos": 1, "unknown": 2},
    "bert": {"bos": 101, "unknown": 100, "seperator": 102},
}
"""Special ids where the file names none. The format's own key is spelled `seperator`."""


def load_gguf(path: Path) -> Parts:
    """The tokenizer in a GGUF file. Raises `ModelError`, `UnsupportedModelError` for a kind that is not known,
    `ModelNotFoundError` for a file that holds none."""
    values = read_metadata(path)
    named = values.get(KEY + "model")
    if named is None:
        raise ModelNotFoundError(f"{path.name}: holds no tokenizer (no {KEY}model)")
    if isinstance(named, str) and named not in KINDS:
        raise UnsupportedModelError(f"{path.name}: tokenizer kind {named[:40]!r} is not supported")
    meta = _Metadata(values, path.name)
    kind = meta.text("model")
    if kind in ("gpt2", "gemma4", "whitespace"):
        parts = _bpe(meta, kind)
    elif kind in ("llama", "t5"):
        parts = _scored(meta, unigram=kind == "t5")
    else:
        parts = _word_piece(meta)
    parts.eos_ids = _end_ids(meta)
    template = meta.values.get("tokenizer.chat_template")
    parts.chat_template = template if isinstance(template, str) and len(template) <= 1 << 20 else None
    return parts


class _Metadata:
    """Typed access to the keys, and the lists that every kind shares."""

    def __init__(self, values: Mapping[str, Any], name: str) -> None:
        self.values = values
        self.name = name
        tokens = values.get(KEY + "tokens")
        if not isinstance(tokens, list) or not tokens:
            raise ModelError(f"{name}: holds no vocabulary ({KEY}tokens)")
        self.tokens: list[str] = []
        for index, token in enumerate(tokens):
            if not isinstance(token, str):
                raise ModelError(f"{name}: token {index} is not UTF-8")
            self.tokens.append(token or f"[EMPTY_{index}]")
        self.types = self._types()
        self.kind = self.text("model") or ""

    def _types(self) -> list[int]:
        found = self.numbers("token_type")
        if found is not None:
            return [int(type_) for type_ in found]
        return [
            int(PieceType.BYTE if len(token) == 6 and token.startswith("<0x") else PieceType.NORMAL)
            for token in self.tokens
        ]

    def text(self, key: str) -> str | None:
        value = self.values.get(KEY + key)
        if value is not None and not isinstance(value, str):
            raise ModelError(f"{self.name}: {KEY}{key} is not a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(KEY + key)
        return value if isinstance(value, bool) else default

    def numbers(self, key: str) -> list[float] | None:
        value = self.values.get(KEY + key)
        if value is None:
            return None
        if isinstance(value, (str, bytes, list)) or not hasattr(value, "tolist"):
            raise ModelError(f"{self.name}: {KEY}{key} is not a list of numbers")
        if len(value) != len(self.tokens):
            raise ModelError(f"{self.name}: {len(self.tokens)} tokens but {len(value)} values in {KEY}{key}")
        return list(value.tolist())

    def id(self, key: str) -> int | None:
        """A special token's id: what the file says, else the kind's default; None if neither is in the vocabulary."""
        value = self.values.get(f"{KEY}{key}_token_id")
        default = _DEFAULTS.get(self.kind, {}).get(key)
        for id_ in (value, default):
            if isinstance(id_, int) and 0 <= id_ < len(self.tokens):
                return id_
        return None

    def vocabulary(self) -> Vocabulary:
        """Tokens and types, checked."""
        for id_, token in enumerate(self.tokens):
            # "</s>" is markup where it is an ordinary token (Qwen's vocabulary has it)
            if token in END_TEXTS and self.types[id_] == PieceType.NORMAL and token != "</s>":
                self.types[id_] = PieceType.CONTROL
        vocabulary = Vocabulary(self.tokens, self.types, unk_id=self.id("unknown"))
        vocabulary.check(self.name)
        return vocabulary


def _specials(vocabulary: Vocabulary) -> frozenset[int]:
    return frozenset(vocabulary.of_type(PieceType.CONTROL, PieceType.UNKNOWN))


def _surround(parts: Parts, meta: _Metadata, add_bos: bool, add_eos: bool, add_sep: bool = False) -> None:
    """BOS and EOS as the file says, else as its kind does."""
    parts.bos_id = meta.id("bos")
    eos, sep = meta.id("eos"), meta.id("seperator")
    if parts.bos_id is not None and meta.flag("add_bos_token", add_bos):
        parts.prefix = (parts.bos_id,)
    if sep is not None and meta.flag("add_sep_token", add_sep):
        parts.suffix = (sep,)
    elif eos is not None and meta.flag("add_eos_token", add_eos):
        parts.suffix = (eos,)


def _bpe(meta: _Metadata, model: str) -> Parts:
    name = "gemma4" if model == "gemma4" else meta.text("pre") or "default"
    kind = PRE_TOKENIZERS.get(name)
    if kind is None:
        raise UnsupportedModelError(f"{meta.name}: pre-tokenizer {name[:40]!r} is not known")
    vocabulary = meta.vocabulary()
    listed = meta.values.get(KEY + "merges")
    if not isinstance(listed, list):
        raise ModelError(f"{meta.name}: holds no merges ({KEY}merges)")
    merges: dict[tuple[str, str], None] = {}
    for index, merge in enumerate(listed):
        at = merge.find(" ", 1) if isinstance(merge, str) else -1
        if not isinstance(merge, str) or at < 0:
            raise ModelError(f"{meta.name}: merge {index} is not two tokens")
        merges.setdefault((merge[:at], merge[at + 1 :]))
    ids = {token: id_ for id_, token in enumerate(vocabulary.tokens)}
    backend = library.bpe(ids, list(merges), kind, meta.name)
    library.add_special(backend, vocabulary.tokens, vocabulary.types)
    parts = Parts(backend, special_ids=_specials(vocabulary))
    _surround(parts, meta, kind.add_bos, add_eos=False, add_sep=kind.add_sep)
    library.surround(backend, parts.prefix, parts.suffix)
    return parts


def _word_piece(meta: _Metadata) -> Parts:
    vocabulary = meta.vocabulary()
    tokens = []
    for token, type_ in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if type_ in (PieceType.CONTROL, PieceType.UNKNOWN):
            tokens.append(token)
        else:  # the format writes word beginnings with U+2581 and continuations bare
            tokens.append(token[1:] if token.startswith(SPACE) and len(token) > 1 else "##" + token)
    ids = {token: id_ for id_, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise ModelError(f"{meta.name}: a word piece appears twice in the vocabulary")
    unk = vocabulary.unk_id
    if unk is None:
        raise ModelError(f"{meta.name}: holds no unknown token")
    lowercase = meta.flag("normalizer.lowercase", True)
    strip_accents = meta.flag("normalizer.strip_accents", lowercase)
    backend = library.word_piece(ids, tokens[unk], lowercase, strip_accents, meta.name)
    library.add_special(backend, tokens, vocabulary.types)
    parts = Parts(backend, special_ids=_specials(vocabulary))
    _surround(parts, meta, add_bos=True, add_eos=False, add_sep=True)
    library.surround(backend, parts.prefix, parts.suffix)
    return parts


def _scored(meta: _Metadata, unigram: bool) -> Parts:
    vocabulary = meta.vocabulary()
    vocabulary.scores = meta.numbers("scores") or [0.0] * len(vocabulary.tokens)
    charsmap = meta.values.get(KEY + "precompiled_charsmap") if unigram else None
    vocabulary.charsmap = charsmap.tobytes() if charsmap is not None and hasattr(charsmap, "tobytes") else b""
    vocabulary.add_dummy_prefix = meta.flag("add_space_prefix", not unigram)
    vocabulary.remove_extra_whitespaces = unigram and meta.flag("remove_extra_whitespaces", False)
    vocabulary.raw_user_defined = True
    vocabulary.rstrip_ids = _swallowing(meta, vocabulary)
    vocabulary.check(meta.name)
    parts = scored_parts(SentencePieceModel(vocabulary, unigram, meta.id("bos"), meta.id("eos"), meta.id("padding")))
    _surround(parts, meta, add_bos=not unigram, add_eos=unigram)
    return parts


def _swallowing(meta: _Metadata, vocabulary: Vocabulary) -> frozenset[int]:
    """Phi-3's special tokens swallow white space; the format has no key for it, so llama.cpp goes by the name."""
    name = meta.values.get("general.name")
    if not isinstance(name, str) or not any(part in name.lower() for part in ("phi-3", "phi3")):
        return frozenset()
    kept = {"<unk>", "<s>", "<|endoftext|>"}
    special = vocabulary.of_type(PieceType.CONTROL, PieceType.UNKNOWN, PieceType.USER_DEFINED)
    return frozenset(id_ for id_ in special if vocabulary.tokens[id_] not in kept)


def _end_ids(meta: _Metadata) -> tuple[int, ...]:
    """EOS, EOT, EOM, and the tokens that end an answer by their text."""
    named = [id_ for key in ("eos", "eot", "eom") if (id_ := meta.id(key)) is not None]
    texts = {
        token: id_
        for id_, token in enumerate(meta.tokens)
        if token in END_TEXTS and meta.types[id_] != PieceType.NORMAL
    }
    if "<|end|>" in texts and texts.keys() & {"<|call|>", "<|calls|>"} and texts.keys() & {"<|return|>", "<|flush|>"}:
        del texts["<|end|>"]  # ends a message, not the answer (harmony)
    if "<|tool_response>" in texts:
        texts.pop("</s>", None)
    return tuple(dict.fromkeys([*named, *texts.values()]))
