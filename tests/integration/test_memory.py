"""Memory: resident size <= planes in use + KV + 150 MB, and two processes on one artifact share its pages.

Measured from /proc in processes of their own, on a random checkpoint big enough that a second copy of the weights, or
the lo planes at `int4`, would break the bound.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")

MB = 1 << 20
ALLOWANCE = 150 * MB
HIDDEN, FFN, LAYERS, VOCAB, HEADS, KV_HEADS = 1024, 4096, 14, 4096, 16, 4

PROBE = """
import json, sys, time
from pathlib import Path
from haomiao.api import LLM

def kilobytes(field):
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])

def mapped_artifact():
    # pages of the artifact's mapping: resident, and of those the ones that another process maps too
    resident = shared = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()
        if "-" in head[0] and len(head) > 4 and not head[0].endswith(":"):
            inside = line.endswith("model.haomiao")
        elif inside and head[0] == "Rss:":
            resident += int(head[1])
        elif inside and head[0] in ("Shared_Clean:", "Shared_Dirty:"):
            shared += int(head[1])
    return resident * 1024, shared * 1024

llm = LLM(sys.argv[1], point=sys.argv[2], threads=2, max_context=512)
llm.generate(list(range(1, 65)), max_tokens=16, ignore_eos=True)
print("ready", flush=True)
sys.stdin.readline()
resident, shared = mapped_artifact()
print(json.dumps({"rss": kilobytes("Rss") * 1024, "mapped": resident, "shared": shared}), flush=True)
sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of about 190 M parameters, converted: hi planes about 105 MB, lo planes about 95 MB."""
    from safetensors.numpy import save_file

    from haomiao.load.source import open_source
    from haomiao.models.convert import convert

    directory = tmp_path_factory.mktemp("checkpoint")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(1)

    def matrix(rows: int, cols: int) -> np.ndarray:
        return (rng.standard_normal((rows, cols), dtype=np.float32) / np.sqrt(cols)).astype(np.float16)

    kv = HIDDEN // HEADS * KV_HEADS
    tensors = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN), "model.norm.weight": np.ones(HIDDEN, np.float16)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, rows, cols in (
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.k_proj", kv, HIDDEN),
            ("self_attn.v_proj", kv, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN),
            ("mlp.gate_proj", FFN, HIDDEN),
            ("mlp.up_proj", FFN, HIDDEN),
            ("mlp.down_proj", HIDDEN, FFN),
        ):
            tensors[f"{prefix}{name}.weight"] = matrix(rows, cols)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = np.ones(HIDDEN, np.float16)
    save_file(tensors, directory / "model.safetensors")
    return convert(open_source(str(directory)), tmp_path_factory.mktemp("artifact") / "random", scheme="nested")


def start(artifact: Path, point: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROBE, str(artifact), point], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    return process


def report(process: subprocess.Popen[str]) -> dict[str, int]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    result: dict[str, int] = json.loads(process.stdout.readline())
    return result


def stop(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=60)


def plane_bytes(artifact: Path, point: str) -> int:
    from haomiao.load.artifact import Artifact

    with Artifact.open(artifact) as opened:
        total = 0
        for name, tensor in opened.tensors.items():
            both = point == "int8" or "head" in name or "embed" in name
            total += tensor.nbytes if both else int(tensor.hi.nbytes)
        return total


@pytest.mark.parametrize("point", ["int8", "int4"])
def test_resident_size_is_planes_in_use_plus_kv(artifact: Path, point: str) -> None:
    process = start(artifact, point)
    try:
        measured = report(process)
    finally:
        stop(process)
    kv = 512 * LAYERS * KV_HEADS * (HIDDEN // HEADS) * 2 * 2
    planes = plane_bytes(artifact, point)
    print(f"\n{point}: resident {measured['rss'] / MB:.0f} MB, planes {planes / MB:.0f} MB, KV {kv / MB:.0f} MB")
    assert measured["rss"] <= planes + kv + ALLOWANCE
    assert measured["mapped"] <= planes + 8 * MB, "planes that are not in use were read"


def test_two_processes_share_the_artifact(artifact: Path) -> None:
    first, second = start(artifact, "int8"), start(artifact, "int8")
    try:
        measured = report(first)
        report(second)
    finally:
        stop(first)
        stop(second)
    print(f"\nmapped {measured['mapped'] / MB:.0f} MB, of them shared {measured['shared'] / MB:.0f} MB")
    assert measured["mapped"] > 50 * MB
    assert measured["shared"] >= 0.95 * measured["mapped"]
