"""Reading a Hugging Face config with distrust: every value has a type and a range, and contradictions have one line.

Knows the terms that families share, not what any family does with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from haomiao.errors import ModelError, UnsupportedModelError
from haomiao.models.plan import Activation

MAX_SIZE = 1 << 24
"""No dimension, vocabulary or layer count of a real model comes near this; far below where 64-bit products overflow."""

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


class ConfigReader:
    """Typed access to a config dict. Every method raises `ModelError` that names the key."""

    def __init__(self, values: Mapping[str, Any], where: str = "config") -> None:
        if not isinstance(values, Mapping):
            raise ModelError(f"{where} is not an object")
        self.values = values
        self.where = where

    def has(self, key: str) -> bool:
        """True if the key is there and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, least: int = 1, greatest: int = MAX_SIZE) -> int:
        """A whole number in [least, greatest]; `default` where the key is absent or null."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ModelError(f"{self.where} has no {key}")
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_whole(value):
            raise ModelError(f"{self.where}: {key} must be a whole number, not {shorten(value)}")
        if not least <= value <= greatest:
            raise ModelError(f"{self.where}: {key} = {shorten(value)} is outside {least}..{greatest}")
        return int(value)

    def number(self, key: str, default: float | None = None, *, above: float = 0.0, most: float = 1e12) -> float:
        """A finite number in (above, most]."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ModelError(f"{self.where} has no {key}")
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_finite(value):
            raise ModelError(f"{self.where}: {key} must be a finite number, not {shorten(value)}")
        if not above < value <= most:
            raise ModelError(f"{self.where}: {key} = {shorten(value)} must be above {above:g} and at most {most:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ModelError(f"{self.where}: {key} must be true or false, not {shorten(value)}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ModelError(f"{self.where} has no {key}")
            return default
        if not isinstance(value, str):
            raise ModelError(f"{self.where}: {key} must be a string, not {shorten(value)}")
        return value

    def section(self, key: str) -> ConfigReader | None:
        """A nested object, or None."""
        value = self.values.get(key)
        return None if value is None else ConfigReader(value, f"{self.where}.{key}")

    def window(self, key: str = "sliding_window", default: int = 0) -> int:
        """A sliding window in tokens; null and absent mean none (0) or, where absent, `default`."""
        if key in self.values and self.values[key] is None:
            return 0
        return self.integer(key, default, least=0)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` finite positive numbers."""
        value = self.values.get(key)
        if not isinstance(value, (list, tuple)) or len(value) != count:
            raise ModelError(f"{self.where}: {key} must be a list of {count} numbers")
        for entry in value:
            if isinstance(entry, bool) or not isinstance(entry, (int, float)) or not is_finite(entry) or entry <= 0:
                raise ModelError(f"{self.where}: {key} holds {shorten(entry)}, not a positive number")
        return tuple(float(entry) for entry in value)

    def activation(self, *keys: str, default: str) -> Activation:
        """The activation function under the first key that is present."""
        name = next((self.text(key) for key in keys if self.has(key)), default)
        if name not in ACTIVATIONS:
            raise UnsupportedModelError(f"activation function {shorten(name)} is not supported")
        return ACTIVATIONS[name]

    def layer_types(self, layers: int) -> tuple[str, ...] | None:
        """`layer_types`: one of `full_attention`, `sliding_attention` per layer, or None if absent."""
        value = self.values.get("layer_types")
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or len(value) != layers:
            raise ModelError(f"{self.where}: layer_types must name the kind of each of the {layers} layers")
        for kind in value:
            if kind not in ("full_attention", "sliding_attention"):
                raise UnsupportedModelError(f"layers of kind {shorten(kind)} are not supported")
        return tuple(value)


def is_whole(value: float) -> bool:
    """An integer, or a float without a fraction (writers print 32.0 for 32)."""
    return isinstance(value, int) or (math.isfinite(value) and value == int(value))


def is_finite(value: float) -> bool:
    """Finite as a double (an integer of a thousand digits is not)."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def shorten(value: Any) -> str:
    """A hostile value as at most 60 printable characters."""
    try:
        text = repr(value)
    except Exception:  # an integer with too many digits to print, a broken __repr__
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


def eos_token_ids(values: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end an answer: `generation_config`'s where it names them, else the config's own."""
    config = ConfigReader(values)
    for reader in (config.section("generation_config"), config, config.section("text_config")):
        found = None if reader is None else reader.values.get("eos_token_id")
        if reader is None or found is None:
            continue
        ids = found if isinstance(found, (list, tuple)) else [found]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < MAX_SIZE:
                raise ModelError(f"{reader.where}: eos_token_id holds {shorten(token)}, not a token id")
        return tuple(dict.fromkeys(ids))
    return ()


def attention_heads(config: ConfigReader, hidden: int, head_dim: int | None = None) -> tuple[int, int, int]:
    """(query heads, KV heads, head dimension), checked against each other.

    `head_dim` stands in where the config gives none; None: hidden / heads.
    """
    heads = config.integer("num_attention_heads", greatest=1 << 12)
    kv_heads = config.integer("num_key_value_heads", heads, greatest=1 << 12)
    if heads % kv_heads:
        raise ModelError(f"config contradicts itself: {heads} attention heads, {kv_heads} key/value heads")
    if head_dim is None and not config.has("head_dim"):
        if hidden % heads:
            raise ModelError(f"config contradicts itself: hidden_size {hidden} does not divide into {heads} heads")
        head_dim = hidden // heads
    head_dim = config.integer("head_dim", head_dim, greatest=1 << 12)
    if head_dim > 1 << 12:
        raise ModelError(f"config: heads of {head_dim} channels are too wide (at most {1 << 12})")
    return heads, kv_heads, head_dim


def layer_count(config: ConfigReader, key: str = "num_hidden_layers") -> int:
    """Number of layers."""
    return config.integer(key, greatest=1 << 12)
