"""The model that a run begins with: a checkpoint of any kind that we read, or an artifact of ours.

An artifact's matrices are in the plan's shapes already: they are unpacked at the point asked for. Knows nothing about
what is learnt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haomiao.compress.export.parts import config_of
from haomiao.errors import InputError
from haomiao.kernels.pack import unpack
from haomiao.load.artifact import Artifact, is_artifact
from haomiao.load.source import TensorSource, open_source
from haomiao.models.open import embedded_path
from haomiao.models.plan import Plan
from haomiao.models.registry import plan_for
from haomiao.text.tokenizer import Tokenizer
from haomiao.train.weights import read_weights


@dataclass(frozen=True)
class Starting:
    """A model before training. `files` are its tokenizer's, `artifact` is set where it is one."""

    name: str
    identity: str
    config: dict[str, Any]
    files: Mapping[str, Path | bytes]
    source: TensorSource | None
    artifact: Artifact | None

    def plan(self, length: int) -> Plan:
        """The plan for sequences of at most `length` tokens."""
        return plan_for(self.config, length)

    def weights(self, plan: Plan, point: str | None = None) -> dict[str, Tensor]:
        """Weights in float32, of an artifact at `point` (default: with all planes that are stored)."""
        if self.source is not None:
            return read_weights(plan, self.source)
        assert self.artifact is not None  # one or the other
        found: dict[str, Tensor] = {}
        for spec in plan.weights.values():
            if spec.kind == "vector":
                values = self.artifact.vectors[spec.name]
            else:
                body = spec.role == "body" and point == "int4"
                values = unpack(self.artifact.tensors[spec.name], "hi" if body else "hi+lo")
            found[spec.name] = torch.from_numpy(np.array(values, np.float32))
        return found

    def shortened(self, layers: int) -> Starting:
        """The same model without the layers after the first `layers`. Raises `InputError` if it has not as many."""
        key = next((key for key in ("num_hidden_layers", "n_layer") if isinstance(self.config.get(key), int)), None)
        if key is None or not 1 <= layers <= self.config[key]:
            has = "it does not say how many it has" if key is None else f"it has {self.config[key]}"
            raise InputError(f"{self.name} cannot keep {layers} layers: {has}", param="layers")
        config = self.config | {key: layers}
        if isinstance(config.get("layer_types"), list):
            config["layer_types"] = config["layer_types"][:layers]
        return dataclasses.replace(self, config=config)

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer. Raises `InputError` where it has none."""
        for content in self.files.values():
            if isinstance(content, Path):
                return Tokenizer(str(content.parent if content.suffix != ".gguf" else content))
        raise InputError(f"{self.name} has no tokenizer, so text cannot be learnt", param="model")

    def end_token(self) -> int | None:
        """The token that ends an answer: the config's, or the generation config's."""
        for place in (self.config, self.config.get("generation_config") or {}):
            end = place.get("eos_token_id")
            if isinstance(end, list):
                end = end[0] if end else None
            if isinstance(end, int):
                return end
        return None


def open_starting(name: str | None, **options: Any) -> Starting:
    """Open what `name` means: an artifact, a checkpoint, an id; None is the embedded model. Errors as `open_source`."""
    path = embedded_path() if name is None else Path(name).expanduser()
    if path.name == "model.haomiao":
        path = path.parent
    if is_artifact(path):
        artifact = Artifact.open(path)
        identity = str(artifact.meta.get("provenance", {}).get("identity", "")) + str(artifact.nbytes)
        files: dict[str, Path | bytes] = {
            name: file for name, file in artifact.files.items() if name not in ("README.md", "tokenizer.table")
        }
        return Starting(path.name, identity, config_of(artifact), files, None, artifact)
    source = open_source(str(name), **options)
    return Starting(source.name, source.identity, dict(source.config), source.files, source, None)
