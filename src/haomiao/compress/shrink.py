"""A smaller model of the same family: fewer layers, neurons and heads, the same in every layer.

What a recipe asks for becomes sizes that the family's config can say (so that the artifact, and what is exported from
it, is an ordinary checkpoint of that family) and that kernels like: neurons in whole groups, query heads the same
number for every KV head. Which of them go is `prune.structured`'s choice, made as calibration comes to a layer; here
are the sizes, the config and the places of the plan. The wide plan has the smaller model's layers at their full width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from haomiao.compress.prune.structured import choose_blocks, choose_heads, choose_nested
from haomiao.compress.recipe import Recipe
from haomiao.compress.solver import F64, I64
from haomiao.errors import InputError, UnsupportedModelError
from haomiao.kernels.packed import TILE_ROWS
from haomiao.models import plan as ops
from haomiao.models.registry import identify, plan_for
from haomiao.types import F32


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model: layers, and in each of them FFN neurons, query heads and KV heads."""

    layers: int
    neurons: int
    heads: int
    kv_heads: int


@dataclass(frozen=True, slots=True)
class Block:
    """A place where width can be taken: `maker` (qkv; gate and up) makes what `taker` (out; down) takes."""

    maker: str
    bias: str | None
    taker: str
    begin: int
    """Place of the maker in the plan; the taker's input stands ready before `end`."""
    end: int
    source: str
    """The taker's input."""
    attention: ops.Attention | None
    glu: bool


def sizes_of(config: Mapping[str, Any]) -> Sizes:
    """The sizes that a config states. Raises `UnsupportedModelError` where layers differ in width."""
    plan = plan_for(config)
    attention = [op for op in plan.ops if isinstance(op, ops.Attention)]
    widths = {(op.heads, op.kv_heads) for op in attention}
    ffn = {spec.shapes[0][1 - (spec.transform == "transpose")] for spec in _takers(plan, attention=False)}
    if len(widths) != 1 or len(ffn) != 1:
        raise UnsupportedModelError(f"{plan.family}: layers of different widths cannot be pruned by structure yet")
    heads, kv_heads = widths.pop()
    return Sizes(plan.layers, ffn.pop(), heads, kv_heads)


def _takers(plan: ops.Plan, *, attention: bool) -> list[ops.WeightSpec]:
    found = [block for block in blocks(plan) if (block.attention is not None) == attention]
    return [plan.weights[block.taker] for block in found]


def blocks(plan: ops.Plan) -> list[Block]:
    """Every attention and every FFN of a plan, in order."""
    out = []
    linears = [(place, op) for place, op in enumerate(plan.ops) if isinstance(op, ops.Linear)]
    for (begin, maker), (end, taker) in pairwise(linears):
        between = plan.ops[begin + 1 : end]
        made = next((op for op in between if isinstance(op, ops.Attention | ops.Glu | ops.Activate)), None)
        if made is None or made.out != taker.source:
            continue
        attention = made if isinstance(made, ops.Attention) else None
        glu = isinstance(made, ops.Glu)
        out.append(Block(maker.weight, maker.bias, taker.weight, begin, end, taker.source, attention, glu))
    return out


# ---- sizes


def target_layers(layers: int, recipe: Recipe) -> int:
    """How many layers the recipe leaves: the nearest number, at least one goes (if any shall) and one stays."""
    share = next((prune.share for prune in recipe.structured if prune.kind == "layers"), None)
    return layers if share is None else layers - _some(layers, share, "layers")


def target_width(now: Sizes, recipe: Recipe, layer_weights: tuple[int, int]) -> Sizes:
    """What the recipe's structured pruning leaves of the width. `layer_weights`: of a layer's attention and its FFN.

    Heads and KV groups are rounded to the nearest number that can be, at least one goes and one stays. `structured`
    takes whole heads as far as the share allows, and neurons until the share of the layers' weights is gone.
    """
    shares = {prune.kind: prune.share for prune in recipe.structured}
    out = now
    if "groups" in shares:
        gone = _some(now.kv_heads, shares["groups"], "groups")
        kv_heads = now.kv_heads - gone
        out = replace(out, kv_heads=kv_heads, heads=now.heads // now.kv_heads * kv_heads)
    each = now.heads // now.kv_heads
    if "heads" in shares:
        gone = _some(each, shares["heads"], "heads")
        out = replace(out, heads=(each - gone) * out.kv_heads)
    if "structured" in shares:
        share = shares["structured"]
        gone = min(int(each * share + 1e-9), each - 1)
        out = replace(out, heads=(each - gone) * out.kv_heads)
        attention, ffn = layer_weights
        # what the heads give of attention's weights; k and v stay, so this is what q and out give
        given = gone * now.kv_heads / now.heads * attention * now.heads / (now.heads + now.kv_heads)
        shares = {"neurons": min(max((share * (attention + ffn) - given) / ffn, 0.0), 0.999)}
    if "neurons" in shares:
        unit = max(recipe.group, TILE_ROWS)
        kept = round(now.neurons * (1 - shares["neurons"]) / unit) * unit
        if kept >= now.neurons:
            kept = (now.neurons - 1) // unit * unit
        if kept < unit:
            raise InputError(f"of {now.neurons} neurons not even {unit} (a group) would stay", param="prune")
        out = replace(out, neurons=kept)
    return out


def _some(count: int, share: float, what: str) -> int:
    """How many of `count` go: at least one, and one stays."""
    if count < 2:
        raise InputError(f"{what} cannot be pruned: there is only one{' a KV head' * (what == 'heads')}", param="prune")
    return min(max(round(count * share), 1), count - 1)


# ---- the config


def shrunk_config(config: Mapping[str, Any], sizes: Sizes, layers: Sequence[int]) -> dict[str, Any]:
    """The config of the smaller model, which keeps `layers`. Raises `UnsupportedModelError` where the family's config
    cannot say it."""
    now = sizes_of(config)
    kind, _ = identify(config)
    if "text_config" in config:
        raise UnsupportedModelError("a text model inside a multimodal config cannot be pruned by structure")
    out = dict(config)
    if kind == "gpt2":
        if (sizes.heads, sizes.kv_heads) != (now.heads, now.kv_heads):
            raise UnsupportedModelError("gpt2: heads cannot be pruned, its config cannot say how wide a head is")
        if sizes.neurons != now.neurons:
            out["n_inner"] = sizes.neurons
        depth = "num_hidden_layers" if "n_layer" not in config else "n_layer"
    else:
        depth = "num_hidden_layers"
        if sizes.neurons != now.neurons:
            out["intermediate_size"] = sizes.neurons
        if (sizes.heads, sizes.kv_heads) != (now.heads, now.kv_heads):
            head_dim = plan_for(config).head_dims[0]
            out |= {"num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads, "head_dim": head_dim}
    if len(layers) != now.layers:
        out |= {key: [v[i] for i in layers] for key, v in out.items() if isinstance(v, list) and len(v) == now.layers}
        out[depth] = len(layers)
        _same_layers(config, out, layers)
    return out


def without_layers(config: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """The config of the model that has only these layers."""
    return shrunk_config(config, replace(sizes_of(config), layers=len(layers)), layers)


def _same_layers(config: Mapping[str, Any], smaller: Mapping[str, Any], layers: Sequence[int]) -> None:
    """Refuse a config by which a layer that moved would compute something else (windows, positions by its number)."""
    before, after = _layer_kinds(plan_for(config)), _layer_kinds(plan_for(smaller))
    if [before[i] for i in layers] != after:
        raise UnsupportedModelError("layers of this model differ by their place, and cannot be taken out")


def _layer_kinds(plan: ops.Plan) -> list[tuple[Any, ...]]:
    """What tells layers apart besides their weights: window, scale, rotation."""
    found = []
    rope: tuple[Any, ...] = ()
    for op in plan.ops:
        if isinstance(op, ops.Rope):
            rope = (*rope, plan.ropes[op.rope])
        elif isinstance(op, ops.Attention):
            found.append((op.window, op.scale, op.softcap, rope))
            rope = ()
    return found


def renamed(plan: ops.Plan, original: ops.Plan, names: Mapping[str, str], layers: Sequence[int]) -> dict[str, str]:
    """The checkpoint's names of a plan's sources, where layer i of the plan is `layers[i]` of the original's."""
    found: dict[str, str] = {}
    for spec in plan.weights.values():
        before = original.weights.get(original_name(spec.name, layers))
        sources = spec.sources if before is None else before.sources
        found |= {new: names[old] for new, old in zip(spec.sources, sources, strict=True) if old in names}
    return found


def original_name(name: str, layers: Sequence[int]) -> str:
    """The name that a weight of the smaller model has in the original's plan."""
    parts = name.split(".")
    if parts[0] == "layers":
        parts[1] = str(layers[int(parts[1])])
    return ".".join(parts)


# ---- cutting


def maker_rows(block: Block, kept: I64) -> I64:
    """Rows of the maker that stay, in the smaller matrix's order. `kept`: query heads, or neurons."""
    if block.attention is None:
        if not block.glu:
            return kept
        tiles = kept.reshape(-1, 1, TILE_ROWS)
        gates = tiles // TILE_ROWS * (2 * TILE_ROWS) + tiles % TILE_ROWS
        rows: I64 = (gates + np.array([0, TILE_ROWS])[None, :, None]).reshape(-1)
        return rows
    op = block.attention
    groups = np.unique(kept // (op.heads // op.kv_heads))
    parts = ((0, kept), (op.k_offset, groups), (op.v_offset, groups))
    return np.concatenate([offset + channels(heads, op.head_dim) for offset, heads in parts])


def channels(heads: I64, head_dim: int) -> I64:
    """The columns of heads."""
    columns: I64 = (heads[:, None] * head_dim + np.arange(head_dim)).reshape(-1)
    return columns


def shrinks(block: Block, wide: Sizes, sizes: Sizes) -> bool:
    """True if something goes in this block."""
    if block.attention is None:
        return sizes.neurons != wide.neurons
    return (sizes.heads, sizes.kv_heads) != (wide.heads, wide.kv_heads)


def choose(block: Block, taker: F32, hessian: F64, wide: Sizes, sizes: Sizes, damping: float) -> tuple[I64, I64]:
    """(heads or neurons that stay, the taker's columns that they are), by the error of the taker [rows, cols]."""
    if block.attention is None:
        kept = choose_blocks(taker, hessian, size=1, quotas=[(np.arange(wide.neurons), sizes.neurons)], damping=damping)
        return kept, kept
    kept = choose_heads(
        taker,
        hessian,
        head_dim=block.attention.head_dim,
        before=(wide.kv_heads, wide.heads // wide.kv_heads),
        after=(sizes.kv_heads, sizes.heads // sizes.kv_heads),
        damping=damping,
    )
    return kept, channels(kept, block.attention.head_dim)


def choose_neurons(taker: F32, hessian: F64, wide: Sizes, narrow: Sequence[Sizes], damping: float) -> list[I64]:
    """The neurons that stay at each of several sizes, as `choose` has them, in the time of the smallest."""
    stay = [sizes.neurons for sizes in narrow]
    return choose_nested(taker, hessian, columns=wide.neurons, stay=stay, damping=damping)


def layer_weights(plan: ops.Plan) -> tuple[int, int]:
    """Weights of the first layer's attention and of its FFN."""
    out = [0, 0]
    for block in blocks(plan)[:2]:
        for name in (block.maker, block.taker):
            out[block.attention is None] += plan.weights[name].rows * plan.weights[name].cols
    return out[0], out[1]
