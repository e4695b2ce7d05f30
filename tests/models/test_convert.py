"""Conversion: names found, shapes checked, codes kept, everything wrong said at once."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from haomiao.errors import InputError, ModelError
from haomiao.kernels.pack import from_bf16, to_bf16, unpack
from haomiao.load.artifact import Artifact
from haomiao.load.source import QuantizedTensor
from haomiao.models.convert import convert
from haomiao.models.registry import plan_for
from haomiao.types import F32
from tests.golden.cases import CASES, Case
from tests.golden.checkpoint import DictSource, random_checkpoint
from tests.load.gguf_files import tiny

BY_NAME = {case.name: case for case in CASES}
QKV = [f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkv"]


def converted(source: DictSource, directory: Path, **options: Any) -> Artifact:
    return Artifact.open(convert(source, directory / "out", **options))


def checkpoint(name: str) -> tuple[Case, dict[str, F32]]:
    case = BY_NAME[name]
    return case, random_checkpoint(case.config, case.seed)


def codes_for(weights: F32, bits: int, group: int = 32, seed: int = 0) -> QuantizedTensor:
    """Random codes of a matrix's shape."""
    least, greatest = {4: (-8, 7), 5: (-15, 15), 8: (-127, 127)}[bits]
    rng = np.random.default_rng(seed)
    codes = rng.integers(least, greatest + 1, weights.shape).astype(np.int8)
    scales = rng.uniform(0.001, 0.1, (len(weights), -(-weights.shape[1] // group))).astype(np.float16)
    return QuantizedTensor(codes, scales.astype(np.float32), group, bits)


def values_of(quantized: QuantizedTensor) -> F32:
    scales = np.repeat(quantized.scales, quantized.group, axis=1)[:, : quantized.codes.shape[1]]
    return (quantized.codes * scales).astype(np.float32)


# ---- arrangement ----------------------------------------------------------------------------------------------------


def test_rows_of_q_k_and_v_follow_each_other(tmp_path: Path) -> None:
    case, tensors = checkpoint("llama-odd-bias")
    artifact = converted(DictSource(case.config, tensors), tmp_path, scheme="full")
    np.testing.assert_array_equal(unpack(artifact.tensors["layers.0.qkv"]), np.concatenate([tensors[n] for n in QKV]))
    biases = np.concatenate([tensors[n.replace("weight", "bias")] for n in QKV])
    np.testing.assert_array_equal(artifact.vectors["layers.0.qkv.bias"], biases)


@pytest.mark.parametrize("name", ["llama-odd-bias", "phi3-plain"])
def test_gate_and_up_alternate_by_32_neurons_and_are_padded(name: str, tmp_path: Path) -> None:
    case, tensors = checkpoint(name)
    ffn, hidden = case.config["intermediate_size"], case.config["hidden_size"]
    assert ffn % 32
    prefix = "model.layers.1.mlp."
    if name == "phi3-plain":
        gate, up = np.split(tensors[f"{prefix}gate_up_proj.weight"], 2)
    else:
        gate, up = tensors[f"{prefix}gate_proj.weight"], tensors[f"{prefix}up_proj.weight"]
    artifact = converted(DictSource(case.config, tensors), tmp_path, scheme="full")
    stored = unpack(artifact.tensors["layers.1.gate_up"]).reshape(-1, 2, 32, hidden)
    np.testing.assert_array_equal(stored[:, 0].reshape(-1, hidden)[:ffn], gate)
    np.testing.assert_array_equal(stored[:, 1].reshape(-1, hidden)[:ffn], up)
    assert not stored[-1, :, ffn % 32 :].any()
    down = unpack(artifact.tensors["layers.1.down"])
    np.testing.assert_array_equal(down[:, :ffn], tensors[f"{prefix}down_proj.weight"])
    assert not down[:, ffn:].any()
    if name == "llama-odd-bias":
        bias = artifact.vectors["layers.1.gate_up.bias"].reshape(-1, 2, 32)
        np.testing.assert_array_equal(bias[:, 1].reshape(-1)[:ffn], tensors[f"{prefix}up_proj.bias"])


def test_conv1d_is_transposed_and_gemma_norms_are_offset(tmp_path: Path) -> None:
    case, tensors = checkpoint("gpt2-odd")
    artifact = converted(DictSource(case.config, tensors), tmp_path / "gpt2", scheme="full")
    stored = unpack(artifact.tensors["layers.1.up"])
    np.testing.assert_array_equal(stored, tensors["transformer.h.1.mlp.c_fc.weight"].T)
    case, tensors = checkpoint("gemma2-window")
    artifact = converted(DictSource(case.config, tensors), tmp_path / "gemma", scheme="full")
    expected = tensors["model.layers.0.post_attention_layernorm.weight"] + np.float32(1)
    np.testing.assert_array_equal(artifact.vectors["layers.0.post_attention_norm"], expected)


@pytest.mark.parametrize(
    ("name", "rename"),
    [
        ("gpt2-plain", lambda n: n.removeprefix("transformer.")),
        ("llama-gqa-tied", lambda n: n.removeprefix("model.")),
        ("gemma3-v4", lambda n: f"language_model.{n}"),
        ("gemma3-v4", lambda n: n.replace("model.", "model.language_model.", 1)),
    ],
)
def test_names_with_and_without_prefixes(name: str, rename: Any, tmp_path: Path) -> None:
    case, tensors = checkpoint(name)
    config = case.config
    if "gemma" in name:
        config = {"model_type": "gemma3", "text_config": config, "vision_config": {}, "architectures": ["Gemma3X"]}
    renamed = {rename(n): t for n, t in tensors.items()}
    artifact = converted(DictSource(config, {**renamed, "vision_tower.x": np.ones(3, np.float32)}), tmp_path)
    assert set(plan_for(config).weights) == {*artifact.tensors, *artifact.vectors}


# ---- what is wrong --------------------------------------------------------------------------------------------------


def test_everything_missing_is_listed_at_once(tmp_path: Path) -> None:
    case, tensors = checkpoint("llama-gqa-tied")
    gone = [*QKV, "model.norm.weight"]
    source = DictSource(case.config, {n: t for n, t in tensors.items() if n not in gone})
    with pytest.raises(ModelError) as raised:
        convert(source, tmp_path / "out")
    assert "4 weights are missing" in str(raised.value)
    assert all(name in str(raised.value) for name in gone)
    assert list(tmp_path.iterdir()) == []


def test_shapes_that_contradict_the_config_are_named_before_anything_is_read(tmp_path: Path) -> None:
    case, tensors = checkpoint("llama-gqa-tied")

    class Unreadable(DictSource):
        def read(self, name: str) -> F32:
            raise AssertionError("read before the shapes were checked")

    config = {**case.config, "intermediate_size": 1 << 23, "vocab_size": 1 << 23}
    with pytest.raises(ModelError, match=r"7 weights contradict the config: .*\[97, 64\], the config says \[8388608"):
        convert(Unreadable(config, tensors), tmp_path / "out")


@pytest.mark.parametrize("scheme", ["nested", "full", "bf16"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(scheme: Any, name: str, value: float, tmp_path: Path) -> None:
    case, tensors = checkpoint("llama-gqa-tied")
    tensors[name].flat[3] = value
    with pytest.raises(ModelError, match="NaN") as raised:
        convert(DictSource(case.config, tensors), tmp_path / "out", scheme=scheme)
    assert "model." in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_options_are_checked(tmp_path: Path) -> None:
    case, tensors = checkpoint("llama-gqa-tied")
    with pytest.raises(InputError, match="scheme"):
        convert(DictSource(case.config, tensors), tmp_path / "out", scheme="int3")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="group"):
        convert(DictSource(case.config, tensors), tmp_path / "out", group=48)
    with pytest.raises(ModelError, match="eos_token_id"):
        convert(DictSource({**case.config, "eos_token_id": [1, "x"]}, tensors), tmp_path / "out")


# ---- encodings ------------------------------------------------------------------------------------------------------


def with_codes(bits: dict[str, int]) -> tuple[Case, dict[str, F32], dict[str, QuantizedTensor]]:
    """llama-gqa-tied with codes of the given width for some weights (by the end of their names)."""
    case, tensors = checkpoint("llama-gqa-tied")
    codes = {}
    for index, (name, weights) in enumerate(tensors.items()):
        width = next((b for end, b in bits.items() if name.endswith(f"{end}.weight")), None)
        if width is not None:
            codes[name] = codes_for(weights, width, seed=index)
            tensors[name] = values_of(codes[name])
    return case, tensors, codes


@pytest.mark.parametrize(
    ("q", "k", "v", "scheme", "encoding", "lo_shift"),
    [
        (4, 4, 4, "nested", "planes", None),
        (5, 4, 5, "nested", "planes", 1),
        (8, 8, 8, "exact", "int8", None),
        (8, 4, 5, "exact", "int8", None),
        (4, None, 4, "nested", "planes", 4),
        (5, None, 4, "exact", "int8", None),
        (8, None, None, "exact", "int8", None),
    ],
)
def test_codes_are_kept(
    q: Any, k: Any, v: Any, scheme: Any, encoding: str, lo_shift: int | None, tmp_path: Path
) -> None:
    bits = {f"{p}_proj": b for p, b in zip("qkv", (q, k, v), strict=True) if b}
    case, tensors, codes = with_codes(bits)
    artifact = converted(DictSource(case.config, tensors, codes=codes), tmp_path, scheme=scheme)
    packed = artifact.tensors["layers.0.qkv"]
    assert packed.encoding == encoding
    assert (packed.lo is not None) == (lo_shift is not None)
    assert packed.lo is None or packed.lo_shift == lo_shift
    stored = np.split(unpack(packed), np.cumsum([len(tensors[n]) for n in QKV])[:-1])
    for name, rows in zip(QKV, stored, strict=True):
        if name in codes:
            np.testing.assert_array_equal(rows, values_of(codes[name]))
        else:
            step = np.abs(tensors[name]).max() / 64
            assert np.abs(rows - tensors[name]).max() < step


def test_eight_bit_codes_become_planes_where_int4_is_wanted(tmp_path: Path) -> None:
    case, tensors, codes = with_codes({f"{p}_proj": 8 for p in ("q", "k", "v", "o", "gate", "up", "down")})
    nested = converted(DictSource(case.config, tensors, codes=codes), tmp_path / "a", scheme="nested")
    assert nested.meta["points"] == ["int8", "int4"]
    assert nested.tensors["layers.0.qkv"].lo is not None
    exact = converted(DictSource(case.config, tensors, codes=codes), tmp_path / "b", scheme="exact")
    assert exact.meta["points"] == ["int8"]
    assert exact.meta["provenance"]["exact"] == 8


def test_points_say_what_is_there(tmp_path: Path) -> None:
    case, tensors = checkpoint("llama-gqa-tied")
    bf16 = {name: from_bf16(to_bf16(tensor)) for name, tensor in tensors.items()}
    stored = dict.fromkeys(tensors, "bf16")

    def points(source: DictSource, name: str, **options: Any) -> Any:
        return converted(source, tmp_path / name, **options).meta["points"]

    assert points(DictSource(case.config, tensors), "a") == ["int8", "int4"]
    assert points(DictSource(case.config, tensors), "b", with_lo=False) == ["int4", "int8"]
    assert points(DictSource(case.config, tensors), "c", scheme="full") == ["full"]
    assert points(DictSource(case.config, tensors), "d", scheme="bf16") == ["bf16"]
    assert points(DictSource(case.config, bf16, dtypes=stored), "e", scheme="full") == ["full", "bf16"]
    _, tensors, codes = with_codes({f"{p}_proj": 4 for p in ("q", "k", "v", "o", "gate", "up", "down")})
    assert points(DictSource(case.config, tensors, codes=codes), "f") == ["int4", "int8"]


def test_bf16_checkpoints_stay_exact_at_full(tmp_path: Path) -> None:
    case, tensors = checkpoint("qwen2-odd")
    tensors = {name: from_bf16(to_bf16(tensor)) for name, tensor in tensors.items()}
    artifact = converted(
        DictSource(case.config, tensors, dtypes=dict.fromkeys(tensors, "bf16")), tmp_path, scheme="full"
    )
    assert artifact.tensors["head"].encoding == "bf16"
    np.testing.assert_array_equal(unpack(artifact.tensors["head"]), tensors["lm_head.weight"])


def test_embeddings_keep_eight_bits_and_positions_floats(tmp_path: Path) -> None:
    case, tensors = checkpoint("qwen2-odd")
    artifact = converted(DictSource(case.config, tensors), tmp_path / "a", with_lo=False)
    assert artifact.tensors["embed"].encoding == "int8"
    assert artifact.tensors["head"].lo is not None
    assert artifact.tensors["layers.0.out"].lo is None
    case, tensors = checkpoint("gpt2-plain")
    artifact = converted(DictSource(case.config, tensors), tmp_path / "b")
    assert artifact.tensors["positions"].encoding == "f32"


def test_what_travels_along(tmp_path: Path) -> None:
    case, tensors = checkpoint("llama-gqa-tied")
    (tmp_path / "template").write_text("{{ messages }}")
    files: dict[str, Path | bytes] = {
        "tokenizer.json": b"{}",
        "chat_template.jinja": tmp_path / "template",
        "generation_config.json": json.dumps({"eos_token_id": 2}).encode(),
    }
    seen: list[tuple[int, int]] = []
    artifact = converted(
        DictSource(case.config, tensors, files=files),
        tmp_path,
        progress=lambda _, done, total: seen.append((done, total)),
    )
    assert sorted(artifact.files) == ["chat_template.jinja", "generation_config.json", "tokenizer.json"]
    assert artifact.files["chat_template.jinja"].read_text() == "{{ messages }}"
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    assert artifact.meta["config"] == case.config
    assert artifact.meta["family"] == "llama"


def test_memory_is_bounded_by_one_matrix(tmp_path: Path) -> None:
    """24 MB of float32 weights, no matrix above 1 MB: converting them takes a few matrices' worth."""
    case = BY_NAME["llama-gqa-tied"]
    config = {**case.config, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 10}
    shapes = {
        name: shape
        for spec in plan_for(config).weights.values()
        for name, shape in zip(spec.sources, spec.shapes, strict=True)
    }

    class Lazy(DictSource):
        def names(self) -> list[str]:
            return list(shapes)

        def shape(self, name: str) -> tuple[int, ...]:
            return shapes[name]

        def read(self, name: str) -> F32:
            return np.full(shapes[name], 0.5, np.float32)

    assert sum(int(np.prod(shape)) * 4 for shape in shapes.values()) > 23e6
    for scheme in ("nested", "full"):
        tracemalloc.start()
        convert(Lazy(config, {}), tmp_path / scheme, scheme=scheme)  # type: ignore[arg-type]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 7e6


# ---- tokenizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rwkv", None])
def test_a_gguf_file_without_a_tokenizer_that_is_known_takes_token_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str | None
) -> None:
    from haomiao.api import LLM

    monkeypatch.setenv("HAOMIAO_CACHE", str(tmp_path / "cache"))
    file = tiny("llama")
    file.metadata["tokenizer.ggml.tokens"] = [f"t{index}" for index in range(64)]
    if kind is not None:
        file.metadata["tokenizer.ggml.model"] = kind
    (tmp_path / "tiny.gguf").write_bytes(file.bytes())
    with LLM(tmp_path / "tiny.gguf", point="full", executor="reference") as llm:
        assert llm.tokenizer is None
        assert len(llm.generate([1, 2, 3], max_tokens=4, ignore_eos=True).token_ids) == 4
        with pytest.raises(InputError, match="no tokenizer"):
            llm.generate("text")
        said = llm._opened.artifact.meta["provenance"].get("without_tokenizer")
    assert said is None if kind is None else kind in said


def test_a_byte_level_vocabulary_is_prepared_for_mapping(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    from haomiao.text.decoding import byte_alphabet
    from haomiao.text.tokenizer import Tokenizer

    backend = Backend(models.BPE({c: i for i, c in enumerate(byte_alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    case, tensors = checkpoint("llama-odd-bias")
    source = DictSource(case.config, tensors)
    source.files = {"tokenizer.json": tmp_path / "tokenizer.json"}
    artifact = converted(source, tmp_path)
    assert (artifact.directory / "tokenizer.table").is_file()
    tokenizer = Tokenizer(artifact.directory)
    assert tokenizer.decode(tokenizer.encode("prêt 准备")) == "prêt 准备"
