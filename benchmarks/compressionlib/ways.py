"""The ways of the table: a name, what is said of it, and the recipe."""

from __future__ import annotations

from typing import Any, NamedTuple


class Way(NamedTuple):
    """`recipe` holds what differs from the defaults; `point` is the one that stands for the way in the front."""

    title: str
    recipe: dict[str, Any]
    point: str = "int4"


WAYS: dict[str, Way] = {
    # rounding
    "rtn-int8": Way("int8, rounded to nearest", {"bits": 8, "method": "rtn"}, "int8"),
    "gptq-int8": Way("int8, GPTQ", {"bits": 8}, "int8"),
    "rtn-g32": Way("int4, rounded to nearest", {"method": "rtn"}),
    "awq-rtn-g32": Way("int4, AWQ", {"method": "rtn", "awq": True}),
    "rotate-rtn-g32": Way("int4, rotated", {"method": "rtn", "rotate": True}),
    "gptq-g32": Way("int4, GPTQ", {}),
    "gptq-g32-static": Way("int4, GPTQ, static order", {"order": "static"}),
    "gptq-g32-natural": Way("int4, GPTQ, natural order", {"order": "natural"}),
    "gptq-g32-alone": Way("int4, GPTQ, without a second plane", {"lo": False}),
    "awq-gptq-g32": Way("int4, AWQ and GPTQ", {"awq": True}),
    "rotate-gptq-g32": Way("int4, rotated, GPTQ", {"rotate": True}),
    "rtn-g128": Way("int4, rounded to nearest, group 128", {"method": "rtn", "group": 128}),
    "gptq-g128": Way("int4, GPTQ, group 128", {"group": 128}),
    "rtn-3bit": Way("3 bits (stored as 4), rounded to nearest", {"bits": 3, "method": "rtn"}),
    "gptq-3bit": Way("3 bits (stored as 4), GPTQ", {"bits": 3}),
    # the second plane
    "lo-shift-2": Way("GPTQ, lo_shift 2", {"lo_shift": 2}, "int8"),
    "lo-shift-3": Way("GPTQ, lo_shift 3", {"lo_shift": 3}, "int8"),
    "lo-shift-4": Way("GPTQ, lo_shift 4", {"lo_shift": 4}, "int8"),
    # structure
    "structured-20": Way("structured 20 %", {"prune": "structured:0.2"}),
    "structured-30": Way("structured 30 %", {"prune": "structured:0.3"}),
    "structured-50": Way("structured 50 %", {"prune": "structured:0.5"}),
    "neurons-10": Way("neurons 10 %", {"prune": "neurons:0.1"}),
    "neurons-30": Way("neurons 30 %", {"prune": "neurons:0.3"}),
    "groups-50": Way("KV groups 50 %", {"prune": "groups:0.5"}),
    "layers-17": Way("layers 17 %", {"prune": "layers:0.17"}),
    # tiles
    "tile-10": Way("tiles 10 %", {"prune": "tile:0.1"}),
    "tile-20": Way("tiles 20 %", {"prune": "tile:0.2"}),
    "tile-30": Way("tiles 30 %", {"prune": "tile:0.3"}),
    "tile-50": Way("tiles 50 %", {"prune": "tile:0.5"}),
    "tile-30-first": Way("tiles 30 %, cut first, then GPTQ", {"prune": "tile:0.3", "joint": False}),
    # single weights
    "magnitude-50": Way("magnitude 50 %", {"prune": "magnitude:0.5", "order": "static"}),
    "wanda-50": Way("Wanda 50 %, made up for", {"prune": "wanda:0.5", "order": "static"}),
    "wanda-50-first": Way("Wanda 50 %, then GPTQ", {"prune": "wanda:0.5", "joint": False}),
    "sparsegpt-50": Way("SparseGPT 50 %, joint", {"prune": "sparsegpt:0.5"}),
    "sparsegpt-50-first": Way("SparseGPT 50 %, then GPTQ", {"prune": "sparsegpt:0.5", "joint": False}),
    "sparsegpt-50-rtn": Way(
        "SparseGPT 50 %, then to nearest", {"prune": "sparsegpt:0.5", "joint": False, "method": "rtn"}
    ),
    "sparsegpt-50-int8": Way("SparseGPT 50 %, int8", {"prune": "sparsegpt:0.5", "bits": 8}, "int8"),
    "sparsegpt-2:4": Way("SparseGPT 2:4, joint", {"prune": "sparsegpt:2:4"}),
    "sparsegpt-70": Way("SparseGPT 70 %, uniform", {"prune": "sparsegpt:0.7"}),
    "sparsegpt-70-owl": Way("SparseGPT 70 %, OWL", {"prune": "sparsegpt:0.7", "allocation": "owl"}),
}
