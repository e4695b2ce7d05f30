"""Text for pretraining: read, cleaned of repetitions, and kept apart from what is held out. Knows no tokens.

A line that is long enough to matter is used once: whatever a second file or document says again is dropped, and so is
every line that held-out text contains. Licences and digests of the files are recorded where the data are written.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from haomiao.errors import InputError
from haomiao.train.settings import CorpusFile

SEPARATOR = re.compile(r"^<\|endoftext\|>$", re.MULTILINE)
LINE_MATTERS = 40
"""Characters from which a line that was seen before is dropped; 中文 says the same in a third of them."""
PAIRS_TOGETHER = 16
"""Consecutive rows of a file of pairs that make one document in each language."""
MAX_BYTES = 1 << 30


@dataclass
class Account:
    """What became of one file."""

    sha256: str = ""
    bytes: int = 0
    documents: int = 0
    lines_dropped: int = 0
    bytes_kept: int = 0
    tokens: int = 0


@dataclass
class Seen:
    """Digests of lines that were used, or are held out."""

    lines: set[bytes] = field(default_factory=set)

    def first(self, line: str) -> bool:
        """True if the line is short, or new (it is not any more)."""
        if len(line.encode()) < LINE_MATTERS:
            return True
        digest = hashlib.blake2b(line.strip().encode(), digest_size=8).digest()
        if digest in self.lines:
            return False
        self.lines.add(digest)
        return True


def read_file(path: Path, account: Account) -> str:
    """A text whole. Raises `InputError` with one line."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} is larger than {MAX_BYTES >> 20} MiB", param="files")
        data = path.read_bytes()
        account.sha256, account.bytes = hashlib.sha256(data).hexdigest(), len(data)
        return data.decode("utf-8")
    except OSError as wrong:
        raise InputError(f"{path} cannot be read ({wrong.strerror})", param="files") from None
    except UnicodeDecodeError as wrong:
        raise InputError(f"{path} is not UTF-8 (byte {wrong.start})", param="files") from None


def documents(file: CorpusFile, text: str, seen: Seen, account: Account) -> Iterator[str]:
    """The documents of a file, without lines that were seen; empty ones are left out."""
    for document in _split(file, text):
        kept: list[str] = []
        for line in document.split("\n"):
            if seen.first(line):
                kept.append(line.rstrip())
            else:
                account.lines_dropped += 1
        clean = "\n".join(kept).strip()
        if clean:
            account.documents += 1
            account.bytes_kept += len(clean.encode())
            yield clean


def _split(file: CorpusFile, text: str) -> Iterator[str]:
    match file.form:
        case "documents":
            yield from (document.strip("\n") for document in SEPARATOR.split(text))
        case "pairs":
            yield from _columns(_rows(file.path, text), file.column)
        case "labelled":
            yield from _columns(_labelled(file.path, text), 0)


def _rows(path: str, text: str) -> list[list[str]]:
    """Rows of columns between tabs, or between commas where the name says so."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not path.endswith(".csv"):
        return [line.split("\t") for line in lines]
    try:
        return list(csv.reader(lines))
    except csv.Error as wrong:
        raise InputError(f"{path} is not a table ({wrong})", param="files") from None


def _labelled(path: str, text: str) -> list[list[str]]:
    """Every [text, label] of a JSON file, wherever it stands."""
    try:
        waiting, found = [json.loads(text)], []
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not JSON", param="files") from None
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(reversed(value.values()))
        elif isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
            found.append(value)
        elif isinstance(value, list):
            waiting.extend(reversed(value))
    return found


def _columns(rows: list[list[str]], only: int | None) -> Iterator[str]:
    """Each column by itself (or one of them), some rows together: one language after the other."""
    for begin in range(0, len(rows), PAIRS_TOGETHER):
        together = rows[begin : begin + PAIRS_TOGETHER]
        for column in range(max(map(len, together))) if only is None else (only,):
            yield "\n".join(row[column] for row in together if column < len(row))
