"""Building `tokenizers.Tokenizer` objects from vocabularies. Knows nothing about files.

For BPE and WordPiece they are exact. For vocabularies of scored pieces they are the nearest that the library can do
(`segmenting` says where they differ); they serve as tokenizer.json for other programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from haomiao.errors import ModelError
from haomiao.text.decoding import SPACE, byte_alphabet
from haomiao.text.parts import guarded
from haomiao.text.pretokenizers import PreTokenizer
from haomiao.text.vocabulary import PieceType, Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

Merges = list[tuple[str, str]]


def bpe(ids: dict[str, int], merges: Merges, kind: PreTokenizer, name: str) -> Backend:
    """Byte-level BPE, or BPE over characters with byte fallback, cut as `kind` says.

    Raises `ModelError` for merges that refer to tokens which do not exist.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    for left, right in merges:
        if left not in ids or right not in ids or left + right not in ids:
            raise ModelError(f"{name}: merge {left[:40]!r} + {right[:40]!r} refers to a token that does not exist")
    with guarded(f"{name}: the library refuses the vocabulary"):
        model = models.BPE(ids, merges, ignore_merges=kind.ignore_merges, byte_fallback=not kind.byte_level)
        backend = Tokenizer(model)
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in kind.patterns]
        if kind.byte_level:
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
            backend.decoder = decoders.ByteLevel()
            return backend
        if kind.drop_spaces:
            backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            backend.decoder = decoders.Fuse()
            return backend
        backend.normalizer = normalizers.Replace(" ", SPACE)
        backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
        backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def word_piece(ids: dict[str, int], unk: str, lowercase: bool, strip_accents: bool, name: str) -> Backend:
    """BERT's tokenizer; continuations begin with `##`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    with guarded(f"{name}: the library refuses the vocabulary"):
        backend = Tokenizer(models.WordPiece(ids, unk_token=unk, max_input_chars_per_word=100))
        backend.normalizer = normalizers.BertNormalizer(strip_accents=strip_accents, lowercase=lowercase)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(cleanup=False)
    return backend


def scored(vocabulary: Vocabulary, unigram: bool) -> Backend:
    """The nearest tokenizer of the library to a vocabulary of scored pieces."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokens = vocabulary.tokens
    fallback = PieceType.BYTE in vocabulary.types
    unk = None if vocabulary.unk_id is None else tokens[vocabulary.unk_id]
    with guarded("the library refuses the vocabulary"):
        if unigram:
            pairs = [(token, float(score)) for token, score in zip(tokens, vocabulary.scores, strict=True)]
            backend = Tokenizer(models.Unigram(pairs, unk_id=vocabulary.unk_id, byte_fallback=fallback))
        else:
            ids = {token: id_ for id_, token in enumerate(tokens)}
            model = models.BPE(
                ids, merges_of(vocabulary), unk_token=unk, fuse_unk=True, byte_fallback=fallback, ignore_merges=False
            )
            backend = Tokenizer(model)
        steps: list[normalizers.Normalizer] = []
        if vocabulary.charsmap:
            steps.append(normalizers.Precompiled(vocabulary.charsmap))
        if vocabulary.remove_extra_whitespaces:
            steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
        if unigram:
            scheme = "always" if vocabulary.add_dummy_prefix else "never"
            backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme)
        else:
            if vocabulary.add_dummy_prefix:
                steps.append(normalizers.Prepend(SPACE))
            steps.append(normalizers.Replace(" ", SPACE))
        backend.normalizer = normalizers.Sequence(steps) if steps else None
        decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if vocabulary.add_dummy_prefix:
            decoding.append(decoders.Strip(" ", 1, 0))
        backend.decoder = decoders.Sequence(decoding)
        add_special(backend, tokens, vocabulary.types)
    return backend


def merges_of(vocabulary: Vocabulary) -> Merges:
    """Merges in the order in which SentencePiece BPE would make them: by the merged piece's score."""
    types, scores = vocabulary.types, vocabulary.scores
    usable = {token for id_, token in enumerate(vocabulary.tokens) if types[id_] == PieceType.NORMAL}
    order = sorted(
        (id_ for id_, token in enumerate(vocabulary.tokens) if token in usable and len(token) > 1),
        key=lambda id_: -scores[id_],
    )
    merges: Merges = []
    for id_ in order:
        token = vocabulary.tokens[id_]
        halves = ((token[:at], token[at:]) for at in range(1, len(token)))
        merges += [pair for pair in halves if pair[0] in usable and pair[1] in usable]
    return merges


def add_special(backend: Backend, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Tell the library which tokens are special and which are matched before anything else."""
    from tokenizers import AddedToken

    special = [tokens[id_] for id_, type_ in enumerate(types) if type_ in (PieceType.CONTROL, PieceType.UNKNOWN)]
    defined = [tokens[id_] for id_, type_ in enumerate(types) if type_ == PieceType.USER_DEFINED]
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in defined])


def surround(backend: Backend, prefix: Sequence[int], suffix: Sequence[int]) -> None:
    """Make the backend itself put these ids first and last, for programs that read its tokenizer.json."""
    from tokenizers import processors

    def named(ids: Sequence[int]) -> list[str]:
        return [text for id_ in ids if (text := backend.id_to_token(id_)) is not None]

    first, last = named(prefix), named(suffix)
    if not first and not last:
        return
    ids = [(text, backend.token_to_id(text)) for text in dict.fromkeys(first + last)]
    with guarded("post-processor"):
        template = processors.TemplateProcessing(single=[*first, "$A", *last], special_tokens=ids)
        byte_level = processors.ByteLevel(trim_offsets=False)
        backend.post_processor = processors.Sequence([byte_level, template])


def spell(data: bytes) -> str:
    """Bytes in GPT-2's printable characters."""
    characters = {byte: character for character, byte in byte_alphabet().items()}
    return "".join(characters[byte] for byte in data)
