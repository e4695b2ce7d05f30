"""Bytes of a step at every point, by hand on the plan of a small model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from haomiao.kernels.packed import PackedTensor, pack_mask, padded_columns, tile_bytes
from haomiao.measure.bytes import kv_bytes_per_token, operations_per_token, weight_bytes_per_step
from haomiao.models.plan import Plan
from haomiao.models.registry import plan_for

HIDDEN, FFN, VOCAB, LAYERS, GROUP = 64, 96, 70, 2, 32
CONFIG = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5},
    **{"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "vocab_size": VOCAB},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
    **{"tie_word_embeddings": True, "rope_theta": 10000.0},
}
BODY = LAYERS * (HIDDEN * (64 + 32 + 32) + HIDDEN * 64 + 3 * HIDDEN * FFN)


def nested(plan: Plan) -> Mapping[str, PackedTensor]:
    """Planes of the right sizes, all zero."""
    made: dict[str, PackedTensor] = {}
    for spec in plan.weights.values():
        if spec.kind != "vector":
            hi, lo = tile_bytes("planes", padded_columns("planes", spec.cols, GROUP), GROUP)
            tiles = -(-spec.rows // 32)
            zeros = [np.zeros(tiles * size, np.uint8) for size in (hi, lo)]
            made[spec.name] = PackedTensor("planes", spec.rows, spec.cols, GROUP, 4, zeros[0], zeros[1])
    return made


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_for(CONFIG)


def test_int4_reads_half_of_the_body_and_all_of_the_head(plan: Plan) -> None:
    weights = nested(plan)
    head = 96 * HIDDEN  # 70 rows are stored as three tiles of 32
    scales = 2 / GROUP
    assert weight_bytes_per_step(plan, weights, "int4") == BODY * (0.5 + scales) + head * (1 + scales)
    assert weight_bytes_per_step(plan, weights, "int8") == (BODY + head) * (1 + scales)


def test_kv_bytes(plan: Plan) -> None:
    values = LAYERS * 2 * 2 * 16  # layers, K and V, heads, dim
    assert kv_bytes_per_token(plan, "f32") == 4 * values
    assert kv_bytes_per_token(plan, "bf16") == 2 * values
    assert kv_bytes_per_token(plan, "int8") == values + LAYERS * 2 * 2 * 4


def test_operations_are_two_a_weight_of_the_body(plan: Plan) -> None:
    assert operations_per_token(plan) == 2 * BODY
    assert operations_per_token(plan, nested(plan)) == 2 * BODY


def test_what_a_tile_mask_leaves_out_is_not_counted(plan: Plan) -> None:
    weights = dict(nested(plan))
    before = weight_bytes_per_step(plan, weights, "int8"), operations_per_token(plan, weights)
    name, whole = next((name, w) for name, w in weights.items() if name.endswith("gate_up"))
    stored = np.zeros((whole.tiles, whole.groups), np.bool_)
    stored[0] = True
    share = 1 / whole.tiles
    hi, lo = (int(plane.size * share) for plane in (whole.hi, whole.lo))  # type: ignore[union-attr]
    weights[name] = replace(whole, hi=np.zeros(hi, np.uint8), lo=np.zeros(lo, np.uint8), kept=pack_mask(stored))
    after = weight_bytes_per_step(plan, weights, "int8"), operations_per_token(plan, weights)
    assert before[0] - after[0] == whole.nbytes - hi - lo
    assert before[1] - after[1] == round(2 * whole.rows * whole.cols * (1 - share))
