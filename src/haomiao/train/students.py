"""Who learns from a teacher: a compressed artifact as it is stored, or a checkpoint, perhaps with fewer layers.

Both offer `parameters` (leaves that want gradients), `weights(point)` and `write`. Knows nothing about losses or time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from haomiao.errors import InputError
from haomiao.load.artifact import Artifact, ArtifactWriter
from haomiao.models.plan import Plan
from haomiao.train.rounding import MovedVector, RoundedMatrix, fixed
from haomiao.train.starting import Starting
from haomiao.train.weights import write_checkpoint


class Student(Protocol):
    """What distillation needs of a student."""

    plan: Plan
    points: tuple[str, ...]
    """The points that are trained in turn."""
    parameters: dict[str, Tensor]

    def weights(self, point: str) -> Mapping[str, Tensor]:
        """The plan's weights as `point` has them, with gradients into the parameters."""
        ...

    def write(self, out: Path, about: dict[str, Any], log: bytes) -> Path:
        """Write what was learnt; `about` goes into an artifact's provenance."""
        ...


class Compressed:
    """An artifact: codes and scales of the layers and the norms learn; embedding and head stay as they are."""

    def __init__(self, artifact: Artifact, plan: Plan, point: str | None, device: torch.device) -> None:
        self.plan, self.artifact = plan, artifact
        stored = tuple(p for p in artifact.meta["points"] if p in ("int8", "int4"))
        if not stored or (point is not None and point not in stored):
            offered = ", ".join(artifact.meta["points"])
            raise InputError(f"the student offers {offered}: recovery needs int8 or int4", param="point")
        self.points = (point,) if point is not None else stored
        self._rounded: dict[str, RoundedMatrix] = {}
        self._vectors: dict[str, MovedVector] = {}
        self._rest: dict[str, Tensor] = {}
        self.parameters: dict[str, Tensor] = {}
        for spec in plan.weights.values():
            if spec.kind == "vector":
                self._vectors[spec.name] = vector = MovedVector(artifact.vectors[spec.name], device)
                self.parameters[spec.name] = vector.parameter
                continue
            packed = artifact.tensors[spec.name]
            if spec.role == "body" and packed.encoding in ("planes", "int8"):
                self._rounded[spec.name] = matrix = RoundedMatrix(packed, device)
                self.parameters |= {f"{spec.name}/{what}": p for what, p in matrix.parameters.items()}
            else:
                self._rest[spec.name] = fixed(packed).to(device)

    def weights(self, point: str) -> Mapping[str, Tensor]:
        """As `point` reads them."""
        vectors = {name: vector.value() for name, vector in self._vectors.items()}
        return self._rest | vectors | {name: matrix.weights(point) for name, matrix in self._rounded.items()}

    def write(self, out: Path, about: dict[str, Any], log: bytes) -> Path:
        """An artifact in the same encodings. Its old errors do not hold any more; the caller measures new ones."""
        meta = {k: v for k, v in self.artifact.meta.items() if k not in ("errors", "log")}
        errors = about.pop("errors", None)
        meta["provenance"] = meta["provenance"] | {"distilled": about}
        if errors is not None:
            meta["errors"] = errors
        vectors = self.vectors()
        with ArtifactWriter(out) as writer:
            for spec in self.plan.weights.values():
                if spec.kind == "vector":
                    writer.add_vector(spec.name, vectors[spec.name])
                elif spec.name in self._rounded:
                    writer.add_tensor(spec.name, self._rounded[spec.name].pack())
                else:
                    writer.add_tensor(spec.name, self.artifact.tensors[spec.name])
            for name, path in self.artifact.files.items():
                if name != "README.md":
                    writer.add_file(name, path)
            writer.add_file("training_log.jsonl", log)
            return writer.finish(meta)

    def packed(self) -> dict[str, Any]:
        """Every matrix as it will be stored, for measuring."""
        return dict(self.artifact.tensors) | {name: matrix.pack() for name, matrix in self._rounded.items()}

    def vectors(self) -> dict[str, Any]:
        """Every vector as it will be stored."""
        return {name: vector.value().detach().cpu().numpy() for name, vector in self._vectors.items()}


class Smaller:
    """A checkpoint: all weights learn. With `layers`, the teacher's own with that many of its layers."""

    def __init__(self, model: Starting, length: int, layers: int | None, device: torch.device) -> None:
        self.points: tuple[str, ...] = ("full",)
        self._model = model
        whole = model.plan(length)
        weights = model.weights(whole)
        if layers is not None:
            if not 1 <= layers < whole.layers:
                raise InputError(f"--layers must be 1 to {whole.layers - 1}: fewer than the teacher's", param="layers")
            kept = [round(i * (whole.layers - 1) / max(1, layers - 1)) for i in range(layers)]
            model = dataclasses.replace(model, config=with_layers(model.config, layers, kept))
            self._model, whole = model, model.plan(length)
            weights = {name: weights[_origin(name, kept)] for name in whole.weights}
        self.plan = whole
        self.parameters = {name: weights[name].to(device).requires_grad_() for name in whole.weights}

    def weights(self, point: str) -> Mapping[str, Tensor]:
        """The parameters themselves."""
        return self.parameters

    def write(self, out: Path, about: dict[str, Any], log: bytes) -> Path:
        """A Hugging Face directory."""
        files = dict(self._model.files) | {"training_log.jsonl": log}
        return write_checkpoint(out, self.plan, self.parameters, self._model.config, files, dtype="float32")


def with_layers(config: Mapping[str, Any], count: int, kept: list[int]) -> dict[str, Any]:
    """A config with only some layers; lists of one entry a layer lose theirs too."""
    old = config.get("num_hidden_layers")
    cut = {k: [v[i] for i in kept] if isinstance(v, list) and len(v) == old else v for k, v in config.items()}
    return cut | {"num_hidden_layers": count}


def _origin(name: str, kept: list[int]) -> str:
    """The teacher's weight for one of the student's, in the plan's names."""
    if not name.startswith("layers."):
        return name
    _, layer, rest = name.split(".", 2)
    return f"layers.{kept[int(layer)]}.{rest}"
