"""The loop that pretraining, fine-tuning and distillation share: step, log, validate, keep, stop, resume.

The task says what a step's loss is and how good the weights are; the loop knows time, files and signals. A run that is
killed goes on from its newest checkpoint with the same numbers (on a CPU: the same bits), and its log is as if nothing
had happened. SIGTERM and SIGINT end the step, write a checkpoint and leave.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from haomiao.errors import InputError
from haomiao.train.optimizers import Optimizer, clip
from haomiao.train.schedule import rate_share
from haomiao.train.settings import Schedule
from haomiao.train.state import RunFolder, State

LOG = "log.jsonl"
BEST, MEAN = "best/", "mean/"
Tell = Callable[[str, int, int, str], None]


class Task(Protocol):
    """What is learnt."""

    tokens: int
    """Of one step."""

    def backward(self, step: int) -> Tensor:
        """Compute the loss of step `step` (a function of the step alone) and leave gradients in the weights."""
        ...

    def validate(self) -> dict[str, float]:
        """Figures of the weights as they are."""
        ...


@dataclass(frozen=True)
class Rhythm:
    """When what happens besides steps."""

    log_every: int = 10
    validate_every: int = 500
    checkpoint_minutes: float = 5.0
    patience: int = 0
    """Validations without improvement after which the run ends; 0: never. The best weights are kept then."""
    mean: float = 0.0
    """Greatest decay of an exponential mean of the weights, which is then what is judged, kept and left; 0: none."""
    clip: float = 1.0
    judge: str = "loss"
    """The figure of `Task.validate` that must fall."""
    stop_after: int | None = None
    """End after this many steps of this process, as if it had been asked to."""


class Loop:
    """One run. `weights` are leaves that want gradients; after `run` they are the last (with patience: best) ones."""

    def __init__(
        self,
        task: Task,
        weights: Mapping[str, Tensor],
        optimizer: Optimizer,
        schedule: Schedule,
        folder: RunFolder,
        rhythm: Rhythm,
        tell: Tell | None = None,
    ) -> None:
        self.task, self.weights, self.optimizer, self.schedule = task, dict(weights), optimizer, schedule
        self.folder, self.rhythm = folder, rhythm
        self.step = 0
        self.best: dict[str, Tensor] = {}
        self._mean = {name: weight.detach().clone() for name, weight in self.weights.items()} if rhythm.mean else {}
        self.memory: dict[str, Any] = {"best": None, "worse": 0}
        self._tell = tell or (lambda *_: None)
        self._asked_to_stop = False
        self._log = folder.folder / LOG

    def run(self) -> bool:
        """Train to the end; False if it was interrupted before. Raises `InputError` if the loss is not finite."""
        self._resume()
        handlers = {s: signal.signal(s, self._stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            finished = self._steps()
        finally:
            for which, handler in handlers.items():
                signal.signal(which, handler)
        if finished:
            for name, kept in (self.best or self._mean).items():
                self.weights[name].data.copy_(kept)
        return finished

    def _stop(self, *_: object) -> None:
        self._asked_to_stop = True

    def _steps(self) -> bool:
        saved = began = time.monotonic()
        first = since = self.step
        if not self.step:
            self._validate()  # of the weights it begins with
        losses: list[float | Tensor] = list(self.memory.pop("pending", []))
        while self.step < self.schedule.steps and not self._gave_up():
            losses.append(self.task.backward(self.step))
            length = clip(self.weights.values(), self.rhythm.clip)
            share = rate_share(self.schedule, self.step)
            self.optimizer.step(share)
            self.step += 1
            self._follow()
            last = self.step == self.schedule.steps
            if self.step % self.rhythm.log_every == 0 or last:
                now = time.monotonic()
                rate = (self.step - since) * self.task.tokens / max(now - began, 1e-9)
                self._note_loss(losses, float(length), share, rate)
                losses, began, since = [], now, self.step
            if self.step % self.rhythm.validate_every == 0 or last:
                self._validate()
            stop = self._asked_to_stop or self.step - first == self.rhythm.stop_after
            if last or stop or time.monotonic() - saved >= 60 * self.rhythm.checkpoint_minutes:
                self._save(losses)
                saved = time.monotonic()
                if stop and not last:
                    return False
        return True

    def _follow(self) -> None:
        """Let the mean follow the weights: over a tenth of the steps at first, over 1 / (1 - decay) of them later."""
        decay = min(self.rhythm.mean, (1 + self.step) / (10 + self.step))
        for name, mean in self._mean.items():
            mean.lerp_(self.weights[name].detach(), 1 - decay)

    def _judged(self) -> dict[str, float]:
        """Figures of the weights that would be kept."""
        moving = {name: self.weights[name].detach().clone() for name in self._mean}
        for name, mean in self._mean.items():
            self.weights[name].data.copy_(mean)
        figures = self.task.validate()
        for name, weight in moving.items():
            self.weights[name].data.copy_(weight)
        return figures

    def _note_loss(self, losses: list[float | Tensor], length: float, share: float, rate: float) -> None:
        loss = sum(float(each) for each in losses) / len(losses)
        if not math.isfinite(loss):
            raise InputError(f"the loss is not finite at step {self.step}: a smaller learning rate may help")
        tokens = self.step * self.task.tokens
        self._note({"loss": loss, "gradient": length, "rate": share * self.optimizer.rate, "tokens": tokens}, rate)
        self._tell("training", self.step, self.schedule.steps, f"loss {loss:.4f}  {rate:,.0f} tok/s")

    def _validate(self) -> None:
        figures = self._judged()
        self._note({f"valid_{name}": value for name, value in figures.items()})
        judged = figures[self.rhythm.judge]
        if self.memory["best"] is None or judged < self.memory["best"]:
            self.memory |= {"best": judged, "worse": 0}
            if self.rhythm.patience:
                self.best = {name: weight.detach().clone() for name, weight in (self._mean or self.weights).items()}
        else:
            self.memory["worse"] += 1

    def _gave_up(self) -> bool:
        return bool(self.rhythm.patience) and self.memory["worse"] >= self.rhythm.patience

    # ---- files

    def _note(self, figures: Mapping[str, float], rate: float | None = None) -> None:
        line = {"step": self.step, **{k: round(v, 6) if k != "loss" else v for k, v in figures.items()}}
        if rate is not None:
            line["tokens_per_second"] = round(rate, 1)
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _save(self, losses: list[float | Tensor]) -> None:
        """`losses` are those of the log's next line: a resumed run writes the same one."""
        tensors = {f"weight/{name}": weight for name, weight in self.weights.items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in self.optimizer.tensors().items()}
        tensors |= {f"{BEST}{name}": tensor for name, tensor in self.best.items()}
        tensors |= {f"{MEAN}{name}": tensor for name, tensor in self._mean.items()}
        self.folder.save(State(self.step, tensors, self.memory | {"pending": [float(loss) for loss in losses]}))

    def _resume(self) -> None:
        state = self.folder.latest()
        if state is None:
            self._log.write_text("", encoding="utf-8")
            return
        self.step, self.memory = state.step, state.memory
        for name, weight in self.weights.items():
            weight.data.copy_(state.tensors[f"weight/{name}"])
        self.optimizer.load(_below(state.tensors, "optimizer/"))
        self.best = {name: t.to(self.weights[name].device) for name, t in _below(state.tensors, BEST).items()}
        self._mean = {name: t.to(self.weights[name].device) for name, t in _below(state.tensors, MEAN).items()}
        if self._log.exists():  # lines of steps that are done again
            lines = self._log.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line and json.loads(line)["step"] <= self.step]
            self._log.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
