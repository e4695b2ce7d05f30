"""Text for calibration and measurement: cut into samples of token ids, part of it held out. Knows text, not models.

Every `HOLD_EVERY`-th sample is kept for measuring, so that what a run reports about its error was not fitted to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from haomiao.errors import InputError
from haomiao.types import I32

DEFAULT_TEXTS = ("en.txt", "zh.txt")
FOLDER = Path(__file__).resolve().parent.parent / "assets" / "calibration"
MAX_BYTES = 256 << 20
CHARACTERS_PER_TOKEN = 8
"""Enough text for a sample in any language and vocabulary; what is too much is cut off."""
HOLD_EVERY = 4
LEAST_LENGTH = 16


@dataclass(frozen=True)
class Samples:
    """Token ids for calibration [samples, length] and for measuring [held, length], and what they are taken from."""

    calibration: I32
    held_out: I32
    described: list[dict[str, Any]]


def read_texts(paths: Sequence[str | Path]) -> dict[str, str]:
    """The texts by name; none given: the default inside the package. Raises `InputError` with one line."""
    found: dict[str, str] = {}
    for path in [Path(p) for p in paths] or [FOLDER / name for name in DEFAULT_TEXTS]:
        try:
            if path.stat().st_size > MAX_BYTES:
                raise InputError(f"calibration text {path} is larger than {MAX_BYTES >> 20} MiB", param="text")
            text = path.read_text(encoding="utf-8")
        except OSError as wrong:
            raise InputError(f"calibration text {path} cannot be read ({wrong.strerror})", param="text") from None
        except UnicodeDecodeError as wrong:
            raise InputError(f"calibration text {path} is not UTF-8 (byte {wrong.start})", param="text") from None
        name = path.name if path.name not in found else str(path)
        found[name] = text
    return found


def take_samples(
    texts: dict[str, str], encode: Callable[[str], list[int]], *, samples: int, held: int, length: int
) -> Samples:
    """At most `samples` calibration samples and `held` held-out ones of `length` tokens, evenly from every text.

    Short texts give fewer; nothing is repeated. Raises `InputError` if there is not even one of each.
    """
    if length < LEAST_LENGTH:
        raise InputError(f"a calibration sample needs at least {LEAST_LENGTH} tokens, not {length}", param="length")
    wanted = -(-(samples + held) // max(1, len(texts)))
    kept: list[list[list[int]]] = []
    described = []
    for name, text in texts.items():
        windows = _windows(text, encode, wanted, length)
        kept.append(windows)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        described.append({"name": name, "sha256": digest, "samples": len(windows)})
    # texts alternate, so that both parts hold all of them
    mixed = [windows[i] for i in range(wanted) for windows in kept if i < len(windows)]
    every = max(2, min(HOLD_EVERY, (samples + held) // max(1, held)))
    measured = [i for i in range(len(mixed)) if i // max(1, len(texts)) % every == every - 1][:held]
    if not measured and len(mixed) > 1:
        measured = [len(mixed) - 1]
    chosen = set(measured)
    calibration = [mixed[i] for i in range(len(mixed)) if i not in chosen][:samples]
    if not calibration or not measured:
        raise InputError(
            f"the calibration text gives {len(mixed)} samples of {length} tokens; more text or a smaller length",
            param="text",
        )
    return Samples(np.array(calibration, np.int32), np.array([mixed[i] for i in measured], np.int32), described)


def _windows(text: str, encode: Callable[[str], list[int]], wanted: int, length: int) -> list[list[int]]:
    """At most `wanted` windows of exactly `length` tokens, evenly spread, none overlapping."""
    span = length * CHARACTERS_PER_TOKEN
    if len(text) > 2 * wanted * span:  # a long text is not tokenized whole
        starts = [i * len(text) // wanted for i in range(wanted)]
        parts = (encode(text[start : start + span]) for start in starts)
        return [ids[:length] for ids in parts if len(ids) >= length]
    ids = encode(text)
    count = len(ids) // length
    chosen = dict.fromkeys(int(i) for i in np.linspace(0, max(count - 1, 0), min(wanted, count)))
    return [ids[i * length : (i + 1) * length] for i in chosen]
