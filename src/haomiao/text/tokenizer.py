"""Text to token ids and back, for every file that a tokenizer comes in.

`Tokenizer(path)` reads a directory (tokenizer.json, else tokenizer.model, else vocab.json and merges.txt), one of these
files, or a GGUF file, whose metadata hold the vocabulary. Knows nothing about models or weights.

Special tokens: `encode(text)` treats `text` as content: text that looks like a special token (`<|im_end|>`) is ordinary
text, and nothing is added. `encode(text, special=True)` treats it as a prompt: special tokens are recognised, and the
model's own BOS and EOS are added as its files say (post-processor, `add_bos_token`, `tokenizer.ggml.add_bos_token`).
Added tokens that are not special (runs of spaces, GGUF's USER_DEFINED) are vocabulary and are recognised either way.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from haomiao.errors import InputError, ModelError, ModelNotFoundError
from haomiao.text import decoding
from haomiao.text.parts import Parts, guarded, label_prompt_of, labels_of

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend


class Tokenizer:
    """A tokenizer. Immutable after loading and safe to use from several threads.

    Raises `ModelNotFoundError` if there is nothing at `path`, `ModelError` for a file that is malformed or hostile,
    `UnsupportedModelError` for a well-formed tokenizer of a kind that is not supported.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        parts = load(Path(path))
        self._parts = parts
        self._encoder = parts.encoder
        self._backend = parts.backend
        self.bos_id = parts.bos_id
        self.eos_ids = parts.eos_ids
        """Ids that end an answer, the usual one first."""
        self.special_ids = parts.special_ids
        """Control tokens: never the outcome of content, left out of decoded text."""
        self.chat_template = parts.chat_template
        """Jinja source of the checkpoint's chat template, or None."""
        self.prefix_ids = parts.prefix
        """What `encode(special=True)` puts first."""
        self.suffix_ids = parts.suffix
        self.concurrent = False
        """True: other threads run while a text is encoded. The library then uses its thread pool, which processes that
        fork should not have: set TOKENIZERS_PARALLELISM=false before, and it does not."""
        self._lock = threading.Lock()  # `encode_special_tokens` is a switch of the shared backend
        self._bytes: dict[int, bytes] = dict(parts.token_bytes)
        self._ids: dict[str, int] | None = None
        self._rule = decoding.TokenBytes(None)
        self._added: dict[int, AddedToken] = {}
        self.strips_leading_space = bool(parts.strip_leading_space)
        """Decoding drops one space from the very start of the text, because encoding put it there."""
        greatest = len(parts.tokens or ()) - 1
        if self._backend is not None:
            self._rule = decoding.rule_of(self._backend)
            self._added = self._backend.get_added_tokens_decoder()
            self.strips_leading_space = self._rule.strip_leading_space
            greatest = decoding.greatest_id(self._backend)
        elif parts.quick is not None:
            table, quick = parts.quick
            decoder = table.about.get("decoder")
            self._rule = decoding.TokenBytes(decoder if isinstance(decoder, dict) else None)
            self._added = quick.added
            self.strips_leading_space = self._rule.strip_leading_space
            greatest = quick.vocab_size - 1
        self.vocab_size = greatest + 1
        """One more than the greatest id. A model's head may be larger (padded)."""
        self.labels = labels_of(parts.config)
        """Label -> the one token that a model which was fine-tuned to choose answers it with; empty for any other."""
        self.label_prompt = label_prompt_of(parts.config)
        """What it was asked with: `{text}` stands for the text that has a label."""

    @property
    def backend(self) -> Backend:
        """The library's tokenizer. Shared state: leave its settings as they are. For vocabularies of scored pieces
        (SentencePiece) it is the nearest that the library can do, made when first asked for; so is that of a tokenizer
        which was loaded from a table, and `encode` then uses it, since it is faster. A server asks at its start: making
        it takes the library half a second for a large vocabulary, in which no other thread runs."""
        if self._backend is None:
            with self._lock:
                if self._backend is None and self._parts.build is not None:
                    self._backend = self._parts.build()
        backend = self._backend
        if backend is None:
            raise ModelError("this tokenizer has no library form")
        return backend

    @property
    def segments_itself(self) -> bool:
        """True if text is segmented by an algorithm that the library does not have exactly."""
        return self._encoder is not None

    @property
    def add_bos(self) -> bool:
        """True if a prompt begins with BOS."""
        return self.bos_id is not None and self.bos_id in self.prefix_ids

    @property
    def added_tokens(self) -> dict[str, int]:
        """Text -> id of the tokens that a prompt is cut at: special ones, and those matched before segmentation."""
        if self._parts.tokens is not None:
            tokens = self._parts.tokens
            return {tokens[id_]: id_ for id_ in (*self._parts.special_ids, *self._parts.matched_ids)}
        return {token.content: id_ for id_, token in self._added.items()}

    @property
    def declared_tokens(self) -> dict[str, str]:
        """`bos_token`, `pad_token`, ... as tokenizer_config.json declares them; templates may refer to them."""
        from haomiao.text.directory import content_of

        names = [key for key in self._parts.config if key.endswith("_token")]
        return {key: text for key in names if (text := content_of(self._parts.config[key])) is not None}

    # ---- encoding ---------------------------------------------------------------------------------------------------

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`. Raises `InputError` for text that is not Unicode (a lone surrogate).

        `special=False`: content; special-token text is ordinary text, no BOS or EOS.
        `special=True`: a prompt; special tokens in it are recognised, BOS and EOS are added as the model's files say.
        """
        ids = self.encode_part(text, special)
        return [*self.prefix_ids, *ids, *self.suffix_ids] if special else ids

    def encode_part(self, text: str, special: bool) -> list[int]:
        """As `encode`, without BOS and EOS either way."""
        check_text(text)
        if self._encoder is not None:
            return self._encoder.encode(text, special)
        quick = self._encode_quickly(text, special)
        ids = self._encode_backend(text, special) if quick is None else quick
        if not special and not self.special_ids.isdisjoint(ids):
            return self._encode_apart(text)
        return ids

    def codes(self, options: Sequence[str]) -> list[list[int]] | None:
        """The one token of each option, if all of them are labels that the model was fine-tuned to choose among."""
        if not options or not all(option in self.labels for option in options):
            return None
        return [[self.labels[option]] for option in options]

    def encode_options(self, options: Sequence[str]) -> list[list[int]]:
        """Ids of what may follow a prompt: labels' codes, or else plain text."""
        return self.codes(options) or [self.encode_part(option, False) for option in options]

    def _encode_quickly(self, text: str, special: bool) -> list[int] | None:
        """Ids without the library's tokenizer, as long as nobody has asked for that; None if the text is too long."""
        if self._parts.quick is None or self._backend is not None:
            return None
        from haomiao.text.merging import TooLong

        try:
            ids = self._parts.quick[1].encode(text, special)
        except TooLong:
            return None
        return self._checked(ids)

    def _encode_backend(self, text: str, special: bool) -> list[int]:
        backend = self.backend
        with self._lock, guarded("the tokenizer cannot encode this text", InputError):
            backend.encode_special_tokens = not special
            if self.concurrent:  # the library keeps the interpreter's lock in `encode`, and drops it for batches
                ids = list(backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)
            else:
                ids = list(backend.encode(text, add_special_tokens=False).ids)
        return self._checked(ids)

    def _checked(self, ids: list[int]) -> list[int]:
        if max(ids, default=0) >= self.vocab_size:  # a vocabulary with gaps that hid its greatest id
            raise ModelError(f"the tokenizer gives token id {max(ids)}, beyond its vocabulary of {self.vocab_size}")
        return ids

    def _encode_apart(self, text: str) -> list[int]:
        """Encode content in which the vocabulary itself holds a special token's text (unigram vocabularies do).

        Each special token's text is cut after its first character, so that no segment holds one. UNK is among the
        special tokens of many files and may remain: it has no power.
        """
        import re

        texts = sorted((token.content for token in self._added.values() if token.special), key=len, reverse=True)
        pattern = re.compile("|".join(re.escape(content) for content in texts if len(content) > 1) or r"(?!)")
        ids: list[int] = []
        start = 0
        for match in pattern.finditer(text):
            ids += self._encode_backend(text[start : match.start() + 1], special=False)
            start = match.start() + 1
        return ids + self._encode_backend(text[start:], special=False)

    # ---- decoding ---------------------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`; control tokens are left out unless `skip_special` is False.

        Malformed UTF-8 becomes U+FFFD. One leading space is dropped where the tokenizer added one. Raises `InputError`
        for an id outside the vocabulary.
        """
        pieces = [self.token_bytes(id_) for id_ in ids if not (skip_special and id_ in self.special_ids)]
        data = b"".join(pieces)
        if self.strips_leading_space and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for; empty for an id that no token has. Raises `InputError` outside the vocabulary."""
        known = self._bytes.get(token_id)
        if known is not None:
            return known
        if not isinstance(token_id, int) or not 0 <= token_id < self.vocab_size:
            raise InputError(f"token id {token_id!r:.40} is outside the vocabulary of {self.vocab_size}")
        added = self._added.get(token_id)
        if added is not None:
            value = added.content.encode("utf-8", "replace")
        else:
            token = self._text_of(token_id)
            value = b"" if token is None else self._rule.of(token)
        self._bytes[token_id] = value
        return value

    def token_id(self, token: str) -> int | None:
        """The id of a token's text as the vocabulary writes it, or None."""
        if self._parts.tokens is not None:
            if self._ids is None:
                self._ids = {text: id_ for id_, text in enumerate(self._parts.tokens)}
            return self._ids.get(token)
        if self._parts.quick is not None:
            return self._parts.quick[1].id_of(token)
        return self.backend.token_to_id(token)

    def _text_of(self, token_id: int) -> str | None:
        if self._parts.quick is not None:
            return self._parts.quick[1].text_of(token_id)
        return self.backend.id_to_token(token_id)

    # ---- saving -----------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """A tokenizer.json that other programs read too."""
        return str(self.backend.to_str())

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write what `Tokenizer(directory)` needs to be this tokenizer again: tokenizer.json, tokenizer_config.json,
        chat_template.jinja if there is a template, and generation_config.json if there is none yet."""
        from haomiao.text.saving import files_of

        target = Path(directory)
        try:
            target.mkdir(parents=True, exist_ok=True)
            for name, data in files_of(self._parts, self.backend).items():
                if name == "generation_config.json" and (target / name).exists():
                    continue
                (target / name).write_bytes(data)
        except OSError as error:
            raise InputError(f"cannot write the tokenizer to {target}: {error.strerror or error}") from error


def check_text(text: str) -> None:
    """Refuse what is not Unicode text. Raises `InputError`."""
    if not isinstance(text, str):
        raise InputError(f"text must be a string, not {type(text).__name__}")
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"text holds a lone surrogate at character {error.start}, which is not Unicode") from error


def load(path: Path) -> Parts:
    """Find out what `path` is and read it."""
    from haomiao.text import directory

    if path.is_dir():
        return load_directory(path)
    if not path.exists():
        raise ModelNotFoundError(f"{path}: no such file or directory")
    if path.suffix == ".gguf":
        from haomiao.text.gguf import load_gguf

        return load_gguf(path)
    if path.suffix == ".model":
        return directory.load_model(path)
    if path.suffix == ".json":
        return directory.load_json(path)
    raise ModelError(f"{path.name}: not a tokenizer file (tokenizer.json, tokenizer.model or .gguf)")


def load_directory(path: Path) -> Parts:
    """The best tokenizer file of a directory."""
    from haomiao.text import directory
    from haomiao.text.files import read_object

    exact = path / "tokenizer.model"
    marker = read_object(path / "tokenizer_config.json").get("haomiao")
    if exact.is_file() and isinstance(marker, dict) and marker.get("tokenizer") == exact.name:
        return directory.load_model(exact)
    prepared = directory.load_table(path)
    if prepared is not None:
        return prepared
    if (path / "tokenizer.json").is_file():
        return directory.load_json(path / "tokenizer.json")
    if exact.is_file():
        return directory.load_model(exact)
    for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (path / vocab).is_file() and (path / merges).is_file():
            return directory.load_vocab(path / vocab, path / merges)
    raise ModelNotFoundError(f"{path}: holds no tokenizer.json, tokenizer.model, or vocab.json with merges.txt")
