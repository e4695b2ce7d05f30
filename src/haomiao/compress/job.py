"""One compression: a checkpoint, a recipe and text in; an artifact with its measured errors out.

Layer by layer in the plan's order: the layer's inputs are taken from the stream of calibration samples, its matrix is
solved, kept in the workspace and used from then on. Beside it a reference runs with the original weights on samples
that are held out. Whatever is finished survives a kill; the artifact is a function of checkpoint, recipe, text and
machine alone, however often the run was interrupted. (BLAS divides its sums by its number of threads, so a run that
goes on keeps the number it began with.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from haomiao import __version__
from haomiao.compress import fold
from haomiao.compress.calibrate import Moments, Stage, Stream, stages
from haomiao.compress.error import measure_points
from haomiao.compress.forward import Buffers, Weights
from haomiao.compress.layer import solve_layer
from haomiao.compress.planes import drop_planes, without_lo
from haomiao.compress.prune.masks import outlier_share, owl_shares
from haomiao.compress.quantize.rotate import Rotation
from haomiao.compress.recipe import Recipe
from haomiao.compress.text import Samples, read_texts, take_samples
from haomiao.compress.workspace import Workspace, digest
from haomiao.errors import InputError, ModelError
from haomiao.kernels.isa import allowed_cores
from haomiao.kernels.pack import unpack
from haomiao.kernels.packed import TILE_ROWS, PackedTensor
from haomiao.load.artifact import ArtifactWriter
from haomiao.load.source import Progress, TensorSource
from haomiao.models.convert import carry_files, resolve
from haomiao.models.encode import Encoder
from haomiao.models.plan import Head, Plan
from haomiao.models.registry import plan_for
from haomiao.types import F32, I32

RANKING_WINDOWS = 4
"""Held-out samples that rank the second planes; all of them decide."""
SURVEY = "0000-survey"
SURVEY_SAMPLES = 8
SOLVE_COST = 3.0
"""Multiply-adds of solving a matrix [rows, cols], per rows * cols * cols, as progress counts them."""


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
) -> Path:
    """Compress `source` by `recipe` into the artifact directory `out` and return it.

    `encode` is the model's tokenizer; `samples` stands in for it and for the recipe's text. Progress counts
    multiply-adds, so that time left can be told. Run again after an interruption, it goes on (`OUT.partial`); `restart`
    begins anew. Raises `InputError`, `ModelError`, and `UnavailableError` if the disk is full: nothing is lost then.
    """
    if samples is None:
        if encode is None:
            raise InputError(f"{source.name} has no tokenizer, so there is no text to calibrate on", param="model")
        texts = read_texts(recipe.text)
        samples = take_samples(texts, encode, samples=recipe.samples, held=recipe.held, length=recipe.length)
    check_target(out, overwrite)
    identity = {
        "haomiao": __version__,
        "source": hashlib.sha256(source.identity.encode()).hexdigest()[:32],
        "recipe": recipe.as_dict() | {"text": []},
        "samples": digest(samples.calibration, samples.held_out),
    }
    count = threads or len(allowed_cores())
    with (
        Workspace(out, identity, restart=restart, blas_threads=count) as work,
        threadpool_limits(work.blas_threads, "blas"),
    ):
        job = Job(source, recipe, samples, work, threads=threads, progress=progress)
        job.solve()
        job.write(out, overwrite)
        work.remove()
    return out


def check_target(out: Path, overwrite: bool) -> None:
    """Refuse before any work what the artifact's writer would refuse after it."""
    if (out.exists() and not out.is_dir()) or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise InputError(f"{out} exists already; nothing was written", param="output")


class Job:
    """The state of one run between its stages."""

    def __init__(
        self,
        source: TensorSource,
        recipe: Recipe,
        samples: Samples,
        work: Workspace,
        *,
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
        self.rotation = Rotation(source.config, names) if recipe.rotate else None
        config = source.config if self.rotation is None else self.rotation.config
        self.config = dict(config)
        self.plan: Plan = plan_for(config, length)
        self.encoder = Encoder(source, names, "nested", recipe.group, 4, True)
        if self.rotation is not None:
            self.rotation.learn(self.encoder)
        self.stages = stages(self.plan)
        self.stream = Stream(self.plan, samples.calibration, work.folder, "calibration")
        self.reference = Stream(original_plan(source, length), samples.held_out, work.folder, "reference")
        self._progress = progress
        self._doing = "preparing"
        self._done, self._total = 0.0, self._all_work()
        self._solved = lru_cache(maxsize=2)(self._unpacked)
        self._tables: dict[str, tuple[I32, F32]] = {}

    # ---- the loop

    def solve(self) -> None:
        """Everything that is not finished yet, stage by stage."""
        if not self.work.done("0000"):
            self._prepare()
        if self.recipe.allocation == "owl" and not self.work.done(SURVEY):
            self._survey()
        for index, stage in enumerate(self.stages):
            name = f"{index + 1:04d}"
            self._doing = stage.weight
            weights = None
            if not self.work.done(name):
                weights = self._weights(stage.weight)
                self._solve_stage(name, stage, weights)
            self._advance_reference(index)
            self._count(stage.weight, self._stage_work(stage), whole=True)
        if self.recipe.max_kl is not None and not self.work.done("9000"):
            self._drop_planes(self.recipe.max_kl)
        if not self.work.done("9999"):
            self._doing = "measuring"
            errors = self.measure()
            self.work.save("9999", {}, {}, {"errors": errors})

    def _prepare(self) -> None:
        """Tables, the head, vectors: rounded to nearest, or as they are."""
        tensors: dict[str, PackedTensor] = {}
        vectors: dict[str, F32] = {}
        body = {stage.weight for stage in self.stages}
        for spec in self.plan.weights.values():
            if spec.kind == "vector":
                vector = self.encoder.vector(spec)
                vectors[spec.name] = vector if self.rotation is None else self.rotation.vector(spec, vector)
            elif spec.name not in body:
                if self.rotation is None:
                    tensors[spec.name] = self.encoder.matrix(spec)
                else:
                    tensors[spec.name] = self.rotation.table(spec, self.encoder, self.recipe.group)
            self._tell()
        self.work.save("0000", tensors, vectors, {})

    def _survey(self) -> None:
        """OWL: how many outliers each layer has, on a few samples and with the weights as they are; then its share."""
        self._doing = "surveying layers"
        stream = Stream(self.plan, self.samples.calibration[:SURVEY_SAMPLES], self.work.folder, "survey")
        stream.remove()
        stream.place = 0
        latest: dict[str, F32] = {}
        weights = Weights(latest.__getitem__, self._rows, self.work.vector)
        outliers: dict[str, float] = {}
        for stage in self.stages:
            moments = Moments(self.plan.weights[stage.weight].cols)
            take = partial(_add, moments, stage.source)
            stream.advance(stage.place, weights, consume=take, store=stage.place)
            latest.clear()
            latest[stage.weight] = self._weights(stage.weight)
            outliers[stage.weight] = outlier_share(latest[stage.weight], moments.hessian())
            self._tell()
        stream.remove()
        prune = self.recipe.prune[0]
        self.work.save(SURVEY, {}, {}, {"outliers": outliers, "shares": owl_shares(outliers, prune.share)})

    def _solve_stage(self, name: str, stage: Stage, weights: F32) -> None:
        moments = Moments(weights.shape[1])
        tick = lambda tokens: self._count(stage.weight, tokens * self._token_work(stage))  # noqa: E731
        self.stream.advance(
            stage.place,
            Weights(self._solved, self._rows, self.work.vector),
            consume=partial(_add, moments, stage.source),
            tick=tick,
        )
        magnitudes, hessian = moments.magnitudes(), moments.hessian()
        scaled = fold.Folded({}, {}, None)
        if self.recipe.awq:
            scaled = fold.scale_inputs(self, stage, weights, hessian, magnitudes)
            if scaled.factors is not None:
                weights = weights * scaled.factors
                hessian /= np.outer(scaled.factors, scaled.factors)
        share = self.work.log(SURVEY)["shares"][stage.weight] if self.recipe.allocation == "owl" else None
        packed, log = solve_layer(weights, hessian, self.recipe, stage.weight, share)
        log = {"weight": stage.weight, "tokens": moments.tokens, **log}
        if scaled.alpha is not None:
            log["awq_alpha"] = scaled.alpha
        self.work.save(name, {**scaled.tensors, stage.weight: packed}, scaled.vectors, log)
        self._solved.cache_clear()

    def _advance_reference(self, index: int) -> None:
        """Bring the reference to the next layer's input (or the head's) with this layer's original weights."""
        plan = self.reference.plan
        places = [s.place for s in stages(plan)]
        head = next(i for i, op in enumerate(plan.ops) if isinstance(op, Head))
        end = places[index + 1] if index + 1 < len(places) else head
        if self.reference.place >= end:
            return
        only = self.stages[index].weight
        weights: list[F32] = []

        def matrix(name: str) -> F32:
            assert name == only  # the pieces between layers hold one matrix each
            if not weights:
                weights.append(self.encoder.weights(plan.weights[name]))
            return weights[0]

        vector = lambda name: self.encoder.vector(plan.weights[name])  # noqa: E731
        self.reference.advance(end, Weights(matrix, self._original_rows, vector), store=end)

    # ---- numbers

    def _weights(self, name: str) -> F32:
        spec = self.plan.weights[name]
        values = self.encoder.weights(spec)
        if not np.isfinite(values).all():
            raise ModelError(f"{self.source.name}: {spec.sources[0]} holds a NaN or an infinity")
        return values if self.rotation is None else self.rotation.matrix(spec, values)

    def _unpacked(self, name: str) -> F32:
        return unpack(self.work.tensor(name), "hi")

    def _rows(self, name: str, ids: I32) -> F32:
        """Rows of a table as it is stored: only their tiles are unpacked."""
        table = self.work.tensor(name)
        tiles, where = np.unique(ids // TILE_ROWS, return_inverse=True)
        part = PackedTensor(
            table.encoding,
            len(tiles) * TILE_ROWS,
            table.cols,
            table.group,
            table.lo_shift,
            table.hi.reshape(table.tiles, -1)[tiles].reshape(-1),
            None if table.lo is None else table.lo.reshape(table.tiles, -1)[tiles].reshape(-1),
        )
        found: F32 = unpack(part)[where * TILE_ROWS + ids % TILE_ROWS]
        return found

    def _original_rows(self, name: str, ids: I32) -> F32:
        """Rows of a table of the checkpoint: those that the held-out samples use are read once."""
        if name not in self._tables:
            spec = self.reference.plan.weights[name]
            used = np.arange(self.samples.held_out.shape[1]) if name == "positions" else self.samples.held_out
            rows = np.unique(used).astype(np.int32)
            self._tables[name] = rows, self.encoder.weights(spec)[rows]
        rows, values = self._tables[name]
        found: F32 = values[np.searchsorted(rows, ids)]
        return found

    def reference_logits(self) -> Iterator[F32]:
        """Logits of the held-out samples with the original weights, sample by sample."""
        plan = self.reference.plan
        head = next(op for op in plan.ops if isinstance(op, Head))
        weights = self.encoder.weights(plan.weights[head.weight])
        tokens = self.samples.held_out.shape[1]
        for buffers in self.reference.outputs():
            hidden = buffers[head.source]
            for begin in range(0, len(hidden), tokens):
                logits = hidden[begin : begin + tokens] @ weights.T * np.float32(head.scale)
                yield np.float32(head.softcap) * np.tanh(logits / np.float32(head.softcap)) if head.softcap else logits

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
            self.reference_logits,
            threads=self.threads,
            progress=lambda done, total: self._tell("measuring"),
        )

    def _drop_planes(self, max_kl: float) -> None:
        tensors, _ = self.weights_by_name()

        def kl(changed: Mapping[str, PackedTensor], windows: int) -> float:
            return float(self.measure(("int8",), changed, windows)["int8"]["kl"]["estimate"])

        self._doing = "choosing planes"
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
            writer.finish(self.meta())

    def meta(self) -> dict[str, Any]:
        """The artifact's meta section."""
        text = self.samples.described
        errors = self.work.log("9999")["errors"]
        log = [line for line in self.work.logs() if "errors" not in line]
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

    # ---- progress

    def _token_work(self, stage: Stage) -> float:
        """Multiply-adds of a token in one pass up to this layer: the moments of its inputs and the layers computed."""
        spec = self.plan.weights[stage.weight]
        return float(spec.cols * spec.cols + spec.rows * spec.cols)

    def _stage_work(self, stage: Stage) -> float:
        spec = self.plan.weights[stage.weight]
        solving = SOLVE_COST * spec.rows * spec.cols * spec.cols
        return self.samples.calibration.size * self._token_work(stage) + solving

    def _all_work(self) -> float:
        return sum(self._stage_work(stage) for stage in self.stages) * 1.02

    def _count(self, what: str, amount: float, *, whole: bool = False) -> None:
        """Add work; `whole` sets the count to what all stages up to and with this one come to."""
        if whole:
            upto = next(i for i, s in enumerate(self.stages) if s.weight == what)
            self._done = sum(self._stage_work(s) for s in self.stages[: upto + 1])
        else:
            self._done += amount
        self._tell(what)

    def _tell(self, what: str | None = None) -> None:
        if self._progress is not None:
            name = what or self._doing
            self._progress(f"compressing {self.source.name}: {name}", int(self._done), int(self._total))


def _add(moments: Moments, source: str, buffers: Buffers) -> None:
    moments.add(buffers[source])


def original_plan(source: TensorSource, length: int) -> Plan:
    """The plan of the checkpoint as it is."""
    return plan_for(source.config, length)
