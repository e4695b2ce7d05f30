"""SentencePiece's tokenizer.model: a protobuf message, read and written without the protobuf library.

Knows nothing about segmentation. Field numbers are SentencePiece's (`sentencepiece_model.proto`): pieces 1 {piece 1,
score 2, type 3}, trainer_spec 2 {model_type 3, treat_whitespace_as_suffix 24, byte_fallback 35, unk_id 40, bos_id 41,
eos_id 42, pad_id 43}, normalizer_spec 3 {precompiled_charsmap 2, add_dummy_prefix 3, remove_extra_whitespaces 4,
escape_whitespaces 5}. Wire format: varint tags, types 0 (varint), 1 (64 bits), 2 (length and bytes), 5 (32 bits).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from haomiao.errors import ModelError, UnsupportedModelError
from haomiao.text.vocabulary import PieceType, Vocabulary

UNIGRAM, BPE = 1, 2
_KINDS = {UNIGRAM: "unigram", BPE: "BPE", 3: "word", 4: "char"}
_MAX_PIECES = 1 << 21


@dataclass(slots=True)
class SentencePieceModel:
    """What the file says."""

    vocabulary: Vocabulary
    unigram: bool
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None


def parse(data: bytes, name: str) -> SentencePieceModel:
    """Read a model. Raises `ModelError`, or `UnsupportedModelError` for the word and char types."""
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for field, value in _fields(data, name):
        if field == 1:
            piece = dict(_fields(_bytes(value, name), name))
            tokens.append(_text(piece.get(1, b""), name, len(tokens)))
            scores.append(_float(piece.get(2, 0), name))
            types.append(_int(piece.get(3, PieceType.NORMAL), name))
            if len(tokens) > _MAX_PIECES:
                raise ModelError(f"{name}: more than {_MAX_PIECES} pieces")
        elif field == 2:
            trainer.update(_fields(_bytes(value, name), name))
        elif field == 3:
            normalizer.update(_fields(_bytes(value, name), name))
    kind = _int(trainer.get(3, UNIGRAM), name)
    if kind not in (UNIGRAM, BPE):
        raise UnsupportedModelError(f"{name}: SentencePiece type {_KINDS.get(kind, kind)} is not supported")

    def declared(field: int, default: int) -> int | None:
        id_ = _signed(_int(trainer.get(field, default), name))
        if id_ >= len(tokens):
            raise ModelError(f"{name}: special token id {id_} is outside the vocabulary of {len(tokens)}")
        return id_ if id_ >= 0 else None

    unknown = [id_ for id_, type_ in enumerate(types) if type_ == PieceType.UNKNOWN]
    charsmap = normalizer.get(2, b"")
    vocabulary = Vocabulary(
        tokens,
        types,
        scores,
        unk_id=unknown[0] if unknown else None,
        charsmap=_bytes(charsmap, name),
        add_dummy_prefix=bool(_int(normalizer.get(3, 1), name)),
        remove_extra_whitespaces=bool(_int(normalizer.get(4, 1), name)),
        whitespace_as_suffix=bool(_int(trainer.get(24, 0), name)),
    )
    vocabulary.check(name)
    return SentencePieceModel(vocabulary, kind == UNIGRAM, declared(41, 1), declared(42, 2), declared(43, -1))


def serialize(model: SentencePieceModel) -> bytes:
    """The file of a model; `parse` gives the same model back (`raw_user_defined` and `rstrip_ids` are not in it)."""
    vocabulary = model.vocabulary
    out = bytearray()
    for token, score, type_ in zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True):
        piece = _field_bytes(1, token.encode("utf-8")) + b"\x15" + struct.pack("<f", score)
        if type_ != PieceType.NORMAL:
            piece += _field_int(3, int(type_))
        out += _field_bytes(1, piece)
    byte_fallback = PieceType.BYTE in vocabulary.types
    trainer = _field_int(3, UNIGRAM if model.unigram else BPE) + _field_int(24, int(vocabulary.whitespace_as_suffix))
    trainer += _field_int(35, int(byte_fallback))
    for field, id_ in ((40, vocabulary.unk_id), (41, model.bos_id), (42, model.eos_id), (43, model.pad_id)):
        trainer += _field_int(field, -1 if id_ is None else id_)
    normalizer = _field_bytes(1, b"haomiao") + _field_bytes(2, vocabulary.charsmap)
    normalizer += _field_int(3, int(vocabulary.add_dummy_prefix))
    normalizer += _field_int(4, int(vocabulary.remove_extra_whitespaces)) + _field_int(5, 1)
    return bytes(out + _field_bytes(2, trainer) + _field_bytes(3, normalizer))


# ---- wire format ----------------------------------------------------------------------------------------------------


def _fields(data: bytes, name: str) -> Iterator[tuple[int, int | bytes]]:
    """Field number and value, in order; 32- and 64-bit values come as their bytes."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at, name)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at, name)
            yield field, value
            continue
        if wire == 2:
            size, at = _varint(data, at, name)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ModelError(f"{name}: not a SentencePiece model (wire type {wire} at byte {at})")
        if size > end - at:
            raise ModelError(f"{name}: truncated, or not a SentencePiece model ({size} bytes wanted at {at})")
        yield field, data[at : at + size]
        at += size


def _varint(data: bytes, at: int, name: str) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
    raise ModelError(f"{name}: truncated, or not a SentencePiece model (byte {at})")


def _bytes(value: int | bytes, name: str) -> bytes:
    if not isinstance(value, bytes):
        raise ModelError(f"{name}: not a SentencePiece model (a number where a message belongs)")
    return value


def _int(value: int | bytes, name: str) -> int:
    if isinstance(value, bytes):
        raise ModelError(f"{name}: not a SentencePiece model (bytes where a number belongs)")
    return value


def _float(value: int | bytes, name: str) -> float:
    if value == 0:
        return 0.0
    if not isinstance(value, bytes) or len(value) != 4:
        raise ModelError(f"{name}: not a SentencePiece model (a score that is not a float)")
    return float(struct.unpack("<f", value)[0])


def _text(value: int | bytes, name: str, index: int) -> str:
    try:
        text = _bytes(value, name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{name}: piece {index} is not UTF-8") from error
    if not text:
        raise ModelError(f"{name}: piece {index} is empty")
    return text


def _signed(value: int) -> int:
    """int32 as protobuf writes it: negative numbers are sign-extended to 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _encode(value: int) -> bytes:
    value &= 0xFFFFFFFFFFFFFFFF
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field_int(field: int, value: int) -> bytes:
    return _encode(field << 3) + _encode(value)


def _field_bytes(field: int, value: bytes) -> bytes:
    return _encode(field << 3 | 2) + _encode(len(value)) + value
