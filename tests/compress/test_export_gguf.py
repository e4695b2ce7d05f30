"""GGUF files that we write: our reader and the `gguf` package find the artifact's numbers in them, to the bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haomiao.cli.main import main
from haomiao.compress.export import gguf_vocabulary
from haomiao.compress.export.gguf import export
from haomiao.compress.export.gguf_blocks import pack_blocks
from haomiao.compress.export.gguf_file import write_file
from haomiao.errors import InputError, ModelError, UnsupportedModelError
from haomiao.kernels.pack import pack_planes, split_codes, unpack, unpack_codes
from haomiao.kernels.rtn import quantize_planes
from haomiao.load.artifact import Artifact, ArtifactWriter
from haomiao.load.gguf.blocks import codes_q4_1, dequantize
from haomiao.load.gguf.names import TABLES, translate, untranslate
from haomiao.load.source import open_source
from haomiao.models import encode
from haomiao.models.convert import convert
from haomiao.models.registry import plan_for
from haomiao.text.tokenizer import Tokenizer
from tests.compress.test_job import run, source_of
from tests.golden.cases import CASES, Case

REFUSED = {
    "llama-odd-bias": "blocks of 32",
    "qwen2-odd": "blocks of 32",
    "llama-dynamic": "rope scaling dynamic",
    "llama-yarn-mscale": "rope would differ",
    "llama-gelu": "glu would differ",
    "qwen2-sliding": "attention would differ",
    "qwen3-layer-types": "attention would differ",
    "smollm3-nope": "smollm3 cannot",
    "smollm3-list": "smollm3 cannot",
    "qwen3-bias-tied": "reads no",
    "gemma2-plain": "reads no",
    "gemma3-v4": "rope would differ",  # every third layer is full, where llama.cpp takes every sixth
    "gemma3-v5": "attention would differ",
    "gpt2-plain": "gpt2 cannot",
    "gpt2-odd": "gpt2 cannot",
    "gpt2-relu": "gpt2 cannot",
}
BY_NAME = {case.name: case for case in CASES}
SCALED = replace(
    BY_NAME["gemma3-default-pattern"],
    name="gemma3-scaled",
    config={
        **BY_NAME["gemma3-default-pattern"].config,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_theta": 500000.0,
        "rope_local_base_freq": 5000.0,
    },
)
EXPORTED = [*(case for case in CASES if case.name not in REFUSED), SCALED]


def widened(case: Case) -> Case:
    """The same with an FFN of whole blocks, and Gemma's hidden size too."""
    if not case.name.startswith(("gemma", "phi3")):
        return case
    changed: dict[str, Any] = {"intermediate_size": 96}
    if case.name.startswith("gemma"):  # and the scale of queries that the format takes for granted
        changed |= {"hidden_size": 64, "query_pre_attn_scalar": case.config["head_dim"]}
    return replace(case, config={**case.config, **changed})


def converted(out: Path, case: Case, **options: Any) -> Artifact:
    return Artifact.open(convert(source_of(case), out, **options))


def assert_same(again: Artifact, artifact: Artifact, config: Mapping[str, Any], planes: Any) -> None:
    for spec in plan_for(config).weights.values():
        if spec.kind == "vector":
            np.testing.assert_array_equal(again.vectors[spec.name], artifact.vectors[spec.name])
        elif spec.role == "body":
            expected = unpack_codes(artifact.tensors[spec.name], planes)
            found = unpack_codes(again.tensors[spec.name])
            group = artifact.tensors[spec.name].group
            np.testing.assert_array_equal(found[0], expected[0])
            scales = np.repeat(expected[1], group // 32, axis=1)[:, : found[1].shape[1]]
            np.testing.assert_array_equal(found[1][:, : scales.shape[1]], scales)


@pytest.mark.parametrize("case", EXPORTED, ids=lambda case: case.name)
def test_our_reader_finds_every_code_and_scale(case: Case, tmp_path: Path) -> None:
    case = widened(case)
    artifact = converted(tmp_path / "out", case, with_lo=False, group=64)
    types = export(artifact, tmp_path / "model.gguf", "int4")
    assert set(types.values()) <= {"q4_0", "q8_0", "f32"}
    source = open_source(str(tmp_path / "model.gguf"))
    again = Artifact.open(convert(source, tmp_path / "again", scheme="exact"))
    assert_same(again, artifact, case.config, "hi")
    assert again.meta["provenance"]["rounded"] == 0


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_format_cannot_say_is_refused(name: str, tmp_path: Path) -> None:
    artifact = converted(tmp_path / "out", widened(BY_NAME[name]), with_lo=False)
    with pytest.raises((UnsupportedModelError, InputError), match=REFUSED[name]):
        export(artifact, tmp_path / "model.gguf", "int4")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("point", "planes", "recipe"),
    [
        ("int4", "hi", {}),
        ("int8", "hi+lo", {"lo_shift": 3}),
        ("int8", "hi+lo", {"bits": 8}),
        ("int4", "hi", {"bits": 3, "group": 128}),
        ("int4", "hi", {"prune": ["sparsegpt:0.5"]}),
        ("int4", "hi", {"prune": ["tile:0.3"]}),
    ],
    ids=str,
)
def test_a_calibrated_solution_is_written_as_it_is(
    point: str, planes: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    case = BY_NAME["llama-gqa-tied"]
    artifact = run(tmp_path / "out", case, recipe)
    types = export(artifact, tmp_path / "model.gguf", point)
    assert types["blk.0.ffn_down.weight"] == ("q4_0" if point == "int4" else "q8_0")
    again = Artifact.open(convert(open_source(str(tmp_path / "model.gguf")), tmp_path / "again", scheme="exact"))
    assert_same(again, artifact, case.config, planes)


def test_the_gguf_package_reads_the_same_weights(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    artifact = converted(tmp_path / "out", BY_NAME["qwen3-head32"], with_lo=False)
    export(artifact, tmp_path / "model.gguf", "int4")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    found = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    down = unpack(artifact.tensors["layers.0.down"], "hi")
    np.testing.assert_array_equal(found["blk.0.ffn_down.weight"], down[:, : found["blk.0.ffn_down.weight"].shape[1]])
    np.testing.assert_array_equal(found["output_norm.weight"], artifact.vectors["final_norm"])
    assert reader.fields["general.architecture"].contents() == "qwen3"
    assert reader.fields["qwen3.attention.key_length"].contents() == 32
    assert reader.fields["tokenizer.ggml.model"].contents() == "none"


@given(
    seed=st.integers(0, 2**32 - 1),
    least=st.integers(-140, 7),
    width=st.integers(0, 20),
    group=st.sampled_from([32, 64, 128]),
    fine=st.booleans(),
)
def test_blocks_hold_every_weight_exactly_or_are_none(
    seed: int, least: int, width: int, group: int, fine: bool
) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(least, least + width + 1, (3, 160)).astype(np.int16)
    scales = random.uniform(-1e-3, 1e-3, (3, -(-160 // group))).astype(np.float16).astype(np.float32)
    if fine:  # few bits, as where checkpoints have round scales
        scales = np.exp2(np.round(np.log2(np.abs(scales) + 1e-6))).astype(np.float32)
    packed = pack_blocks(codes, scales, group)
    values = codes * np.repeat(scales, group, axis=1)[:, :160]
    if packed is None:
        assert codes.min() < -128
        return
    kind, body = packed
    np.testing.assert_array_equal(dequantize(body.reshape(-1), kind).reshape(3, 160), values)
    if kind == "q4_1":
        read = codes_q4_1(body.reshape(-1))
        assert read is not None
        np.testing.assert_array_equal(read[0].reshape(3, 160) * np.repeat(read[1].reshape(3, -1), 32, axis=1), values)
    assert kind == "q4_0" or codes.min() < -8 or codes.max() > 7


def test_a_scale_that_is_no_float16_and_a_code_beyond_int8_have_no_block() -> None:
    codes, scales = np.full((1, 32), 100, np.int16), np.ones((1, 1), np.float32)
    assert pack_blocks(codes, scales, 32) is not None
    assert pack_blocks(codes, scales * np.float32(1.0001), 32) is None
    assert pack_blocks(codes - np.int16(229), scales, 32) is None


def test_integer_zero_points_become_q4_1_and_come_back(tmp_path: Path) -> None:
    """An asymmetric checkpoint's codes (lo_shift 1), where the minimum is exact in float16; else Q8_0."""
    case = BY_NAME["llama-gqa-tied"]
    base = converted(tmp_path / "base", case, with_lo=False)
    random = np.random.default_rng(1)
    with ArtifactWriter(tmp_path / "out") as writer:
        for spec in plan_for(case.config).weights.values():
            if spec.kind == "vector":
                writer.add_vector(spec.name, base.vectors[spec.name])
            elif spec.role != "body":
                writer.add_tensor(spec.name, base.tensors[spec.name])
            else:
                codes = random.integers(-10, 6, (spec.rows, spec.cols))
                step = 2.0**-6 if spec.name.endswith("down") else float(np.float16(0.0171))
                scales = np.full((spec.rows, -(-spec.cols // 32)), 2 * step, np.float32)
                writer.add_tensor(spec.name, pack_planes(*split_codes(codes, 1), scales, 32, 1))
        writer.finish({**base.meta, "points": ["int8", "int4"]})
    artifact = Artifact.open(tmp_path / "out")
    types = export(artifact, tmp_path / "model.gguf", "int8")
    assert types["blk.0.ffn_down.weight"] == "q4_1"
    assert types["blk.0.attn_q.weight"] == "q8_0"
    again = Artifact.open(convert(open_source(str(tmp_path / "model.gguf")), tmp_path / "again", scheme="exact"))
    for name in ("layers.0.down", "layers.1.qkv"):
        np.testing.assert_array_equal(unpack(again.tensors[name]), unpack(artifact.tensors[name]))
    assert again.tensors["layers.0.down"].lo_shift == 1


@pytest.mark.parametrize("name", ["llama-gqa-tied", CASES[0].name])
@pytest.mark.parametrize("options", [{"lo_shift": 4}, {"lo_shift": 3, "group": 128}], ids=str)
def test_the_head_of_nested_planes_is_q8_0_exactly(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    artifact = converted(tmp_path / "out", BY_NAME[name], **options)
    head = next(spec for spec in plan_for(BY_NAME[name].config).weights.values() if spec.role == "head")
    types = export(artifact, tmp_path / "model.gguf", "int4")
    assert types["token_embd.weight" if "embed" in head.sources[0] else "output.weight"] == "q8_0"
    found = open_source(str(tmp_path / "model.gguf")).read(head.sources[0])
    np.testing.assert_array_equal(found, unpack(artifact.tensors[head.name]))


def test_tables_beyond_int8_are_float32_or_rounded_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["llama-gqa-tied"]

    def free(*arguments: Any, **options: Any) -> Any:  # as heads were rounded before they kept within int8
        return quantize_planes(*arguments, **{**options, "within_int8": False})

    monkeypatch.setattr(encode, "quantize_planes", free)
    artifact = converted(tmp_path / "out", case, lo_shift=4)
    table = unpack(artifact.tensors["embed"])
    exact = export(artifact, tmp_path / "exact.gguf", "int4")
    rounded = export(artifact, tmp_path / "rounded.gguf", "int4", round_tables=True)
    assert (exact["token_embd.weight"], rounded["token_embd.weight"]) == ("f32", "q8_0")
    np.testing.assert_array_equal(open_source(str(tmp_path / "exact.gguf")).read("model.embed_tokens.weight"), table)
    near = open_source(str(tmp_path / "rounded.gguf")).read("model.embed_tokens.weight")
    assert 0 < np.abs(near - table).max() < np.abs(table).max() / 200
    with pytest.raises(InputError, match="lo-shift 3"):
        export(artifact, tmp_path / "int8.gguf", "int8")


def test_names_go_both_ways() -> None:
    for architecture, (top, prefix, inside) in TABLES.items():
        for name in [*top.values(), *(f"{prefix}.17.{middle}" for middle in inside.values())]:
            for kind in ("weight", "bias"):
                there = untranslate(architecture, f"{name}.{kind}")
                assert there is not None
                assert translate(architecture, there) == f"{name}.{kind}"
    assert untranslate("llama", "model.layers.x.mlp.up_proj.weight") is None
    assert untranslate("llama", "model.layers.3.mlp.router.weight") is None
    assert untranslate("llama", "weight") is None


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = converted(tmp_path / "out", BY_NAME["qwen2-tied"], with_lo=False)
    with pytest.raises(InputError, match="int4 or int8"):
        export(artifact, tmp_path / "x.gguf", "full")
    with pytest.raises(InputError, match=r"end in \.gguf"):
        export(artifact, tmp_path / "x", "int4")
    ask = ["compress", str(tmp_path / "out"), "-o", str(tmp_path / "cli.gguf"), "--format", "gguf"]
    assert main([*ask, "--bits", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["types"]["q4_0"] == 14
    assert main(ask) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["compress", "x", "-o", "y", "--round-tables"]) == 2
    assert "--format gguf" in capsys.readouterr().err
    shapes, body = {"a": (2, 32)}, np.zeros(34, np.uint8)
    with pytest.raises(ValueError, match="does not agree"):
        write_file(tmp_path / "wrong", {}, shapes, [("a", "q8_0", body)])
    with pytest.raises(ValueError, match="not given"):
        write_file(tmp_path / "short", {}, shapes, [])


# ---- tokenizers -----------------------------------------------------------------------------------------------------


def written(directory: Path, out: Path, size: int) -> Path:
    """A file of the vocabulary alone."""
    keys = {"general.architecture": "llama", **gguf_vocabulary.vocabulary(directory, size)}
    write_file(out, keys, {"a": (1,)}, [("a", "f32", np.zeros(1, np.float32))])
    return out


@pytest.mark.parametrize(("name", "pre"), [("qwen2.5", "qwen2"), ("gpt2", "gpt-2"), ("llama2", "default")])
def test_real_tokenizers_are_written_exactly(name: str, pre: str, shared: Path, tmp_path: Path) -> None:
    directory = shared / "data" / "tokenizers" / name
    ours = Tokenizer(directory)
    path = written(directory, tmp_path / "model.gguf", ours.vocab_size + 5)
    gguf_vocabulary.check(path, directory)
    theirs = Tokenizer(path)
    assert theirs.bos_id == ours.bos_id
    assert theirs.vocab_size == ours.vocab_size + 5
    assert theirs.chat_template == ours.chat_template
    conformance = shared / "data" / "tokenizers" / "conformance" / "ggml-vocab-qwen2.gguf.inp"
    for text in conformance.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n"):
        assert theirs.encode(text) == ours.encode(text)
    assert pre in path.read_bytes()[: 1 << 16].decode("utf-8", "replace")


def test_vocabularies_that_cannot_be_written(shared: Path, tmp_path: Path) -> None:
    assert gguf_vocabulary.vocabulary(tmp_path, 10) == {"tokenizer.ggml.model": "none"}
    trained = shared / "data" / "trained"
    with pytest.raises(ModelError, match="8192 tokens, the model 100"):
        gguf_vocabulary.vocabulary(trained, 100)
    data = json.loads((trained / "tokenizer.json").read_text(encoding="utf-8"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text(json.dumps(data | {"pre_tokenizer": {"type": "Whitespace"}}))
    with pytest.raises(UnsupportedModelError, match="Whitespace"):
        gguf_vocabulary.vocabulary(other, 8192)
    described = {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": False}
    with pytest.raises(UnsupportedModelError, match="no name"):
        gguf_vocabulary.pre_tokenizer({"type": "Sequence", "pretokenizers": [described]}, False)
    path = written(trained, tmp_path / "model.gguf", 8192)
    changed = json.loads((trained / "tokenizer.json").read_text(encoding="utf-8"))
    changed["model"]["merges"] = changed["model"]["merges"][:100]
    (other / "tokenizer.json").write_text(json.dumps(changed))
    with pytest.raises(UnsupportedModelError, match="would be cut otherwise"):
        gguf_vocabulary.check(path, other)
