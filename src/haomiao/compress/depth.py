"""Which layers go: those whose absence changes the model's answers least, measured, one after the other.

What a layer is worth is the KL between the model with all layers and the model without this one, on calibration text,
both at int8 rounded to nearest through the engine. Similarity of a layer's input and output (ShortGPT, Men et al.
2403.03853) is cheaper and does not see what later layers make of the difference; after each removal all that are left
are measured again, because what two layers are worth is not the sum (EvoPress, Sieberling et al. 2410.14649).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from haomiao.compress.error import measure_points, sequence_logits
from haomiao.compress.recipe import Recipe
from haomiao.compress.shrink import original_name, target_layers, without_layers
from haomiao.compress.workspace import Workspace
from haomiao.kernels.packed import PackedTensor
from haomiao.load.source import Progress, TensorSource
from haomiao.models.convert import resolve
from haomiao.models.encode import Encoder
from haomiao.models.registry import plan_for
from haomiao.types import F32, I32, KV_BLOCK_TOKENS

WINDOWS = 4
"""Calibration samples that layers are measured on."""
STAGE = "0000-depth"
POINT = "int8"

Tell = Callable[[str, int, int], None]
"""tell(what, layers measured, layers to measure)."""


def layers_left(
    source: TensorSource,
    recipe: Recipe,
    samples: I32,
    work: Workspace,
    *,
    threads: int | None,
    progress: Progress | None,
) -> list[int] | None:
    """The layers that the recipe leaves, None if all stay. `samples` [samples, tokens]: calibration's."""
    now = plan_for(source.config).layers
    stay = target_layers(now, recipe)
    if stay == now:
        return None

    def tell(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"compressing {source.name}: {what}", done, total)

    return choose_layers(source, now, stay, samples, work, group=recipe.group, threads=threads, tell=tell)


def choose_layers(
    source: TensorSource,
    now: int,
    stay: int,
    windows: I32,
    work: Workspace,
    *,
    group: int,
    threads: int | None,
    tell: Tell,
) -> list[int]:
    """The `stay` layers that are kept, ascending. Every removal is a stage of `work`. `windows` [samples, tokens]."""
    kept = list(range(now))
    gone = now - stay
    total = sum(now - i for i in range(gone))
    done = 0
    trial: _Trial | None = None
    for index in range(gone):
        name = f"{STAGE}-{index:03d}"
        if not work.done(name):
            trial = trial or _Trial(source, windows[:WINDOWS], group, threads)
            kl: dict[int, float] = {}
            for layer in kept:
                tell("choosing layers", done + len(kl), total)
                kl[layer] = trial.kl([other for other in kept if other != layer])
            least = min(kl, key=lambda layer: (kl[layer], layer))
            work.save(name, {}, {}, {"layer": least, "kl": kl[least], "without": {str(k): v for k, v in kl.items()}})
        done += len(kept)
        kept.remove(work.log(name)["layer"])
    return kept


class _Trial:
    """The whole model, rounded to nearest, and the KL of parts of it."""

    def __init__(self, source: TensorSource, windows: I32, group: int, threads: int | None) -> None:
        self._config, self._windows, self._threads = source.config, windows, threads
        self._plan = plan_for(source.config, windows.shape[1])
        encoder = Encoder(source, resolve(self._plan, source), "nested", group, 4, True)
        self._tensors: dict[str, PackedTensor] = {}
        self._vectors: dict[str, F32] = {}
        for spec in self._plan.weights.values():
            if spec.kind == "vector":
                self._vectors[spec.name] = encoder.vector(spec)
            else:
                self._tensors[spec.name] = encoder.matrix(spec)

    def kl(self, layers: list[int]) -> float:
        """KL of the model that has these layers only, nats per token."""
        plan = plan_for(without_layers(self._config, layers), self._windows.shape[1])
        tensors: dict[str, PackedTensor] = {}
        vectors: dict[str, F32] = {}
        for name, spec in plan.weights.items():
            before = original_name(name, layers)
            if spec.kind == "vector":
                vectors[name] = self._vectors[before]
            else:
                tensors[name] = self._tensors[before]
        found: dict[str, Any] = measure_points(
            plan, tensors, vectors, (POINT,), self._windows, self._whole, threads=self._threads
        )
        return float(found[POINT]["kl"]["estimate"])

    def _whole(self) -> Iterator[F32]:
        from haomiao.engine.executors.native import NativeExecutor

        length = self._windows.shape[1]
        executor = NativeExecutor(
            self._plan,
            self._tensors,
            self._vectors,
            points=(POINT,),
            kv_blocks=-(-length // KV_BLOCK_TOKENS),
            max_step_tokens=min(512, length),
            threads=self._threads,
        )
        try:
            for ids in self._windows:
                yield sequence_logits(executor, ids.tolist(), POINT)
        finally:
            executor.close()
