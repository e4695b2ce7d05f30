"""One compression: a checkpoint, a recipe and text in; an artifact with its measured errors out.

Layer by layer in the plan's order: the layer's inputs are taken from the stream of calibration samples, its matrix is
solved, kept in the workspace and used from then on. Beside it a reference runs with the original weights on samples
that are held out. Whatever is finished survives a kill; the artifact is a function of checkpoint, recipe, text and
machine alone, however often the run was interrupted. (BLAS divides its sums by its number of threads, so a run that
goes on keeps the number it began with.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from haomiao import __version__
from haomiao.compress import fold
from haomiao.compress.calibrate import Consume, Moments, Stage, Stream, stages
from haomiao.compress.depth import layers_left
from haomiao.compress.error import measure_points
from haomiao.compress.forward import Buffers, Weights
from haomiao.compress.headway import Headway
from haomiao.compress.layer import solve_layer
from haomiao.compress.planes import drop_planes, without_lo
from haomiao.compress.prune.masks import owl_shares
from haomiao.compress.quantize.rotate import Rotation
from haomiao.compress.recipe import Recipe
from haomiao.compress.reference import Reference
from haomiao.compress.shrink import original_name, renamed, without_layers
from haomiao.compress.solver import F64
from haomiao.compress.survey import survey_outliers
from haomiao.compress.text import Samples, read_texts, take_samples
from haomiao.compress.width import Behind, Width
from haomiao.compress.workspace import Workspace, digest
from haomiao.errors import InputError, ModelError
from haomiao.kernels.isa import allowed_cores
from haomiao.kernels.pack import unpack
from haomiao.kernels.packed import PackedTensor
from haomiao.load.artifact import ArtifactWriter
from haomiao.load.source import Progress, TensorSource
from haomiao.models.convert import carry_files, resolve
from haomiao.models.encode import Encoder
from haomiao.models.plan import Plan
from haomiao.models.registry import plan_for
from haomiao.types import F32

RANKING_WINDOWS = 4
"""Held-out samples that rank the second planes; all of them decide."""
SURVEY = "0000-survey"
SURVEY_SAMPLES = 8


def compress(
    source: TensorSource,
    out: Path,
    recipe: Recipe,
    *,
    encode: Callable[[str], list[int]] | None = None,
    samples: Samples | None = None,
    overwrite: bool = False,
    restart: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    tell: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Compress `source` by `recipe` into the artifact directory `out` and return it.

    `encode` is the model's tokenizer; `samples` stands in for it and for the recipe's text. Progress counts
    multiply-adds, so that time left can be told; a search calls `tell` with every point (`search.run`). Run again after
    an interruption, it goes on (`OUT.partial`), a search towards another goal too; `restart` begins anew. Raises
    `InputError`, `ModelError`, and `UnavailableError` if the disk is full: nothing is lost then.
    """
    import scipy.linalg.blas  # noqa: F401  (scipy has a BLAS of its own, which must be there when threads are limited)

    if samples is None:
        if encode is None:
            raise InputError(f"{source.name} has no tokenizer, so there is no text to calibrate on", param="model")
        texts = read_texts(recipe.text)
        samples = take_samples(texts, encode, samples=recipe.samples, held=recipe.held, length=recipe.length)
    check_target(out, overwrite)
    # what a search looks for decides nothing of the levels that it has solved, nor of what it has measured
    of_result = recipe.as_dict() | {"text": []} | ({"target_ms": None, "max_kl": None} if recipe.search else {})
    identity = {
        "haomiao": __version__,
        "source": hashlib.sha256(source.identity.encode()).hexdigest()[:32],
        "recipe": of_result,
        "samples": digest(samples.calibration, samples.held_out),
    }
    count = threads or len(allowed_cores())
    with (
        Workspace(out, identity, restart=restart, blas_threads=count) as work,
        threadpool_limits(work.blas_threads, "blas"),
    ):
        layers = layers_left(source, recipe, samples.calibration, work, threads=threads, progress=progress)
        job = Job(source, recipe, samples, work, layers=layers, threads=threads, progress=progress)
        if recipe.search:
            from haomiao.compress.search.run import search

            search(job, out, overwrite, tell)
        else:
            job.solve()
            job.write(out, overwrite)
        work.remove()
    return out


def check_target(out: Path, overwrite: bool) -> None:
    """Refuse before any work what the artifact's writer would refuse after it."""
    if (out.exists() and not out.is_dir()) or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise InputError(f"{out} exists already; nothing was written", param="output")


Besides = Callable[[str, F32, F64], tuple[dict[str, PackedTensor], dict[str, F32]]]


class Job:
    """The state of one run between its stages."""

    def __init__(
        self,
        source: TensorSource,
        recipe: Recipe,
        samples: Samples,
        work: Workspace,
        *,
        layers: list[int] | None = None,
        threads: int | None,
        progress: Progress | None,
    ) -> None:
        self.source, self.recipe, self.samples, self.work = source, recipe, samples, work
        self.threads = threads
        length = samples.calibration.shape[1]
        original = plan_for(source.config)
        if length > original.max_context:
            raise InputError(
                f"samples of {length} tokens; the model is made for {original.max_context}", param="length"
            )
        names = resolve(original, source)
        self.reference = Reference(Encoder(source, names, "full", recipe.group, 4), samples.held_out, work.folder)
        self.layers = list(range(original.layers)) if layers is None else layers
        wide = source.config if layers is None else without_layers(source.config, layers)
        names = renamed(plan_for(wide), original, names, self.layers)
        self.rotation = Rotation(wide, names) if recipe.rotate else None
        wide = wide if self.rotation is None else self.rotation.config
        self.width = Width(wide, recipe)
        self.config = self.width.config
        self.plan: Plan = plan_for(self.config, length)
        self.wide: Plan = plan_for(wide, length)
        """The same places and names at full width: what calibration reads before a layer is cut."""
        self.encoder = Encoder(source, names, "nested", recipe.group, 4, True)
        if self.rotation is not None:
            self.rotation.learn(self.encoder)
        self.stages = stages(self.plan)
        self.stream = Stream(self.plan, samples.calibration, work.folder, "calibration")
        self.besides: Besides | None = None
        """What else a layer's stage keeps, made from its matrix and second moments (a search's levels)."""
        self.headway = Headway(
            source.name, self.plan, self.wide, self.width, self.stages, samples.calibration.size, progress
        )
        self._solved = lru_cache(maxsize=2)(self._unpacked)

    # ---- the loop

    def solve(self) -> None:
        """Everything that is not finished yet, stage by stage."""
        if not self.work.done("0000"):
            self._prepare()
        if self.recipe.allocation == "owl" and not self.work.done(SURVEY):
            self._survey()
        for index, stage in enumerate(self.stages):
            name = f"{index + 1:04d}"
            self.headway.doing = stage.weight
            weights = None
            if not self.work.done(name):
                weights = self._weights(stage.weight)
                self._solve_stage(name, stage, weights)
            self.reference.advance(self._original_stages(index))
            self.headway.finish(index)
        if self.recipe.search:
            return
        if self.recipe.max_kl is not None and not self.work.done("9000"):
            self._drop_planes(self.recipe.max_kl)
        if not self.work.done("9999"):
            self.headway.doing = "measuring"
            errors = self.measure()
            self.work.save("9999", {}, {}, {"errors": errors})

    def _prepare(self) -> None:
        """Tables, the head, vectors: rounded to nearest, or as they are."""
        tensors: dict[str, PackedTensor] = {}
        vectors: dict[str, F32] = {}
        body = {stage.weight for stage in self.stages}
        for spec in self.wide.weights.values():
            if spec.kind == "vector":
                vector = self.encoder.vector(spec)
                vectors[spec.name] = vector if self.rotation is None else self.rotation.vector(spec, vector)
            elif spec.name not in body:
                if self.rotation is None:
                    tensors[spec.name] = self.encoder.matrix(spec)
                else:
                    tensors[spec.name] = self.rotation.table(spec, self.encoder, self.recipe.group)
            self.headway.tell()
        self.work.save("0000", tensors, vectors, {})

    def _survey(self) -> None:
        """OWL: how many outliers each layer has, on a few samples and with the weights as they are; then its share."""
        self.headway.doing = "surveying layers"
        samples = self.samples.calibration[:SURVEY_SAMPLES]
        stream = Stream(self.wide, samples, self.work.folder, "survey")
        outliers = survey_outliers(stream, self._original, self.work.rows, self.work.vector, self.headway.tell)
        prune = self.recipe.mask
        assert prune is not None  # the recipe's own rule
        sizes = {name: self.wide.weights[name].rows * self.wide.weights[name].cols for name in outliers}
        self.work.save(SURVEY, {}, {}, {"outliers": outliers, "shares": owl_shares(outliers, sizes, prune.share)})

    def _solve_stage(self, name: str, stage: Stage, weights: F32) -> None:
        moments = Moments(weights.shape[1])
        consume = partial(_add, moments, stage.source)
        block = self.width.block(stage.weight)
        length = self.samples.calibration.shape[1]
        behind = None if block is None else Behind(block, self.wide, weights, self.work.vector, length)
        if behind is not None:
            consume = partial(_both, consume, behind.add)
        tick = partial(self.headway.count, stage)
        self.stream.advance(
            stage.place, Weights(self._solved, self.work.rows, self.work.vector), consume=consume, tick=tick
        )
        vectors: dict[str, F32] = {}
        pruned: dict[str, Any] = {}
        if behind is not None:
            cut = behind.cut(self._original(behind.block.taker), self.width)
            weights, vectors, pruned = np.ascontiguousarray(weights[cut.rows]), cut.vectors, {"pruned": cut.log}
        magnitudes, hessian = moments.magnitudes(), moments.hessian()
        scaled = fold.Folded({}, {}, None)
        if self.recipe.awq:
            scaled = fold.scale_inputs(self, stage, weights, hessian, magnitudes)
            if scaled.factors is not None:
                weights = weights * scaled.factors
                hessian /= np.outer(scaled.factors, scaled.factors)
        share = self.work.log(SURVEY)["shares"][stage.weight] if self.recipe.allocation == "owl" else None
        tensors: dict[str, PackedTensor] = {}
        if self.besides is not None:
            tensors, more = self.besides(stage.weight, weights, hessian)
            vectors |= more
        packed, log = solve_layer(weights, hessian, self.recipe, stage.weight, share)
        log = {"weight": stage.weight, "tokens": moments.tokens, **log, **pruned}
        if scaled.alpha is not None:
            log["awq_alpha"] = scaled.alpha
        self.work.save(name, {**tensors, **scaled.tensors, stage.weight: packed}, {**vectors, **scaled.vectors}, log)
        self._solved.cache_clear()

    def _original_stages(self, index: int) -> int:
        """How many of the reference's linear layers stand up to and with this one of the job's."""
        if index + 1 == len(self.stages):
            return len(self.reference.stages)
        name = original_name(self.stages[index].weight, self.layers)
        return next(i for i, stage in enumerate(self.reference.stages) if stage.weight == name) + 1

    # ---- numbers

    def _weights(self, name: str) -> F32:
        """The matrix that is to be solved: fitted to fewer columns, where a block lost some."""
        fitted = self.width.fitted(name)
        return self._original(name) if fitted is None else self.work.vector(fitted)

    def _original(self, name: str) -> F32:
        """The checkpoint's matrix at full width (rotated, where the recipe rotates)."""
        spec = self.wide.weights[name]
        values = self.encoder.weights(spec)
        if not np.isfinite(values).all():
            raise ModelError(f"{self.source.name}: {spec.sources[0]} holds a NaN or an infinity")
        return values if self.rotation is None else self.rotation.matrix(spec, values)

    def _unpacked(self, name: str) -> F32:
        return unpack(self.work.tensor(name), "hi")

    def points(self) -> tuple[str, ...]:
        """The operating points that the artifact offers, the default first."""
        if self.recipe.bits == 8:
            return ("int8",)
        return ("int8", "int4") if self.recipe.lo and self.recipe.bits == 4 else ("int4", "int8")

    def weights_by_name(self) -> tuple[dict[str, PackedTensor], dict[str, F32]]:
        """Matrices and vectors as they will be written."""
        specs = self.plan.weights.values()
        tensors = {spec.name: self.work.tensor(spec.name) for spec in specs if spec.kind != "vector"}
        return tensors, {spec.name: self.work.vector(spec.name) for spec in specs if spec.kind == "vector"}

    def measure(
        self, points: Sequence[str] | None = None, changed: Mapping[str, PackedTensor] | None = None, windows: int = 0
    ) -> dict[str, Any]:
        """Figures of points (default: all) on the held-out samples, or the first `windows` of them, with some matrices
        `changed`."""
        tensors, vectors = self.weights_by_name()
        return measure_points(
            self.plan,
            {**tensors, **(changed or {})},
            vectors,
            points or self.points(),
            self.samples.held_out[: windows or None],
            self.reference.logits,
            threads=self.threads,
            progress=lambda done, total: self.headway.tell("measuring"),
        )

    def _drop_planes(self, max_kl: float) -> None:
        tensors, _ = self.weights_by_name()

        def kl(changed: Mapping[str, PackedTensor], windows: int) -> float:
            return float(self.measure(("int8",), changed, windows)["int8"]["kl"]["estimate"])

        self.headway.doing = "choosing planes"
        names = [stage.weight for stage in self.stages]
        gone = drop_planes(tensors, names, lambda c: kl(c, RANKING_WINDOWS), lambda c: kl(c, 0), max_kl)
        log = {"dropped": list(gone.names), "bytes": gone.bytes, "kl": gone.kl, "max_kl": max_kl}
        self.work.save("9000", {name: without_lo(tensors[name]) for name in gone.names}, {}, log)

    # ---- the artifact

    def write(self, out: Path, overwrite: bool) -> None:
        """All of it, in the plan's order. Nothing of the machine or the clock goes in."""
        with ArtifactWriter(out, overwrite=overwrite) as writer:
            for spec in self.plan.weights.values():
                if spec.kind == "vector":
                    writer.add_vector(spec.name, self.work.vector(spec.name))
                else:
                    writer.add_tensor(spec.name, self.work.tensor(spec.name))
            carry_files(self.source, writer)
            writer.finish(self.meta(self.work.log("9999")["errors"]))

    def meta(self, errors: Mapping[str, Any]) -> dict[str, Any]:
        """The artifact's meta section, given the figures of its points."""
        text = self.samples.described
        log = [line for line in self.work.logs() if "errors" not in line and "measured" not in line]
        return {
            "config": self.config,
            "family": self.plan.family,
            "points": list(self.points()),
            "default_point": self.points()[0],
            "provenance": {
                "source": self.source.name,
                "identity": hashlib.sha256(self.source.identity.encode()).hexdigest()[:32],
                "haomiao": __version__,
                "exact": 0,
                "rounded": len(self.stages),
            },
            "recipe": {**self.recipe.as_dict(), "text": [Path(path).name for path in self.recipe.text]},
            "calibration": {
                "text": text,
                "samples": len(self.samples.calibration),
                "length": int(self.samples.calibration.shape[1]),
            },
            "log": log,
            "errors": {point: {**figures, "against": "full", "text": text} for point, figures in errors.items()},
        }


def _add(moments: Moments, source: str, buffers: Buffers) -> None:
    moments.add(buffers[source])


def _both(first: Consume, second: Consume, buffers: Buffers) -> None:
    first(buffers)
    second(buffers)
