"""A whole compression on tiny models: what it writes, what it says of its error, and that a kill changes nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from haomiao.compress.job import compress
from haomiao.compress.recipe import recipe_of
from haomiao.compress.text import Samples
from haomiao.errors import InputError, ModelError, UnavailableError
from haomiao.kernels.pack import unpack
from haomiao.load.artifact import Artifact
from haomiao.models.open import open_model
from tests.golden.cases import CASES
from tests.golden.checkpoint import DictSource, random_checkpoint

CASE = CASES[0]
LENGTH = 24
ROOT = Path(__file__).resolve().parents[2]


def source_of(case: Any = CASE) -> DictSource:
    return DictSource(case.config, random_checkpoint(case.config, case.seed))


def samples_of(case: Any = CASE, count: int = 24) -> Samples:
    ids = np.random.default_rng(5).integers(0, case.config["vocab_size"], (count + 4, LENGTH)).astype(np.int32)
    return Samples(ids[:count], ids[count:], [{"name": "random ids", "sha256": "", "samples": count}])


def run(out: Path, case: Any = CASE, recipe: dict[str, Any] | None = None, **options: Any) -> Artifact:
    return Artifact.open(
        compress(source_of(case), out, recipe_of(recipe or {}), samples=samples_of(case), **{"threads": 1, **options})
    )


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


RECIPES: list[dict[str, Any]] = [
    {},
    {"method": "rtn", "group": 64},
    {"bits": 8, "order": "static"},
    {"lo": False, "order": "natural", "group": 128},
    {"bits": 3},
    {"awq": True, "lo_shift": 3},
    {"awq": True, "rotate": True},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_recipe_writes_a_model_that_runs_and_knows_its_error(recipe: dict[str, Any], tmp_path: Path) -> None:
    artifact = run(tmp_path / "out", recipe=recipe)
    artifact.verify()
    meta = artifact.meta
    assert not (tmp_path / "out.partial").exists()
    layers = [line for line in meta["log"] if "weight" in line]
    assert len(layers) == 4 * CASE.config["num_hidden_layers"]
    assert all(line["error"] >= 0 and line["relative"] < 0.5 and line["tokens"] == 24 * LENGTH for line in layers)
    assert set(meta["errors"]) == set(meta["points"])
    for figures in meta["errors"].values():
        assert 0 <= figures["kl"]["estimate"] < 2
        assert figures["against"] == "full"
        assert figures["tokens"] == 4 * (LENGTH - 1)
    assert recipe_of({**meta["recipe"], "text": []}) == recipe_of(recipe)
    assert str(tmp_path) not in str(meta)
    opened = open_model(tmp_path / "out")
    assert opened.points == tuple(meta["points"])


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "phi3", "qwen3"])
def test_other_families(family: str, tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name.startswith(family))
    artifact = run(tmp_path / "out", case, {"awq": True})
    assert artifact.meta["errors"]["int8"]["kl"]["estimate"] < artifact.meta["errors"]["int4"]["kl"]["estimate"]


def test_gptq_is_nearer_than_rounding_and_the_layers_say_so(tmp_path: Path) -> None:
    rounded, solved = (run(tmp_path / m, recipe={"method": m}) for m in ("rtn", "gptq"))
    pairs = list(zip(rounded.meta["log"], solved.meta["log"], strict=True))
    assert sum(b["error"] < a["error"] for a, b in pairs) > 0.9 * len(pairs)
    kl = [artifact.meta["errors"]["int4"]["kl"]["estimate"] for artifact in (rounded, solved)]
    assert kl[1] < kl[0]


def test_the_second_planes_that_matter_least_are_dropped_within_the_limit(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    limits = [whole.meta["errors"][p]["kl"]["estimate"] for p in ("int8", "int4")]
    limit = (limits[0] * limits[1]) ** 0.5
    mixed = run(tmp_path / "mixed", recipe={"max_kl": limit})
    log = next(line for line in mixed.meta["log"] if "dropped" in line)
    assert 0 < len(log["dropped"]) < len(mixed.meta["log"]) - 1
    assert log["kl"] <= limit
    assert mixed.meta["errors"]["int8"]["kl"]["estimate"] == pytest.approx(log["kl"])
    assert mixed.nbytes < whole.nbytes
    for name, tensor in mixed.tensors.items():
        assert (tensor.lo is None) == (name in log["dropped"])
        np.testing.assert_array_equal(unpack(tensor, "hi"), unpack(whole.tensors[name], "hi"))


# ---- interruptions


class Stop(Exception):
    """Raised by a progress callback, where a kill might be."""


def test_an_interruption_at_any_moment_changes_no_byte(tmp_path: Path) -> None:
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    recipe = {"awq": True, "max_kl": 0.05}
    run(tmp_path / "whole", recipe=recipe, progress=count)
    expected = content(tmp_path / "whole")
    out = tmp_path / "cut"
    rng = np.random.default_rng(0)
    for at in sorted(rng.integers(1, calls, 6).tolist()):
        seen = 0

        def stop(*_: object, at: int = at) -> None:
            nonlocal seen
            seen += 1
            if seen == at:
                raise Stop

        try:
            run(out, recipe=recipe, progress=stop)
            break
        except Stop:
            assert not out.exists()
    if not out.exists():
        run(out, recipe=recipe)
    assert content(out) == expected


PROGRAM = """
import sys
from pathlib import Path
from tests.compress.test_job import run
run(Path(sys.argv[1]), recipe={"awq": True}, threads=int(sys.argv[2]))
"""


def test_kill_9_and_again(tmp_path: Path) -> None:
    run(tmp_path / "whole", recipe={"awq": True})
    out = tmp_path / "killed"
    command = [sys.executable, "-c", PROGRAM, str(out), "1"]
    kills = 0
    for stages in (1, 4):
        process = subprocess.Popen(command, cwd=ROOT)
        while process.poll() is None and len(list(tmp_path.glob("killed.partial/*.stage"))) < stages:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills
    assert not out.exists()
    command[-1] = "2"  # BLAS adds in another order with two threads: the run keeps the one that it began with
    subprocess.run(command, cwd=ROOT, check=True)
    assert content(out) == content(tmp_path / "whole")


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import haomiao.compress.workspace as workspace

    saved = workspace.Workspace.save

    def full(self: Any, stage: str, *rest: Any) -> None:
        if stage == "0003":
            with workspace.disk_errors(self.folder / "x", kept=True):
                raise OSError(28, "No space left on device")
        saved(self, stage, *rest)

    monkeypatch.setattr(workspace.Workspace, "save", full)
    with pytest.raises(UnavailableError, match=r"no room on the disk .* run the same command"):
        run(tmp_path / "out")
    assert sorted(p.stem for p in (tmp_path / "out.partial").glob("*.stage")) == ["0000", "0001", "0002"]
    monkeypatch.undo()
    run(tmp_path / "out")
    run(tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("text", [None, "", "[]", '{"identity": {}, "blas_threads": -1}'], ids=repr)
def test_stages_of_nobody_knows_which_run_are_neither_used_nor_lost(text: str | None, tmp_path: Path) -> None:
    def stop(what: str, *_: object) -> None:
        if "measuring" in what:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "out", progress=stop)
    begun = tmp_path / "out.partial" / "run.json"
    begun.unlink()
    if text is not None:
        begun.write_text(text)
    before = sorted((tmp_path / "out.partial").glob("*.stage"))
    with pytest.raises(InputError, match="--restart discards it"):
        run(tmp_path / "out")
    assert sorted((tmp_path / "out.partial").glob("*.stage")) == before
    run(tmp_path / "out", restart=True)


# ---- refusals


def test_another_run_is_not_mixed_in(tmp_path: Path) -> None:
    def stop(what: str, *_: object) -> None:
        if "measuring" in what:
            raise Stop

    with pytest.raises(InputError, match="made for"):  # refused before anything was done: nothing is left
        long = Samples(np.zeros((2, 4096), np.int32), np.zeros((1, 4096), np.int32), [])
        compress(source_of(), tmp_path / "out", recipe_of({}), samples=long)
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(Stop):
        run(tmp_path / "out", progress=stop)
    with pytest.raises(InputError, match="holds another run"):
        run(tmp_path / "out", recipe={"group": 64})
    artifact = run(tmp_path / "out", recipe={"group": 64}, restart=True)
    assert artifact.meta["recipe"]["group"] == 64


def test_what_is_there_is_not_overwritten_and_two_do_not_work_at_once(tmp_path: Path) -> None:
    from haomiao.compress.workspace import Workspace

    out = tmp_path / "out"
    with Workspace(out, {}), pytest.raises(InputError, match="in use"):
        Workspace(out, {})
    run(tmp_path / "done")
    with pytest.raises(InputError, match="exists already"):
        run(tmp_path / "done")
    run(tmp_path / "done", overwrite=True)


def test_a_damaged_stage_is_refused(tmp_path: Path) -> None:
    def stop(what: str, *_: object) -> None:
        if "measuring" in what:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "out", progress=stop)
    path = sorted((tmp_path / "out.partial").glob("*.stage"))[1]
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ModelError):
        run(tmp_path / "out")
    run(tmp_path / "out", restart=True)


def test_no_tokenizer_and_broken_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        compress(source_of(), tmp_path / "out", recipe_of({}))
    source = source_of()
    name = next(n for n in source.names() if "down_proj" in n)
    source._tensors = {**source._tensors, name: np.full_like(source.read(name), np.nan)}
    with pytest.raises(ModelError, match="NaN"):
        compress(source, tmp_path / "out", recipe_of({}), samples=samples_of())
