"""A toy language in prepared shards, and a model of a few thousand parameters: quick to learn, quick to check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from haomiao.train.prepare import prepare
from haomiao.train.settings import Corpus, CorpusFile, Training

MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,  # not whole tiles: padded neurons must stay zero
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def write_texts(root: Path) -> Corpus:
    """Two languages, each with a held-out text, and a line that is said twice."""
    root.mkdir(parents=True, exist_ok=True)
    english = "".join(f"the {a} cat sat on the {b} mat\n" for a in ("red", "big", "old") for b in ("new", "wet"))
    chinese = "".join(f"{a}猫坐在{b}垫子上。\n" for a in ("红", "大", "老") for b in ("新", "湿"))
    twice = "this line is long enough to matter and is said twice in the text\n"
    (root / "en.txt").write_text((english * 20 + "<|endoftext|>\n") * 4 + twice + "<|endoftext|>\n" + twice)
    (root / "zh.txt").write_text((chinese * 20 + "<|endoftext|>\n") * 4, encoding="utf-8")
    (root / "en-held.txt").write_text(english * 8)
    (root / "zh-held.txt").write_text(chinese * 8, encoding="utf-8")
    files = tuple(
        CorpusFile(path=f"{language}{tail}.txt", language=language, licence="CC0", use=use)
        for language in ("en", "zh")
        for tail, use in (("", "train"), ("-held", "valid"))
    )
    return Corpus(vocabulary=300, files=files)


def write_data(folder: Path) -> Path:
    """Prepared shards of it."""
    return prepare(write_texts(folder / "texts"), folder / "texts", folder / "data", tell=lambda line: None)


def training(**changes: Any) -> Training:
    """Settings of a run of half a minute of nobody's time."""
    given: dict[str, Any] = {
        "model": MODEL,
        "length": 32,
        "batch": 4,
        "steps": 40,
        "warmup": 4,
        "learning_rate": 0.01,
        "log_every": 4,
        "validate_every": 20,
        "validate_tokens": 256,
        "threads": 1,
        "part_mib": 1,
        "device": "cpu",
    }
    return Training(**{**given, **changes})
