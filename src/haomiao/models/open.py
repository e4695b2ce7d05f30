"""From a name to a model that can be run: an artifact is opened, anything else is converted once into the cache.

Knows where models come from and go to; nothing about executors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from haomiao.errors import InputError, ModelError, ModelNotFoundError
from haomiao.load.artifact import Artifact, is_artifact
from haomiao.models.config import eos_token_ids
from haomiao.models.plan import Plan
from haomiao.models.registry import plan_for, position_limit
from haomiao.models.weights import check_encodings, check_weights
from haomiao.types import POINTS

if TYPE_CHECKING:  # an artifact is opened without what converts checkpoints
    from haomiao.load.source import Progress, TensorSource
    from haomiao.models.encode import Scheme

EMBEDDED = "haomiao-tiny"
ASSETS = Path(__file__).resolve().parent.parent / "assets"


@dataclass(frozen=True)
class OpenedModel:
    """A model in kernel layout and its plan."""

    name: str
    artifact: Artifact
    plan: Plan
    points: tuple[str, ...]
    """Points that are switchable with the one that was asked for."""
    default_point: str
    position_limit: int
    """The longest sequence that the checkpoint is made for; `plan.max_context` may be less."""
    files_dir: Path
    """Where tokenizer.json and its companions lie."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer, by the checkpoint's config."""
        return eos_token_ids(self.artifact.meta["config"])

    def with_context(self, max_context: int) -> OpenedModel:
        """The same model, planned for sequences of up to `max_context` tokens."""
        return replace(self, plan=plan_for(self.artifact.meta["config"], max_context))


def open_model(
    name: str | Path | None,
    *,
    point: str | None = None,
    group: int = 32,
    max_context: int | None = None,
    revision: str | None = None,
    offline: bool | None = None,
    hugepages: bool = False,
    progress: Progress | None = None,
) -> OpenedModel:
    """Open an artifact, or convert a checkpoint (directory, GGUF file, Hugging Face id) into the cache and open that.

    None is the embedded model. `point` decides what is prepared: `full` and `bf16` keep floats, `int8` and `int4` share
    nested planes. Raises `ModelNotFoundError`, `ModelError`, `InputError`.
    """
    if point is not None and point not in POINTS:
        raise InputError(f"point must be one of {', '.join(POINTS)}, not {point!r}", param="point")
    if name is None:
        return opened(embedded_path(), EMBEDDED, point, max_context, hugepages)
    path = Path(name).expanduser()
    if is_artifact(path):
        return opened(path, path.resolve().name, point, max_context, hugepages)
    from haomiao.load import cache
    from haomiao.load.source import open_source
    from haomiao.models.convert import convert

    source = open_source(name, revision=revision, offline=offline, progress=progress)
    try:
        scheme = scheme_for(source, point)
        options = {"scheme": scheme} if scheme in ("full", "bf16") else {"scheme": scheme, "group": group}
        target = cache.artifact_path(source.name, source.identity, **options)
        with cache.conversion_lock(target):
            if not is_artifact(target):
                convert(source, target, scheme=scheme, group=group, progress=progress)
        cache.touch(target)
        return opened(target, source.name, point, max_context, hugepages)
    finally:
        source.close()


def scheme_for(source: TensorSource, point: str | None) -> Scheme:
    """How to convert a checkpoint for a point: floats as floats, else nested planes; a checkpoint of 8-bit codes keeps
    them unless int4 is asked for."""
    dtypes = {source.dtype(name) for name in source.names()}
    if point == "full" or (point == "bf16" and dtypes == {"bf16"}):
        return "full"
    if point == "bf16":
        return "bf16"
    return "exact" if any("8" in dtype for dtype in dtypes) and point != "int4" else "nested"


def embedded_path() -> Path:
    """The artifact inside the package."""
    path = ASSETS / EMBEDDED
    if not is_artifact(path):
        raise ModelNotFoundError("this installation has no embedded model; name one")
    return path


def opened(path: Path, name: str, point: str | None, max_context: int | None, hugepages: bool) -> OpenedModel:
    """Open an artifact at the points that are switchable with `point` (default: the artifact's own)."""
    artifact = Artifact.open(path, hugepages=hugepages)
    meta = artifact.meta
    offered = meta.get("points")
    if not isinstance(offered, list) or not offered or not all(isinstance(p, str) and p in POINTS for p in offered):
        raise ModelError(f"{path}: the artifact names no operating point that is known")
    config = meta.get("config")
    if not isinstance(config, dict):
        raise ModelError(f"{path}: the artifact holds no config")
    chosen = point or meta.get("default_point")
    if not isinstance(chosen, str) or chosen not in offered:
        raise InputError(
            f"{name} offers {', '.join(offered)}, not {chosen}; convert the original checkpoint for it", param="point"
        )
    plan = plan_for(config, max_context)
    family = POINTS[chosen].family
    points = tuple(p for p in offered if POINTS[p].family == family)
    check_weights(plan, artifact.tensors, artifact.vectors)
    check_encodings(plan, artifact.tensors, points)
    return OpenedModel(name, artifact, plan, points, chosen, position_limit(config), path)
