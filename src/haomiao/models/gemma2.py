"""Gemma 2: norms before and after, weights stored as offsets from one, soft caps, every other layer sliding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from haomiao.errors import UnsupportedModelError
from haomiao.kernels.pack import from_bf16, to_bf16
from haomiao.models.config import ConfigReader
from haomiao.models.decoder import Decoder, decoder_plan, read_decoder
from haomiao.models.plan import Plan


def plan_for(config: ConfigReader, max_context: int) -> Plan:
    """The plan of a Gemma 2 config; `max_context` is the longest sequence that will be run."""
    model = read_gemma(config, "gemma2", max_context, positions=8192)
    sliding = sliding_layers(config, model.layers, pattern=2)
    window = config.window(default=4096)
    return decoder_plan(
        replace(
            model,
            windows=tuple(window if slides else 0 for slides in sliding),
            attention_softcap=softcap(config, "attn_logit_softcapping", 50.0),
            logit_softcap=softcap(config, "final_logit_softcapping", 30.0),
        )
    )


def read_gemma(config: ConfigReader, family: str, max_context: int, *, positions: int) -> Decoder:
    """What Gemma 2 and 3 have in common."""
    if config.flag("use_bidirectional_attention", False):
        raise UnsupportedModelError("bidirectional attention (an embedding model) is not supported")
    bias = config.flag("attention_bias", False)
    model = read_decoder(
        config,
        family,
        max_context,
        positions=positions,
        head_dim=256,
        tied=True,
        activation="gelu_pytorch_tanh",
    )
    return replace(
        model,
        activation=config.activation("hidden_activation", default="gelu_pytorch_tanh"),
        qkv_bias=bias,
        out_bias=bias,
        norm_offset=True,
        post_norms=True,
        pre_ffn_norm="pre_feedforward_layernorm",
        scale=config.number("query_pre_attn_scalar", 256.0) ** -0.5,
        embed_scale=embedding_scale(model.hidden, config),
    )


def embedding_scale(hidden: int, config: ConfigReader) -> float:
    """sqrt(hidden), rounded to the checkpoint's own type: the models were trained with the rounded value."""
    exact = np.float32(hidden**0.5)
    dtype = config.text("dtype", config.text("torch_dtype", "float32"))
    if dtype == "bfloat16":
        return float(from_bf16(to_bf16(np.array([exact])))[0])
    return float(np.float16(exact)) if dtype == "float16" else float(exact)


def softcap(config: ConfigReader, key: str, default: float) -> float:
    """A cap, 0 for none. A key that is there and null switches it off; an absent one means the family's default."""
    if key in config.values and config.values[key] is None:
        return 0.0
    return config.number(key, default)


def sliding_layers(config: ConfigReader, layers: int, pattern: int) -> list[bool]:
    """Which layers slide: those that `layer_types` names, or all but every `pattern`-th."""
    kinds = config.layer_types(layers)
    if kinds is not None:
        return [kind == "sliding_attention" for kind in kinds]
    return [(index + 1) % pattern != 0 for index in range(layers)]
