"""Tokenizers in Hugging Face's manner: a tokenizer.json, the files beside it, and vocab.json with merges.txt.

Knows nothing about GGUF. Says which tokens are special, which end an answer, and what stands first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haomiao.errors import ModelError
from haomiao.text.files import read_bytes, read_object
from haomiao.text.parts import MAX_TOKEN_ID, Parts, guarded

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

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
    added = backend.get_added_tokens_decoder()
    size = backend.get_vocab_size(with_added_tokens=False)
    if size + len(added) == 0:
        raise ModelError(f"{name}: the vocabulary is empty")
    # Ids of a model's own vocabulary are dense in every honest file; only then is its size a bound for them.
    greatest = max(max(added, default=0), size - 1)
    if greatest > MAX_TOKEN_ID:
        raise ModelError(f"{name}: token id {greatest} is beyond {MAX_TOKEN_ID}")


def load_json(path: Path) -> Parts:
    """A tokenizer.json and what lies beside it."""
    return complete(from_json(read_bytes(path), path.name), path.parent)


def complete(backend: Backend, directory: Path) -> Parts:
    """Add what the other files of `directory` say: BOS, EOS, the chat template."""
    config = read_object(directory / "tokenizer_config.json")
    special_map = read_object(directory / "special_tokens_map.json")
    generation = read_object(directory / "generation_config.json")
    model = read_object(directory / "config.json")
    add_declared(backend, config)
    parts = Parts(backend, config=config, generation_config=generation)
    added = backend.get_added_tokens_decoder()
    specials = {token.content: id_ for id_, token in added.items() if token.special}
    parts.special_ids = frozenset(specials.values())

    def named(key: str) -> int | None:
        for source in (config, special_map):
            text = content_of(source.get(key))
            if text is not None:
                return backend.token_to_id(text)
        return None

    surround(parts)
    sources = (generation, model)
    parts.bos_id = named("bos_token")
    if parts.bos_id is None and "bos_token" not in config:
        declared = [id_ for source in sources for id_ in ids_of(source.get("bos_token_id"), backend)]
        parts.bos_id = declared[0] if declared else (parts.prefix[0] if parts.prefix else None)
    apply_flags(parts, config, eos_id=named("eos_token"))
    eos = [id_ for source in sources for id_ in ids_of(source.get("eos_token_id"), backend)]
    if (end := named("eos_token")) is not None:
        eos.append(end)
    if not eos:
        eos = [specials[text] for text in END_TEXTS if text in specials]
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
        if (at is None and id_ != following) or (at is not None and at != id_):
            continue  # the file contradicts tokenizer.json, which is what the model was run with
        flags = {flag: bool(token.get(flag)) for flag in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        with guarded("tokenizer_config.json: added token"):
            backend.add_tokens([AddedToken(token["content"], **flags)])


def surround(parts: Parts) -> None:
    """Find what the post-processor puts first and last, so that BOS and EOS are ours to add."""
    with guarded("post-processor"):
        bare = parts.backend.encode("a", add_special_tokens=False).ids
        full = parts.backend.encode("a", add_special_tokens=True).ids
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


def ids_of(value: Any, backend: Backend) -> Iterable[int]:
    """Token ids of a config value that is an id, a list of ids, or nothing; what is not in the vocabulary is left out."""
    values = value if isinstance(value, list) else [value]
    for id_ in values[:1024]:
        if type(id_) is int and 0 <= id_ <= MAX_TOKEN_ID and backend.id_to_token(id_) is not None:
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
