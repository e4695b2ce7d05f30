"""The search: the descent on a known terrain, models put together from levels, and whole searches on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from haomiao.cli.main import main
from haomiao.compress.recipe import recipe_of
from haomiao.compress.search.cost import CostModel, Features, features
from haomiao.compress.search.greedy import Step, descend, moves
from haomiao.compress.search.levels import LEVELS, State, cut_rows
from haomiao.compress.shrink import sizes_of
from haomiao.errors import InputError
from haomiao.kernels.pack import unpack
from haomiao.kernels.rtn import quantize_planes
from haomiao.models.open import open_model
from tests.compress.test_job import Stop, content, run
from tests.compress.test_structured import bigger


class Slope:
    """A terrain whose errors and times are sums of known parts."""

    matrices = ("layers.0.a", "layers.0.b", "layers.1.a", "layers.1.b")
    widths = 2
    worth = (1.0, 8.0, 2.0, 16.0)
    asked = 0

    def few(self, state: State) -> float:
        self.asked += 1
        kl = sum(w * level for w, level in zip(self.worth, state.levels, strict=True)) / 100
        return kl + 5.0 * (2 - len(state.layers)) + 0.03 * state.width

    def ms(self, state: State) -> float:
        return 10 + len(state.layers) * 2 - 0.1 * sum(state.levels) - state.width

    def deepest(self, name: str, state: State) -> int:
        return len(LEVELS) - 1 if not state.width or name.endswith("a") else 1


def test_the_cheapest_error_goes_first_and_nothing_is_left_over() -> None:
    slope = Slope()
    start = State((0, 1), 0, (0, 0, 0, 0))
    steps = list(descend(slope, start, lambda step: True))
    # KL for a millisecond: width 0.03, a: 0.1 and 0.2, b: 0.8 and 1.6 (narrow: one level), a layer 5 / 2
    assert [step.name for step in steps[:2]] == ["width 1", "layers.0.a int4"]
    assert [step.name.split()[0] for step in steps[1:6]] == ["layers.0.a"] * 5
    assert steps[-1].name.startswith("without layer")
    assert len(steps[-1].state.layers) == 1
    assert [step.ms for step in steps] == sorted((step.ms for step in steps), reverse=True)
    assert slope.asked < len(steps) * 5, "stale scores are measured again only when they would win"


def test_what_is_refused_is_not_taken() -> None:
    def allowed(step: Step) -> bool:
        return step.kl < 0.2

    steps = list(descend(Slope(), State((0, 1), 0, (0, 0, 0, 0)), allowed))
    assert steps
    assert all(step.kl < 0.2 for step in steps)
    assert not any("layer " in step.name or ".1.b" in step.name for step in steps)


def test_narrow_matrices_lose_their_pruned_levels() -> None:
    state = State((0, 1), 0, (3, 4, 0, 5))
    assert moves(Slope(), state)["width 1"] == State((0, 1), 1, (3, 1, 0, 1))
    assert "width 2" not in moves(Slope(), State((0, 1), 1, (0, 0, 0, 0)))


def test_the_cost_is_fitted_and_never_negative() -> None:
    truth = np.array([0.5, 0.1, 0.02, 0.03])
    seen = [
        Features(layers, hi, lo) for layers, hi, lo in ((6, 20, 18), (6, 20, 0), (3, 10, 9), (6, 12, 0), (3, 10, 0))
    ]
    model = CostModel([(f, float(truth @ f.row())) for f in seen])
    np.testing.assert_allclose(model.weights, truth, rtol=1e-6)
    noisy = CostModel([(seen[0], 1.0), (seen[1], 1.4), (seen[2], 0.9)])
    assert (noisy.weights >= 0).all()
    assert noisy.predict(seen[0]) > 0


def test_rows_of_planes_are_cut_without_rounding() -> None:
    weights = np.random.default_rng(0).normal(size=(96, 70)).astype(np.float32)
    rows = np.array([5, 90, 33, 34, 2])
    for lo in (True, False):
        whole = quantize_planes(weights, 32, 3 if lo else 4, lo)
        cut = cut_rows(whole, rows)
        np.testing.assert_array_equal(unpack(cut), unpack(whole)[rows])
        np.testing.assert_array_equal(unpack(cut, "hi"), unpack(whole, "hi")[rows])


# ---- whole searches


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that reads the model's size: the same on every machine."""

    def read(model: Any, threads: int | None) -> float:
        return float(np.dot((0.2, 0.1, 10.0, 8.0), features(model).row()))

    monkeypatch.setattr("haomiao.compress.search.run.step_ms", read)


def test_the_fastest_model_below_an_error(tmp_path: Path, clock: None) -> None:
    told: list[dict[str, Any]] = []
    artifact = run(tmp_path / "out", bigger(), {"search": True, "max_kl": 0.02}, tell=told.append)
    artifact.verify()
    meta = artifact.meta
    assert told == meta["search"]["front"]
    assert len(told) > 4
    assert all(point["kl"] <= 0.02 for point in told)
    assert [p["ms"] for p in told] == sorted((p["ms"] for p in told), reverse=True)
    assert meta["errors"]["int8"]["kl"]["estimate"] == pytest.approx(told[-1]["kl"], rel=1e-6)
    assert told[-1]["mb"] == pytest.approx(sum(t.nbytes for t in artifact.tensors.values()) / 1e6)
    assert open_model(tmp_path / "out").default_point == meta["default_point"]


def test_the_most_accurate_model_within_a_time(tmp_path: Path, clock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole", bigger())
    told: list[dict[str, Any]] = []
    artifact = run(tmp_path / "out", bigger(), {"search": True, "target_ms": 1.0}, tell=told.append)
    assert told[-1]["ms"] <= 1.0 < told[-2]["ms"]
    assert artifact.nbytes < whole.nbytes
    left = sizes_of(artifact.meta["config"])
    assert left.layers == told[-1]["layers"]
    assert left.neurons == told[-1]["neurons"]
    with pytest.raises(InputError, match="nothing is below"):
        run(tmp_path / "exact", bigger(), {"search": True, "max_kl": 0.0})
    with pytest.raises(InputError, match="out of reach"):
        run(tmp_path / "never", bigger(), {"search": True, "target_ms": 0.001})
    assert len(list((tmp_path / "never.partial").glob("*.stage"))) > 4
    monkeypatch.setattr("haomiao.compress.search.levels.solve_layer", lambda *_: pytest.fail("solved again"))
    run(tmp_path / "never", bigger(), {"search": True, "target_ms": 1.0})
    assert content(tmp_path / "never") == content(tmp_path / "out"), "another target goes on from what was solved"
    assert not (tmp_path / "never.partial").exists()


def test_an_interrupted_search_takes_the_same_way(tmp_path: Path, clock: None) -> None:
    recipe = {"search": True, "target_ms": 1.2}
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    run(tmp_path / "whole", bigger(), recipe, progress=count)
    out = tmp_path / "cut"
    for at in (calls // 3, calls // 2):
        seen = 0

        def stop(*_: object, at: int = at) -> None:
            nonlocal seen
            seen += 1
            if seen == at:
                raise Stop

        with pytest.raises(Stop):
            run(out, bigger(), recipe, progress=stop)
    run(out, bigger(), recipe)
    assert content(out) == content(tmp_path / "whole")


def test_on_the_real_clock_and_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = run(tmp_path / "real", bigger(), {"search": True, "max_kl": 0.01})
    assert all(point["ms_measured"] > 0 and point["ms_predicted"] > 0 for point in artifact.meta["search"]["front"])
    seen: dict[str, Any] = {}

    def instead(source: Any, out: Path, recipe: Any, *, tell: Any, **_: Any) -> Path:
        seen["recipe"] = recipe
        tell(artifact.meta["search"]["front"][0])
        return tmp_path / "real"

    monkeypatch.setattr("haomiao.compress.job.compress", instead)
    monkeypatch.setattr("haomiao.cli.models.open_checkpoint", lambda *_: artifact)
    monkeypatch.setattr("haomiao.cli.models.open_tokenizer", lambda *_: type("T", (), {"encode": None}))
    assert main(["compress", "x", "-o", str(tmp_path / "o"), "--target-ms", "5"]) == 0
    assert "ms/token  KL" in capsys.readouterr().err
    assert seen["recipe"] == recipe_of({"search": True, "target_ms": 5.0})
    assert main(["compress", "x", "-o", str(tmp_path / "o"), "--max-kl", "0.1", "--json"]) == 0
    assert capsys.readouterr().out.startswith('{"point": {')
    assert seen["recipe"].search


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"search": True}, "needs target_ms or max_kl"),
        ({"target_ms": 3.0}, "needs search"),
        ({"search": True, "max_kl": 0.1, "prune": "tile:0.3"}, "chooses bits"),
        ({"search": True, "max_kl": 0.1, "awq": True}, "without awq"),
        ({"search": True, "target_ms": -1.0}, "target_ms must be"),
    ],
)
def test_refusals(given: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        recipe_of(given)
