"""Where a command's MODEL leads: a conversion in the cache, an artifact, a checkpoint, a tokenizer; what is said of it.

Stands between the commands and the rooms `load`, `models` and `text`; everything is imported when it is needed.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haomiao.errors import InputError

if TYPE_CHECKING:
    from haomiao.load.artifact import Artifact
    from haomiao.load.source import TensorSource
    from haomiao.text.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]


def origin(args: Namespace) -> dict[str, Any]:
    """Keyword arguments that say where an id is fetched from."""
    return {"revision": getattr(args, "revision", None), "offline": getattr(args, "offline", None)}


def open_tokenizer(model: str | None, args: Namespace) -> Tokenizer:
    """The tokenizer of a model, or of a tokenizer file; no weights are read."""
    from haomiao.text.tokenizer import Tokenizer

    local = find_artifact(model)
    if local is not None:
        return Tokenizer(local)
    assert model is not None
    path = Path(model).expanduser()
    if path.exists():
        return Tokenizer(path)
    source = open_checkpoint(model, args)
    try:
        for name in ("tokenizer.json", "tokenizer.gguf", "tokenizer.model", "vocab.json"):
            found = source.files.get(name)
            if isinstance(found, Path):
                return Tokenizer(found if name == "tokenizer.gguf" else found.parent)
        raise InputError(f"{model} has no tokenizer", param="model")
    finally:
        source.close()


def open_checkpoint(model: str, args: Namespace, progress: Progress | None = None) -> TensorSource:
    """A checkpoint by path or id, fetched if need be."""
    from haomiao.load.source import open_source

    return open_source(model, progress=progress, **origin(args))


def find_artifact(model: str | None) -> Path | None:
    """The folder of an artifact: the embedded one, a path, or a conversion by its name in `haomiao ls`; else None."""
    from haomiao.load.artifact import is_artifact

    if model is None:
        from haomiao.models.open import embedded_path

        return embedded_path()
    path = Path(model).expanduser()
    if path.name == "model.haomiao" and path.is_file():
        return path.parent
    if is_artifact(path):
        return path
    if path.exists():
        return None
    from haomiao.load.cache import list_models

    return next((entry.path for entry in list_models() if entry.name == model), None)


def describe(model: str | None, args: Namespace) -> dict[str, Any]:
    """What `show` says: of an artifact its meta section, of a checkpoint what its config and header tell."""
    path = find_artifact(model)
    if path is not None:
        return describe_artifact(path)
    assert model is not None
    source = open_checkpoint(model, args)
    try:
        return describe_checkpoint(source)
    finally:
        source.close()


def describe_artifact(path: Path) -> dict[str, Any]:
    """JSON-ready facts about an artifact."""
    from haomiao.load.artifact import Artifact

    with Artifact.open(path) as artifact:
        meta = artifact.meta
        return {
            "name": path.resolve().name,
            "path": str(path),
            "kind": "artifact",
            "family": meta.get("family"),
            "points": meta.get("points", []),
            "default_point": meta.get("default_point"),
            "parameters": parameters(artifact),
            "tiles_left": tiles_left(artifact),
            "bytes": artifact.nbytes,
            "errors": meta.get("errors"),
            "recipe": meta.get("recipe"),
            "provenance": meta.get("provenance"),
        }


def describe_checkpoint(source: TensorSource) -> dict[str, Any]:
    """JSON-ready facts about a checkpoint that is not converted; its weights are not read."""
    import math
    from collections import Counter

    from haomiao.models.registry import plan_for

    plan = plan_for(source.config)
    names = source.names()
    return {
        "name": source.name,
        "kind": "checkpoint",
        "family": plan.family,
        "points": ["full", "bf16", "int8", "int4"],
        "layers": plan.layers,
        "hidden_size": plan.hidden_size,
        "vocab_size": plan.vocab_size,
        "max_context": plan.max_context,
        "parameters": sum(math.prod(source.shape(name)) for name in names),
        "types": dict(Counter(source.dtype(name) for name in names)),
    }


def parameters(artifact: Artifact) -> int:
    """Weights of all matrices and vectors, padding of columns and rows left out."""
    matrices = sum(tensor.rows * tensor.cols for tensor in artifact.tensors.values())
    return matrices + sum(int(vector.size) for vector in artifact.vectors.values())


def tiles_left(artifact: Artifact) -> float | None:
    """Share of all blocks of 32 rows x one group that matrices under tile masks store; None where there is no mask."""
    masked = [tensor for tensor in artifact.tensors.values() if tensor.kept is not None]
    blocks = sum(tensor.tiles * tensor.groups for tensor in masked)
    return round(sum(tensor.share * tensor.tiles * tensor.groups for tensor in masked) / blocks, 4) if blocks else None


def sections(path: Path) -> list[dict[str, Any]]:
    """Every matrix and vector of an artifact."""
    from haomiao.load.artifact import Artifact

    with Artifact.open(path) as artifact:
        rows: list[dict[str, Any]] = [
            {
                "name": name,
                "encoding": tensor.encoding + ("+lo" if tensor.lo is not None else ""),
                "rows": tensor.rows,
                "cols": tensor.cols,
                "group": tensor.group,
                "bytes": tensor.nbytes,
                "tiles_left": tensor.share,
            }
            for name, tensor in artifact.tensors.items()
        ]
        rows += [
            {"name": name, "encoding": "f32", "rows": int(v.size), "cols": 1, "group": 0, "bytes": int(v.nbytes)}
            for name, v in artifact.vectors.items()
        ]
    return rows


def verify(path: Path, progress: Progress) -> None:
    """Check every byte of an artifact. Raises `ArtifactError` naming the section that is wrong."""
    from haomiao.load.artifact import Artifact

    with Artifact.open(path) as artifact:
        artifact.verify(lambda done, total: progress("verifying", done, total))
