"""Hostile files, one field wrong each, and the promise that every one of them is refused in one line."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from haomiao.errors import HaomiaoError
from haomiao.load.artifact import Artifact, ArtifactWriter
from haomiao.load.source import open_source
from tests.load.checkpoints import safetensors_bytes
from tests.load.gguf_files import Gguf, Tensor, text, tiny

HUGE = (1 << 31, 1 << 32, 1 << 60, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
SLACK = 4 << 20
"""What reading may take besides the file's own size: interpreter objects, messages, one chunk."""


def read_all(path: Path) -> None:
    """Open a checkpoint and read every tensor in every way."""
    source = open_source(path)
    try:
        for name in source.names():
            source.shape(name), source.dtype(name)
            source.read(name)
            source.quantized(name)
    finally:
        source.close()


def open_artifact(path: Path) -> None:
    """Open an artifact and verify every body."""
    with Artifact.open(path) as artifact:
        artifact.verify()


def survives(action: Callable[[], None]) -> HaomiaoError | None:
    """Run; None if it worked, the error if it was refused as it should be. Anything else fails the test."""
    try:
        action()
    except HaomiaoError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 2000
        assert error.exit_code == 2 and error.status in (400, 404)
        return error
    return None


def assert_refused(action: Callable[[], None], size: int) -> str:
    """Run; it must be refused in one line, without allocating more than the file's size and a constant."""
    tracemalloc.start()
    try:
        error = survives(action)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if error is None:
        pytest.fail("a hostile file was accepted")
    assert peak < size + SLACK, f"{peak} bytes allocated for a file of {size}"
    return str(error)


# ---- safetensors ----------------------------------------------------------------------------------------------------


def safetensors_of(header: Any, body: bytes = bytes(24), length: int | None = None) -> bytes:
    """A file with any header: JSON-ready, or raw bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def entry(dtype: Any = "F32", shape: Any = (6,), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def hostile_safetensors() -> Iterator[tuple[str, bytes]]:
    """(what is wrong, file)."""
    good = {"w": entry()}
    for size in HUGE:
        yield f"header of {size} bytes", safetensors_of(good, length=size)
        yield f"shape {size}", safetensors_of({"w": entry(shape=[size])})
        yield f"shape {size} squared", safetensors_of({"w": entry(shape=[size, size])})
        yield f"shape {size} times 0", safetensors_of({"w": entry(shape=[size, size, 0, 7], offsets=[0, 24])})
        yield f"offsets to {size}", safetensors_of({"w": entry(offsets=[0, size])})
        yield f"offsets from {size}", safetensors_of({"w": entry(shape=[0], offsets=[size, size])})
    for value in (-1, True, 1.5, "6", None, [6], {}, float("nan"), float("inf")):
        yield f"size {value!r}", safetensors_of({"w": entry(shape=[value])})
        yield f"offset {value!r}", safetensors_of({"w": entry(offsets=[0, value])})
        if value != [6]:
            yield f"shape {value!r}", safetensors_of({"w": entry(shape=value)})
        yield f"type {value!r}", safetensors_of({"w": entry(dtype=value)})
        yield f"entry {value!r}", safetensors_of({"w": value})
        if value not in ({}, "6"):
            yield f"metadata {value!r}", safetensors_of({"__metadata__": {"k": value}, **good})
            yield f"header {value!r}", safetensors_of(value)
    yield "unknown type", safetensors_of({"w": entry(dtype="F31")})
    yield "nine dimensions", safetensors_of({"w": entry(shape=[1] * 8 + [6])})
    yield "three offsets", safetensors_of({"w": entry(offsets=[0, 12, 24])})
    yield "backwards", safetensors_of({"w": entry(offsets=[24, 0])})
    yield "missing field", safetensors_of({"w": {"dtype": "F32", "shape": [6]}})
    yield "extra field", safetensors_of({"w": {**entry(), "loader": "pickle"}})
    yield "too few bytes", safetensors_of({"w": entry(shape=[7])})
    yield "overlap", safetensors_of({"a": entry(shape=[4], offsets=[0, 16]), "b": entry(shape=[4], offsets=[8, 24])})
    yield "same bytes", safetensors_of({"a": entry(), "b": entry()})
    yield "gap", safetensors_of({"a": entry(shape=[2], offsets=[0, 8]), "b": entry(shape=[2], offsets=[16, 24])})
    yield "bytes left over", safetensors_of(good, body=bytes(32))
    yield "data missing", safetensors_of(good, body=bytes(23))
    pair = json.dumps(entry())
    yield "duplicate key", safetensors_of(f'{{"w": {pair}, "w": {pair}}}'.encode())
    yield "not JSON", safetensors_of(b"{'w': 1}")
    yield "not UTF-8", safetensors_of(b'{"\xff": 1}')
    yield "deep", safetensors_of(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    yield "deep, unclosed", safetensors_of(b'{"w":' * 50_000)
    yield "many digits", safetensors_of(b'{"w": ' + b"9" * 10_000 + b"}")
    yield "1e999", safetensors_of(b'{"w": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 24]}}')
    yield "NaN", safetensors_of(b'{"w": NaN}')
    yield "empty", b""
    yield "a pickle", b"\x80\x04\x95" + bytes(200)
    yield "zeros", bytes(1000)


def good_safetensors() -> bytes:
    """The file that mutations start from."""
    rng = np.random.default_rng(0)
    return safetensors_bytes(
        {
            "model.embed_tokens.weight": rng.standard_normal((4, 3)).astype(np.float32),
            "model.norm.weight": rng.standard_normal(3).astype(np.float16),
            "model.bias": np.arange(4, dtype=np.int32),
        }
    )


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def hostile_gguf() -> Iterator[tuple[str, bytes]]:
    """(what is wrong, file)."""

    def changed(**fields: Any) -> bytes:
        file = tiny("llama", layers=1)
        for name, value in fields.items():
            setattr(file, name, value)
        return file.bytes()

    def metadata(key: str, value: bytes | Any) -> bytes:
        return tiny("llama", layers=1, **{key: value}).bytes()

    def tensor(**fields: Any) -> bytes:
        file = tiny("llama", layers=1)
        values = {"shape": (4, 32), "data": bytes(512), "type": 0, "offset": None, **fields}
        file.tensors["output.weight"] = Tensor(**values)
        return file.bytes()

    yield "magic", changed(magic=b"GGML")
    for version in (0, 1, 4, 3 << 24, 0xFFFFFFFF):
        yield f"version {version}", changed(version=version)
    for count in (1, 100, 1 << 16, *HUGE):
        if count < 1 << 64:
            yield f"{count} more tensors", changed(tensor_count=min(11 + count, (1 << 64) - 1))
            yield f"{count} more entries", changed(entry_count=min(11 + count, (1 << 64) - 1))
    for size in HUGE:
        length = struct.pack("<Q", size)
        yield f"string of {size}", metadata("general.name", struct.pack("<I", 8) + length)
        for kind in (0, 4, 8, 10):
            yield f"array of {size} of type {kind}", metadata("x.y", struct.pack("<IIQ", 9, kind, size))
        yield f"one string of {size} in an array", metadata("x.y", struct.pack("<IIQQ", 9, 8, 1, size))
        yield f"{size} columns", tensor(shape=(4, size))
        yield f"{size} rows and columns", tensor(shape=(size, size))
        yield f"offset {size}", tensor(offset=size & ~31)
        yield f"offset {size}, empty", tensor(offset=size & ~31, shape=(1, 1))
    for kind in (13, 99, 0xFFFFFFFF):
        yield f"value of type {kind}", metadata("x.y", struct.pack("<IQ", kind, 0))
        yield f"array of type {kind}", metadata("x.y", struct.pack("<IIQ", 9, kind, 1) + bytes(16))
    yield "array of arrays", metadata("x.y", struct.pack("<IIQIIQ", 9, 9, 1, 9, 9, 1))
    yield "a boolean of 2", metadata("x.y", struct.pack("<IB", 7, 2))
    for alignment in (0, 1, 7, 33, 1 << 21, 0xFFFFFFFF, "32", -32):
        yield (
            f"alignment {alignment}",
            metadata("general.alignment", struct.pack("<Ii", 5, alignment) if alignment == -32 else alignment),
        )
    for kind in (4, 5, 31, 36, 38, 1 << 20, 0xFFFFFFFF):
        yield f"tensor type {kind}", tensor(type=kind)
    for dimensions in (0, 5, 1000):
        yield f"{dimensions} dimensions", tensor(shape=(1,) * dimensions)
    yield "no columns", tensor(shape=(4, 0))
    yield "half a block", tensor(shape=(4, 40), type=2)
    yield "overlap", tensor(offset=0)
    yield "unaligned", tensor(offset=8)
    yield "not enough data", tensor(shape=(400, 320))
    for name in (b"", b"\xff\xfe", b"a\nb", b"x" * 300):
        file = tiny("llama", layers=1)
        raw = file.bytes().replace(text("output_norm.weight"), text(name))
        yield f"tensor name {name[:8]!r}", raw
        yield (
            f"key {name[:8]!r}",
            file.bytes().replace(text("llama.rope.freq_base"), text(name if name != b"x" * 300 else b"")),
        )
    twice = text("llama.context_length") + struct.pack("<II", 4, 128)
    yield "a key twice", tiny("llama", layers=1).bytes().replace(twice, twice + twice)
    file = tiny("llama", layers=1)
    file.add("blk.0.attn_v.weighX", np.ones((16, 32)))
    yield "a tensor twice", file.bytes().replace(b"attn_v.weighX", b"attn_v.weight")
    yield "no architecture", Gguf({}, {"token_embd.weight": Tensor((1, 8), bytes(32))}).bytes()
    yield "an architecture that is a number", metadata("general.architecture", 7)
    yield "empty", b""
    yield "only the magic", b"GGUF"
    yield "zeros", b"GGUF" + bytes(2000)


def good_gguf() -> bytes:
    """The file that mutations start from: every kind of metadata, a quantized tensor, a rotary table."""
    file = tiny(
        "llama",
        layers=1,
        **{
            "tokenizer.ggml.tokens": ["a", "<|im_end|>", "b"],
            "tokenizer.ggml.token_type": [1, 3, 1],
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.chat_template": "{{ x }}",
            "general.quantized": True,
        },
    )
    file.tensors["blk.0.attn_q.weight"] = Tensor((32, 32), bytes(range(18)) * 32, 2)
    file.tensors["output.weight"] = Tensor((4, 256), bytes(range(144)) * 4, 12)
    file.add("rope_freqs.weight", np.array([1, 1, 2, 4]))
    return file.bytes()


# ---- artifact -------------------------------------------------------------------------------------------------------


def good_artifact(directory: Path) -> bytes:
    """Write a small artifact with every kind of section and return `model.haomiao`."""
    from tests.load.test_artifact import CASES, random_tensor

    with ArtifactWriter(directory, overwrite=True, reserved_header=0) as writer:
        for i, case in enumerate(CASES):
            writer.add_tensor(f"w{i}", random_tensor(*case))
        writer.add_vector("norm", np.ones(5, np.float32))
        writer.finish({"config": {}})
    return (directory / "model.haomiao").read_bytes()


def sealed(data: bytearray) -> bytes:
    """The same header with its checksum repaired, as far as its size makes sense."""
    size = int.from_bytes(data[12:16], "little")
    if 64 <= size <= len(data):
        data[32:36] = bytes(4)
        data[32:36] = struct.pack("<I", zlib.crc32(data[:size]))
    return bytes(data)
