"""A search from end to end: solve every level once, descend by measured error and time, write the model that was found.

`target_ms`: the most accurate model on the way down whose step is predicted to take at most that long. `max_kl`: the
fastest whose error on all held-out samples stays below. Every point of the way is told as it is found, measured in both
respects. Everything measured is kept in the workspace, so that an interrupted search goes on the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from haomiao.compress.error import measure_points
from haomiao.compress.job import Job
from haomiao.compress.search.cost import POINT, CostModel, Features, features, megabytes, step_ms
from haomiao.compress.search.greedy import Step, descend
from haomiao.compress.search.levels import LEVELS, Database, Model, State, describe
from haomiao.errors import InputError
from haomiao.load.artifact import ArtifactWriter
from haomiao.models.convert import carry_files

Tell = Callable[[dict[str, Any]], None]
"""Called with every point of the way: `ms`, `ms_predicted` (before the point itself was timed), `ms_measured`, `kl`,
`kl_low`, `kl_high`, `top1`, `mb`, and what the model consists of."""

LEDGER = "8000-ledger"
FEW = 4
"""Held-out samples that rank steps; all of them measure a point."""
ROUNDS = 3
"""Of timing the models that the cost is first fitted to, in turns."""


class Search:
    """One search over a job that has solved all levels."""

    def __init__(self, job: Job, database: Database, tell: Tell | None) -> None:
        self.job, self.database, self.tell = job, database, tell
        self.matrices, self.widths = database.matrices, len(database.widths)
        self.target_ms, self.max_kl = job.recipe.target_ms, job.recipe.max_kl
        self._features: dict[str, Features] = {}
        self.front: list[dict[str, Any]] = []
        done = job.work.done(LEDGER)
        self._ledger: dict[str, Any] = job.work.log(LEDGER)["measured"] if done else {}
        self._pairs: list[tuple[Features, float]] = []
        self._cost: CostModel | None = None

    # ---- what the descent asks for

    def few(self, state: State) -> float:
        """KL of a state on a few held-out samples."""
        return float(self._measured(f"few {state.key()}", lambda: self._figures(state, FEW)["kl"]["estimate"]))

    def ms(self, state: State) -> float:
        """Predicted milliseconds a step."""
        assert self._cost is not None  # fitted before the descent
        return self._cost.predict(self._features_of(state))

    def deepest(self, name: str, state: State) -> int:
        """As the database says."""
        return self.database.deepest(name, state)

    # ---- measuring

    def _measured(self, key: str, measure: Callable[[], Any]) -> Any:
        if key not in self._ledger:
            self._ledger[key] = measure()
            self.job.work.save(LEDGER, {}, {}, {"measured": self._ledger})
        return self._ledger[key]

    def _figures(self, state: State, windows: int) -> dict[str, Any]:
        model = self.database.model(state)
        held = self.job.samples.held_out[: windows or None]
        self.job.headway.tell("searching")
        found: dict[str, Any] = measure_points(
            model.plan,
            model.tensors,
            model.vectors,
            (POINT,),
            held,
            self.job.reference.logits,
            threads=self.job.threads,
        )[POINT]
        return found

    def _features_of(self, state: State) -> Features:
        if state.key() not in self._features:
            self._features[state.key()] = features(self.database.model(state))
        return self._features[state.key()]

    def _time(self, state: State, name: str = "ms") -> float:
        self.job.headway.tell("timing")
        return float(self._measured(f"{name} {state.key()}", lambda: self._clock(state)))

    def _clock(self, state: State) -> float:
        return step_ms(self.database.model(state), self.job.threads)

    def fit(self) -> None:
        """Time models that lie far apart, in turns, and fit the cost to them."""
        start = self.database.start()
        corners = [dataclasses.replace(start, levels=(i,) * len(self.matrices)) for i in (0, 1, len(LEVELS) - 1)]
        if len(start.layers) > 1:
            corners.append(dataclasses.replace(start, layers=start.layers[: len(start.layers) // 2]))
            corners.append(dataclasses.replace(corners[-1], levels=corners[1].levels))
        if len(start.layers) > 3:  # of fewer, half is one already; what a step costs however few its layers are
            corners.append(dataclasses.replace(start, layers=start.layers[:1]))
        if self.widths > 1:
            corners.append(dataclasses.replace(start, width=self.widths - 1))
        times = [[self._time(corner, f"ms{turn}") for corner in corners] for turn in range(ROUNDS)]
        self._pairs = [
            (self._features_of(corner), sorted(turn[i] for turn in times)[ROUNDS // 2])
            for i, corner in enumerate(corners)
        ]
        self._cost = CostModel(self._pairs)

    def point(self, state: State, name: str) -> dict[str, Any]:
        """A point of the way, measured in full and told."""
        figures = self._measured(f"all {state.key()}", lambda: self._figures(state, 0))
        predicted = self.ms(state)
        measured = self._time(state)
        self._pairs.append((self._features_of(state), measured))
        self._cost = CostModel(self._pairs)
        kl = figures["kl"]
        found = {
            "step": name,
            "ms": self.ms(state),
            "ms_predicted": predicted,
            "ms_measured": measured,
            "kl": kl["estimate"],
            "kl_low": kl["low"],
            "kl_high": kl["high"],
            "top1": figures["top1"]["estimate"],
            "mb": megabytes(self.database.model(state).tensors),
            **describe(self.database, state),
        }
        self.front.append(found)
        if self.tell is not None:
            self.tell(found)
        return found

    # ---- the way

    def run(self) -> State:
        """Descend, and return the state to be written. Raises `InputError` if no model meets what was asked for."""
        self.fit()
        state = self.database.start()
        here = self.point(state, "start")
        if self.max_kl is not None and here["kl"] > self.max_kl:
            raise InputError(
                f"the most accurate model has KL {here['kl']:.5f}, above {self.max_kl:g}; nothing is below it",
                param="max_kl",
            )
        if self._reached(here):
            return state
        within: dict[str, dict[str, Any]] = {}

        def allowed(step: Step) -> bool:
            if self.max_kl is None:
                return True
            figures = self._measured(f"all {step.state.key()}", lambda: self._figures(step.state, 0))
            return bool(figures["kl"]["estimate"] <= self.max_kl)

        for step in descend(self, state, allowed):
            state = step.state
            within[step.name] = here = self.point(state, step.name)
            if self._reached(here):
                return state
        if self.target_ms is not None:
            limit = "" if self.max_kl is None else f" with a KL of at most {self.max_kl:g}"
            raise InputError(
                f"the fastest model that was found takes {here['ms']:.3g} ms a step at KL {here['kl']:.4g}; "
                f"{self.target_ms:g} ms is out of reach{limit} (what was solved is kept for another target)",
                param="target_ms",
            )
        return state

    def _reached(self, here: dict[str, Any]) -> bool:
        return self.target_ms is not None and bool(here["ms"] <= self.target_ms)

    # ---- what was found

    def write(self, out: Path, state: State, overwrite: bool) -> None:
        """The artifact, with every point of the way in its meta section."""
        job, model = self.job, self.database.model(state)
        points = self._points(model)
        errors = self._measured(
            f"final {state.key()}",
            lambda: measure_points(
                model.plan,
                model.tensors,
                model.vectors,
                points,
                job.samples.held_out,
                job.reference.logits,
                threads=job.threads,
            ),
        )
        goal = {"target_ms": self.target_ms, "max_kl": self.max_kl}
        with ArtifactWriter(out, overwrite=overwrite) as writer:
            for name, spec in model.plan.weights.items():
                if spec.kind == "vector":
                    writer.add_vector(name, model.vectors[name])
                else:
                    writer.add_tensor(name, model.tensors[name])
            carry_files(job.source, writer)
            meta = job.meta(errors) | {"config": model.config, "points": list(points), "default_point": points[0]}
            writer.finish(meta | {"search": {**goal, "front": self.front, "layers": list(state.layers)}})

    def _points(self, model: Model) -> tuple[str, ...]:
        body = [
            model.tensors[n] for n, spec in model.plan.weights.items() if spec.role == "body" and spec.kind == "matrix"
        ]
        return ("int8", "int4") if any(tensor.lo is not None for tensor in body) else ("int4", "int8")


def search(job: Job, out: Path, overwrite: bool, tell: Tell | None) -> None:
    """Solve the levels with `job`, find the model and write it to `out`."""
    database = Database(job.config, job.plan, job.recipe, job.work, job.samples.calibration.shape[1])
    job.besides = database.solve
    job.solve()
    found = Search(job, database, tell)
    found.write(out, found.run(), overwrite)
