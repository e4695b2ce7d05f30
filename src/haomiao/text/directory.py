"""Tokenizers in Hugging Face's manner: a tokenizer.json, the files beside it, and vocab.json with merges.txt.

Knows nothing about GGUF. Says which tokens are special, which end an answer, and what stands first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haomiao.errors import ModelError, UnsupportedModelError
from haomiao.text.decoding import greatest_id
from haomiao.text.files import parse_object, read_bytes, read_object
from haomiao.text.parts import MAX_TOKEN_ID, Parts, guarded

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from haomiao.text.vocabulary import Vocabulary

END_TEXTS = (
    "</s>",
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<eos>",
    "<end_of_turn>",
)
"""Special tokens that end an answer by convention; asked only where no file declares any."""
MAX_TEMPLATE_BYTES = 1 << 20


def from_json(data: bytes, name: str) -> Backend:
    """The library's tokenizer from the text of a tokenizer.json, without truncation, padding or dropout."""
    from tokenizers import Tokenizer as Backend

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{name}: not UTF-8 at byte {error.start}") from error
    with guarded(f"{name}: not a tokenizer"):
        backend = Backend.from_str(text)
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None
    check_ids(backend, name)
    return backend


def check_ids(backend: Backend, name: str) -> None:
    """Refuse a vocabulary that is empty or whose ids are absurd."""
    greatest = greatest_id(backend)
    if greatest < 0:
        raise ModelError(f"{name}: the vocabulary is empty")
    if greatest > MAX_TOKEN_ID:
        raise ModelError(f"{name}: token id {greatest} is beyond {MAX_TOKEN_ID}")


def load_json(path: Path) -> Parts:
    """A tokenizer.json and what lies beside it."""
    backend = from_json(read_bytes(path), path.name)
    return complete(Parts(backend), path.parent)


def load_table(directory: Path) -> Parts | None:
    """What a conversion prepared of the tokenizer.json in `directory`: ready at once, the library's tokenizer only when
    it is asked for. None if there is no table, or one of other files. Raises `ModelError`."""
    from haomiao.text import table

    path = directory / "tokenizer.json"
    if not path.is_file() or not (directory / table.FILE).is_file():
        return None
    declared = directory / "tokenizer_config.json"
    found = table.open_table(
        directory / table.FILE, read_bytes(path), read_bytes(declared) if declared.is_file() else b""
    )
    if found is None:
        return None
    from haomiao.text.merging import MergeEncoder

    def build() -> Backend:
        backend = from_json(read_bytes(path), path.name)
        add_declared(backend, read_object(declared))
        return backend

    encoder = MergeEncoder(found)
    parts = Parts(quick=(found, encoder), build=build)
    parts.prefix, parts.suffix = encoder.around
    return complete(parts, directory)


def load_model(path: Path) -> Parts:
    """A tokenizer.model (SentencePiece) and what lies beside it."""
    from haomiao.text.pieces import scored_parts
    from haomiao.text.sentencepiece_model import parse

    model = parse(read_bytes(path), path.name)
    config = read_object(path.parent / "tokenizer_config.json")
    restore_flags(model.vocabulary, config)
    parts = scored_parts(model)
    parts.bos_id = model.bos_id
    parts.prefix = (model.bos_id,) if model.bos_id is not None and not model.unigram else ()
    parts.suffix = (model.eos_id,) if model.eos_id is not None and model.unigram else ()
    return complete(parts, path.parent, default_eos=model.eos_id)


def load_vocab(vocab: Path, merges: Path) -> Parts:
    """Byte-level BPE from vocab.json and merges.txt (GPT-2's encoder.json and vocab.bpe), cut as the class says."""
    from haomiao.text import library
    from haomiao.text.pretokenizers import CLASS_NAMES, PRE_TOKENIZERS

    ids = parse_object(read_bytes(vocab), vocab.name)
    if not ids or not all(type(id_) is int and 0 <= id_ <= MAX_TOKEN_ID for id_ in ids.values()):
        raise ModelError(f"{vocab.name}: not a vocabulary of tokens and ids")
    if len(set(ids.values())) != len(ids):
        raise ModelError(f"{vocab.name}: two tokens have the same id")
    try:
        lines = read_bytes(merges).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ModelError(f"{merges.name}: not UTF-8 at byte {error.start}") from error
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        left, space, right = line.rstrip("\r").partition(" ")
        if not space or not left or not right:
            raise ModelError(f"{merges.name}: line {number} is not two tokens")
        pairs.append((left, right))
    config = read_object(vocab.parent / "tokenizer_config.json")
    class_name = config.get("tokenizer_class", "GPT2Tokenizer")
    kind = CLASS_NAMES.get(class_name) if isinstance(class_name, str) else None
    if kind is None:
        raise UnsupportedModelError(f"{vocab.parent}: {str(class_name)[:60]!r} needs a tokenizer.json")
    backend = library.bpe(ids, pairs, PRE_TOKENIZERS[kind], vocab.name)
    if kind == "qwen2":
        from tokenizers import normalizers

        backend.normalizer = normalizers.NFC()
    if "<|endoftext|>" in ids:
        backend.add_special_tokens(["<|endoftext|>"])
    for text, id_ in sorted(read_object(vocab.parent / "added_tokens.json").items(), key=lambda item: str(item[1])):
        if backend.token_to_id(text) is None and id_ == backend.get_vocab_size(with_added_tokens=True):
            backend.add_special_tokens([text])
    check_ids(backend, vocab.name)
    return complete(Parts(backend), vocab.parent)


def restore_flags(vocabulary: Vocabulary, config: Mapping[str, Any]) -> None:
    """What `saving` wrote because tokenizer.model cannot say it."""
    marker = config.get("haomiao")
    flags = marker.get("flags") if isinstance(marker, dict) else None
    if not isinstance(flags, dict):
        return
    vocabulary.raw_user_defined = flags.get("raw_user_defined") is True
    listed = flags.get("rstrip_ids")
    if isinstance(listed, list):
        vocabulary.rstrip_ids = frozenset(id_ for id_ in listed if type(id_) is int)


def complete(parts: Parts, directory: Path, default_eos: int | None = None) -> Parts:
    """Add what the other files of `directory` say: BOS, EOS, the chat template."""
    config = read_object(directory / "tokenizer_config.json")
    special_map = read_object(directory / "special_tokens_map.json")
    generation = read_object(directory / "generation_config.json")
    model = read_object(directory / "config.json")
    parts.config, parts.generation_config = config, generation
    backend = parts.backend
    if backend is not None:
        add_declared(backend, config)
        surround(parts, backend)
        added = backend.get_added_tokens_decoder()
        specials = {token.content: id_ for id_, token in added.items() if token.special}
        parts.special_ids = frozenset(specials.values())
        id_of: Callable[[str], int | None] = backend.token_to_id
        text_of: Callable[[int], str | None] = backend.id_to_token
    elif parts.quick is not None:
        _, quick = parts.quick
        specials = {token.content: id_ for id_, token in quick.added.items() if token.special}
        parts.special_ids = frozenset(specials.values())
        id_of, text_of = quick.id_of, quick.text_of
    else:
        tokens = parts.tokens or ()
        known = {token: id_ for id_, token in enumerate(tokens)}
        specials = {tokens[id_]: id_ for id_ in parts.special_ids}
        id_of = known.get
        text_of = dict(enumerate(tokens)).get

    def named(key: str) -> int | None:
        for source in (config, special_map):
            text = content_of(source.get(key))
            if text is not None:
                return id_of(text)
        return None

    sources = (generation, model)
    bos = named("bos_token")
    if bos is None and "bos_token" not in config:
        declared = [id_ for source in sources for id_ in ids_of(source.get("bos_token_id"), text_of)]
        bos = declared[0] if declared else parts.bos_id
        if bos is None and parts.prefix:
            bos = parts.prefix[0]
    parts.bos_id = bos
    apply_flags(parts, config, eos_id=named("eos_token"))
    eos = [id_ for source in sources for id_ in ids_of(source.get("eos_token_id"), text_of)]
    eos += [id_ for id_ in (named("eos_token"),) if id_ is not None]
    if not eos:
        eos = [specials[text] for text in END_TEXTS if text in specials]
    if not eos and default_eos is not None:
        eos = [default_eos]
    parts.eos_ids = tuple(dict.fromkeys(eos))
    parts.chat_template = template_of(directory, config)
    return parts


def add_declared(backend: Backend, config: Mapping[str, Any]) -> None:
    """Make sure that the added tokens which tokenizer_config.json declares exist with the ids that it gives them.

    Files written by older tools leave tokens out of tokenizer.json; ids that could not be honoured are refused.
    """
    from tokenizers import AddedToken

    declared = config.get("added_tokens_decoder")
    if not isinstance(declared, dict):
        return
    known = backend.get_added_tokens_decoder()
    missing: list[tuple[int, dict[str, Any]]] = []
    for key, token in declared.items():
        if isinstance(token, dict) and isinstance(token.get("content"), str) and str(key).isdecimal():
            id_ = int(key) if len(key) <= 9 else MAX_TOKEN_ID + 1
            if id_ > MAX_TOKEN_ID:
                raise ModelError(f"tokenizer_config.json: token id {key[:20]} is beyond {MAX_TOKEN_ID}")
            if id_ not in known and token["content"]:
                missing.append((id_, token))
    for id_, token in sorted(missing, key=lambda pair: pair[0]):
        at = backend.token_to_id(token["content"])
        following = backend.get_vocab_size(with_added_tokens=True)
        if at != (None if id_ == following else id_):
            continue  # the file contradicts tokenizer.json, which is what the model was run with
        flags = {flag: bool(token.get(flag)) for flag in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        with guarded("tokenizer_config.json: added token"):
            backend.add_tokens([AddedToken(token["content"], **flags)])


def surround(parts: Parts, backend: Backend) -> None:
    """Find what the post-processor puts first and last, so that BOS and EOS are ours to add."""
    with guarded("post-processor"):
        bare = backend.encode("a", add_special_tokens=False).ids
        full = backend.encode("a", add_special_tokens=True).ids
    if len(full) > len(bare) and bare:
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                parts.prefix, parts.suffix = tuple(full[:start]), tuple(full[start + len(bare) :])
                return


def apply_flags(parts: Parts, config: Mapping[str, Any], eos_id: int | None) -> None:
    """`add_bos_token` and `add_eos_token`, where they are declared, overrule the post-processor."""
    bos, eos = config.get("add_bos_token"), config.get("add_eos_token")
    if parts.bos_id is not None:
        if bos is True and parts.bos_id not in parts.prefix:
            parts.prefix = (parts.bos_id, *parts.prefix)
        elif bos is False:
            parts.prefix = tuple(id_ for id_ in parts.prefix if id_ != parts.bos_id)
    if eos_id is not None:
        if eos is True and eos_id not in parts.suffix:
            parts.suffix = (*parts.suffix, eos_id)
        elif eos is False:
            parts.suffix = tuple(id_ for id_ in parts.suffix if id_ != eos_id)


def content_of(token: Any) -> str | None:
    """The text of a special token: a string, or an object that holds it."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def ids_of(value: Any, text_of: Callable[[int], str | None]) -> Iterable[int]:
    """Token ids of a config value that is an id, a list of ids, or nothing, as far as they are in the vocabulary."""
    values = value if isinstance(value, list) else [value]
    for id_ in values[:1024]:
        if type(id_) is int and 0 <= id_ <= MAX_TOKEN_ID and text_of(id_) is not None:
            yield id_


def template_of(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: chat_template.jinja, else the default one of tokenizer_config.json. Raises `ModelError`."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return read_bytes(path, MAX_TEMPLATE_BYTES).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{path.name}: not UTF-8 at byte {error.start}") from error
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        return None
    if len(source) > MAX_TEMPLATE_BYTES:
        raise ModelError(f"tokenizer_config.json: the chat template is larger than {MAX_TEMPLATE_BYTES} bytes")
    return source
