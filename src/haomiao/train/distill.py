"""Distillation: a student learns what its teacher says of a text, token by token, and how it comes to say it.

A compressed student is trained as it is stored, at its points in turn: masks are kept and rounding is part of the
function. Its residual stream should be its teacher's too, which is asked again for every step; where only the last word
counts, the teacher is asked once and its likeliest tokens are kept on disk. What was recovered is measured by the
engine on text that was held out. `OUT.partial` holds what is done, so that the same command goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haomiao.compress.error import measure_points
from haomiao.compress.export.compressed_tensors import check_target
from haomiao.compress.text import Samples, read_texts, take_samples
from haomiao.compress.workspace import digest
from haomiao.errors import InputError
from haomiao.models.plan import Add
from haomiao.train.devices import precise, take_device
from haomiao.train.graph import Graph
from haomiao.train.loop import LOG, Loop, Rhythm, Tell
from haomiao.train.optimizers import Optimizer
from haomiao.train.settings import Schedule
from haomiao.train.starting import Starting
from haomiao.train.state import RunFolder
from haomiao.train.students import Compressed, Smaller, Student
from haomiao.train.teacher import Teacher, distance, divergence, likeliest
from haomiao.types import F32

USUAL_HIDDEN = 10.0
"""Of a compressed student (docs/LOG.md, "Half of what pruning lost")."""


@dataclass(frozen=True, slots=True)
class Distillation:
    """What decides the result."""

    divergence: str = "forward"
    """`forward`: KL(teacher || student), which covers all that the teacher says; `reverse`: KL(student || teacher),
    which avoids what it would not say."""
    temperature: float = 1.0
    top_k: int = 64
    epochs: int = 3
    batch: int = 4
    rate: float = 5e-4
    hidden: float | None = None
    """Weight of the residual stream's distance beside the divergence; None: `USUAL_HIDDEN`, or 0 for a checkpoint."""
    point: str | None = None
    layers: int | None = None
    samples: int = 256
    held: int = 16
    length: int = 256
    precision: str = "f32"
    seed: int = 1


class Imitation:
    """The task: the teacher's distribution after every token."""

    def __init__(
        self,
        student: Student,
        samples: Samples,
        teachers: tuple[Teacher, Teacher],
        live: Callable[[Tensor], tuple[Tensor, list[Tensor]]],
        settings: Distillation,
        device: torch.device,
    ) -> None:
        self._student, self._settings, self._device, self._live = student, settings, device, live
        self._graph = Graph(student.plan)
        self._ids = samples.calibration.astype(np.int64), samples.held_out.astype(np.int64)
        self._teachers = teachers
        self._size = min(settings.batch, len(self._ids[0]))
        self.steps_of_epoch = max(1, len(self._ids[0]) // self._size)
        self.tokens = self._size * self._ids[0].shape[1]

    def backward(self, step: int) -> Tensor:
        """Mean divergence at the point whose turn it is."""
        epoch, place = divmod(step, self.steps_of_epoch)
        order = np.random.Generator(np.random.Philox([self._settings.seed, epoch])).permutation(len(self._ids[0]))
        places = order[place * self._size : (place + 1) * self._size]
        points = self._student.points
        point = points[step % len(points)]
        if not self._settings.hidden:
            loss = self._loss(places, 0, point)
            torch.autograd.backward(loss)
            return loss.detach()
        ids = torch.from_numpy(self._ids[0][places]).to(self._device)
        with torch.no_grad(), precise(self._device, self._settings.precision):
            logits, theirs = self._live(ids)
            said = likeliest(logits, self._settings.top_k, self._settings.temperature)
        with precise(self._device, self._settings.precision):
            logits, ours = self._graph.observed(self._student.weights(point), ids)
        loss = self._divergence(logits, said)
        torch.autograd.backward(loss + self._settings.hidden * distance(ours, theirs))
        return loss.detach()

    def _loss(self, places: np.ndarray[Any, np.dtype[np.int64]], which: int, point: str) -> Tensor:
        """Divergence from what the teacher said once."""
        ids = torch.from_numpy(self._ids[which][places]).to(self._device)
        with precise(self._device, self._settings.precision):
            logits = self._graph.logits(self._student.weights(point), ids)
        return self._divergence(logits, self._teachers[which].answers(places, self._device))

    def _divergence(self, logits: Tensor, said: tuple[Tensor, Tensor]) -> Tensor:
        reverse = self._settings.divergence == "reverse"
        return divergence(logits, *said, temperature=self._settings.temperature, reverse=reverse)

    def validate(self) -> dict[str, float]:
        """Divergence on the held-out samples at every point that is trained; `loss` is their mean."""
        figures = {}
        count = len(self._ids[1])
        with torch.no_grad():
            for point in self._student.points:
                total = 0.0
                for begin in range(0, count, self._size):
                    places = np.arange(begin, min(begin + self._size, count))
                    total += float(self._loss(places, 1, point)) * len(places)
                figures[point] = total / count
        return {"loss": sum(figures.values()) / len(figures)} | figures


def distill(
    teacher: Starting,
    student: Starting | None,
    out: Path,
    settings: Distillation,
    *,
    text: list[str] | None = None,
    device: str = "auto",
    threads: int | None = None,
    restart: bool = False,
    stop_after: int | None = None,
    tell: Tell | None = None,
) -> dict[str, Any] | None:
    """Train, write `out` (an artifact if the student is one, else a Hugging Face directory) and return its figures;
    None if the run was interrupted. Without a student, `settings.layers` of the teacher's layers are one.

    Raises `InputError` for models that do not fit together, and as `RunFolder` and the writers do.
    """
    check_target(out)
    where = take_device(device, threads)
    samples = take_samples(
        read_texts(text or []),
        teacher.tokenizer().encode,
        samples=settings.samples,
        held=settings.held,
        length=settings.length,
    )
    learner = make_student(teacher, student, settings, where)
    settings = dataclasses.replace(settings, hidden=_hidden(learner, teacher, settings))
    partial = out.absolute().with_name(f"{out.absolute().name}.partial")
    identity = dataclasses.asdict(settings) | {
        "teacher": teacher.identity,
        "student": (student or teacher).identity,
        "text": digest(samples.calibration, samples.held_out),
    }
    with RunFolder(partial, identity, restart=restart) as folder:
        plan = teacher.plan(settings.length)
        weights = {name: weight.to(where) for name, weight in teacher.weights(plan).items()}
        graph = Graph(plan)
        teachers = _ask(teacher, samples, partial, settings, lambda ids: graph.logits(weights, ids), where, tell)
        task = Imitation(learner, samples, teachers, lambda ids: graph.observed(weights, ids), settings, where)
        steps = settings.epochs * task.steps_of_epoch
        schedule = Schedule(steps=steps, schedule="cosine", warmup=min(steps - 1, steps // 20 + 1), floor=0.02)
        rhythm = Rhythm(
            log_every=max(1, min(10, task.steps_of_epoch // 4)),
            validate_every=task.steps_of_epoch,
            checkpoint_minutes=2.0,
            patience=settings.epochs + 1,  # never early, but the best are kept
            stop_after=stop_after,
        )
        optimizer = Optimizer(learner.plan, learner.parameters, "adamw", settings.rate, 0.0)
        loop = Loop(task, learner.parameters, optimizer, schedule, folder, rhythm, tell)
        if not loop.run():
            return None
        report: dict[str, Any] = {"steps": loop.step, "tokens": loop.step * task.tokens, "points": list(learner.points)}
        about = {"teacher": teacher.name, "settings": dataclasses.asdict(settings), "text": samples.described}
        if isinstance(learner, Compressed):
            said = lambda: _rows(graph.logits, weights, samples.held_out, where)  # noqa: E731
            report["errors"] = recovered(learner, samples, said, threads)
            about["errors"] = report["errors"]["after"]
        report["held_out"] = task.validate()
        learner.write(out, about, (partial / LOG).read_bytes())
    shutil.rmtree(partial, ignore_errors=True)
    return report


def make_student(teacher: Starting, student: Starting | None, settings: Distillation, device: torch.device) -> Student:
    """Who learns. Raises `InputError` if it speaks other tokens than the teacher."""
    if student is None:
        if settings.layers is None:
            raise InputError("give a --student, or --layers of the teacher", param="student")
        return Smaller(teacher, settings.length, settings.layers, device)
    if settings.layers is not None:
        raise InputError("--layers goes without --student: they are the teacher's", param="layers")
    plan = student.plan(settings.length)
    words = [model.tokenizer().encode("The 毫秒 engine, 1 + 1 = 2.\n") for model in (teacher, student)]
    if plan.vocab_size != teacher.plan(settings.length).vocab_size or words[0] != words[1]:
        raise InputError("teacher and student have different vocabularies", param="student")
    if student.artifact is not None:
        return Compressed(student.artifact, plan, settings.point, device)
    if settings.point is not None:
        raise InputError("--point is of a compressed student; this one is a checkpoint", param="point")
    return Smaller(student, settings.length, None, device)


def _hidden(learner: Student, teacher: Starting, settings: Distillation) -> float:
    """What the residual stream counts for. Raises `InputError` if it is asked for and the models' differ in shape."""
    shapes = [
        (plan.hidden_size, sum(isinstance(op, Add) for op in plan.ops))
        for plan in (learner.plan, teacher.plan(settings.length))
    ]
    alike = shapes[0] == shapes[1]
    if settings.hidden and not alike:
        raise InputError("hidden compares models of one width and depth", param="hidden")
    usual = USUAL_HIDDEN if alike and isinstance(learner, Compressed) else 0.0
    return usual if settings.hidden is None else settings.hidden


def recovered(
    learner: Compressed, samples: Samples, said: Callable[[], Iterator[F32]], threads: int | None
) -> dict[str, Any]:
    """The engine's own figures of every point against the teacher, before and after, on the held-out samples."""
    artifact, plan = learner.artifact, learner.plan
    points = [p for p in artifact.meta["points"] if p in ("int8", "int4")]
    figures = {}
    for name, tensors, vectors in (
        ("before", dict(artifact.tensors), dict(artifact.vectors)),
        ("after", learner.packed(), learner.vectors()),
    ):
        found = measure_points(plan, tensors, vectors, points, samples.held_out, said, threads=threads)
        figures[name] = {p: {**f, "against": "teacher", "text": samples.described} for p, f in found.items()}
    return figures


def _rows(logits: Callable[..., Tensor], weights: Any, ids: Any, device: torch.device) -> Iterator[F32]:
    """A model's logits of every sample, one after the other."""
    for row in ids.astype(np.int64):
        with torch.no_grad():
            yield logits(weights, torch.from_numpy(row[None]).to(device))[0].float().cpu().numpy()


def _ask(
    teacher: Starting,
    samples: Samples,
    folder: Path,
    settings: Distillation,
    logits: Callable[[Tensor], Tensor],
    device: torch.device,
    tell: Tell | None,
) -> tuple[Teacher, Teacher]:
    """The teacher's answers on the text to learn from and on the text held out."""
    made = []
    for ids in (samples.calibration, samples.held_out):
        about = f"{teacher.identity} {settings.top_k} {settings.temperature} {digest(ids)}"
        key = hashlib.sha256(about.encode()).hexdigest()[:16]
        asked = Teacher(folder, key, ids, settings.top_k, settings.temperature)
        made.append(asked)
        if settings.hidden and ids is samples.calibration:
            continue  # asked at every step
        progress = None if tell is None else lambda done, total: tell("asking the teacher", done, total, "")
        asked.fill(logits, device, settings.batch, progress)
    return made[0], made[1]
