"""What every kind of tokenizer file becomes before `Tokenizer` wraps it, and the guards around the library.

Knows nothing about where the files came from. The `tokenizers` library reports errors as bare `Exception` and, for
some malformed input, as a panic that is not even an `Exception`: `guarded` turns both into one clear line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from haomiao.errors import HaomiaoError, ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from haomiao.text.merging import MergeEncoder
    from haomiao.text.table import Table

MAX_TOKEN_ID = (1 << 24) - 1
"""No known vocabulary comes near 16 million tokens; a greater id would make masks and tables of absurd sizes."""
MAX_FILE_BYTES = 256 << 20
"""Largest tokenizer file that is read; the largest known is about 35 MB."""


class Encoder(Protocol):
    """A segmentation algorithm that the library cannot express exactly."""

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of `text` without BOS or EOS; special tokens in it are recognised only if `special`."""
        ...


@dataclass(slots=True)
class Parts:
    """A tokenizer taken apart. Ids are checked against the vocabulary by whoever fills this in."""

    backend: Backend | None = None
    build: Callable[[], Backend] | None = None
    """Makes the backend where it is only needed by those who ask for it."""
    encoder: Encoder | None = None
    """Encodes instead of the backend where set; the backend is then the nearest that the library can do."""
    quick: tuple[Table, MergeEncoder] | None = None
    """Gives the backend's ids until somebody needs the backend itself (`build`)."""
    tokens: Sequence[str] | None = None
    """The vocabulary where `encoder` is set."""
    prefix: tuple[int, ...] = ()
    """Ids put first when special tokens are asked for (BOS, CLS)."""
    suffix: tuple[int, ...] = ()
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    special_ids: frozenset[int] = frozenset()
    matched_ids: frozenset[int] = frozenset()
    """Tokens of `tokens` that are not special but are matched before segmentation."""
    chat_template: str | None = None
    token_bytes: Mapping[int, bytes] = field(default_factory=dict)
    """Bytes of tokens where the general rule of the decoder would be wrong."""
    strip_leading_space: bool | None = None
    """Whether one space is dropped from the very start of decoded text; None lets the decoder's description say."""
    config: dict[str, Any] = field(default_factory=dict)
    """tokenizer_config.json as it was found, or what stands for it."""
    generation_config: dict[str, Any] = field(default_factory=dict)
    exact_model: Callable[[], bytes] | None = None
    """A SentencePiece model file that says what `encoder` does; saved beside tokenizer.json."""
    exact_flags: dict[str, Any] = field(default_factory=dict)
    """What such a file cannot say."""


def labels_of(config: Mapping[str, Any]) -> dict[str, int]:
    """The codes of labels that tokenizer_config.json holds (`haomiao.labels`); none where that is not what it should
    be: different tokens for texts that are not empty."""
    marker = config.get("haomiao")
    found = marker.get("labels") if isinstance(marker, dict) else None
    if not isinstance(found, dict) or not all(found) or len(set(map(str, found.values()))) < len(found):
        return {}
    return dict(found) if all(type(id_) is int and 0 <= id_ <= MAX_TOKEN_ID for id_ in found.values()) else {}


def label_prompt_of(config: Mapping[str, Any]) -> str:
    """The prompt whose labels these are, `{text}` standing for the text; plain text where the file does not say."""
    marker = config.get("haomiao")
    found = marker.get("prompt") if isinstance(marker, dict) else None
    return found if isinstance(found, str) and "{text}" in found else "{text}"


@contextmanager
def guarded(what: str, error: type[HaomiaoError] = ModelError) -> Iterator[None]:
    """Turn whatever the library throws into `error("what: reason")`; our own errors pass unchanged."""
    try:
        yield
    except HaomiaoError:
        raise
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as reason:
        text = str(reason) or type(reason).__name__
        raise error(f"{what}: {text[:300]}") from reason
