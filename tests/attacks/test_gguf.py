"""Hostile GGUF files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attacks.hostile import assert_refused, good_gguf, hostile_gguf, read_all, survives
from tests.load.gguf_files import tiny

CASES = list(hostile_gguf())


@pytest.mark.parametrize("data", [data for _, data in CASES], ids=[name for name, _ in CASES])
def test_every_field(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    message = assert_refused(lambda: read_all(path), len(data))
    assert "x.gguf" in message


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    good = good_gguf()
    path.write_bytes(good)
    read_all(path)
    ends = [*range(300), *range(300, 3000, 7), *range(3000, len(good) - 32, 397)]
    for size in ends:
        path.write_bytes(good[:size])
        assert survives(lambda: read_all(path)) is not None, f"cut at {size}"


@pytest.mark.parametrize("value", [0, 1 << 31, 0xFFFFFFFF, -1.0, float("nan"), float("inf"), "x", True, [1, 2]])
@pytest.mark.parametrize(
    "key",
    [
        "llama.block_count",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.head_count_kv",
        "llama.attention.key_length",
        "llama.attention.layer_norm_rms_epsilon",
        "llama.context_length",
        "llama.rope.freq_base",
        "tokenizer.ggml.eos_token_id",
        "split.count",
        "llama.expert_count",
    ],
)
def test_numbers_of_the_model(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "x.gguf"
    data = tiny("llama", layers=1, **{key: value}).bytes()
    path.write_bytes(data)
    harmless = (
        (value == 0 and key in ("split.count", "llama.expert_count", "tokenizer.ggml.eos_token_id"))
        or (isinstance(value, int) and not isinstance(value, bool) and key.endswith(("epsilon", "freq_base")))
        or (value == -1.0 and key.endswith(("epsilon", "freq_base")))  # a number; the family says which ones it takes
    )
    if harmless:
        survives(lambda: read_all(path))
    else:
        assert_refused(lambda: read_all(path), len(data))
