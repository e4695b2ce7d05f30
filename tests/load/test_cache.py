"""The cache of converted models: names, locks, listing, removal."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from haomiao.errors import InputError, ModelNotFoundError, UnavailableError
from haomiao.load import cache
from haomiao.load.artifact import ArtifactWriter


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HAOMIAO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "artifacts"


def make(name: str, identity: str = "i", **scheme: object) -> Path:
    target = cache.artifact_path(name, identity, **scheme)
    with cache.conversion_lock(target), ArtifactWriter(target) as writer:
        writer.add_vector("v", np.ones(100, np.float32))
        writer.finish({"points": ["int8", "int4"], "provenance": {"source": name}})
    return target


def test_the_key_covers_checkpoint_and_scheme(folder: Path) -> None:
    paths = {
        cache.artifact_path("m", "a", scheme="nested", group=32),
        cache.artifact_path("m", "b", scheme="nested", group=32),
        cache.artifact_path("m", "a", scheme="nested", group=64),
        cache.artifact_path("m", "a", scheme="full"),
    }
    assert len(paths) == 4
    assert cache.artifact_path("m", "a", x=1, y=2) == cache.artifact_path("m", "a", y=2, x=1)


@pytest.mark.parametrize("name", ["../../etc", "a/b", "", "..", "模型", "x" * 500, ".hidden", "a\nb"])
def test_any_name_stays_inside(folder: Path, name: str) -> None:
    target = cache.artifact_path(name, "i")
    assert target.parent == folder
    assert cache.NAME.fullmatch(target.name)


def test_list_and_remove(folder: Path) -> None:
    assert cache.list_models() == []
    first, second = make("first"), make("second")
    os.utime(first, (1000, 1000))
    models = cache.list_models()
    assert [model.source for model in models] == ["second", "first"]
    assert models[0].path == second and models[0].points == ("int8", "int4") and models[0].bytes > 400
    cache.touch(first)
    assert cache.list_models()[0].path == first
    assert cache.remove(second.name) > 400
    assert [model.path for model in cache.list_models()] == [first]
    with pytest.raises(ModelNotFoundError):
        cache.remove(second.name)
    assert sorted(path.name for path in folder.iterdir()) == sorted([".locks", first.name])


@pytest.mark.parametrize("name", ["../first", "/etc", "", ".", "..", "a/../b", "a\0b"])
def test_removal_stays_inside(folder: Path, name: str) -> None:
    make("first")
    with pytest.raises(InputError):
        cache.remove(name)
    assert len(cache.list_models()) == 1


def test_removal_does_not_follow_links(folder: Path, tmp_path: Path) -> None:
    made = make("first")
    outside = tmp_path / "outside"
    made.rename(outside)
    made.symlink_to(outside)
    assert cache.list_models() == []
    with pytest.raises(ModelNotFoundError):
        cache.remove(made.name)
    assert (outside / "model.haomiao").exists()


def test_a_broken_artifact_is_listed_and_can_be_removed(folder: Path) -> None:
    made = make("first")
    (made / "model.haomiao").write_bytes(b"HAOMIAO")
    assert [(model.source, model.points) for model in cache.list_models()] == [("", ())]
    assert cache.remove(made.name) == 7


CONVERT = """
import sys, time
from pathlib import Path
from haomiao.load import cache
from haomiao.load.artifact import ArtifactWriter, is_artifact
target = cache.artifact_path("shared", "i")
with cache.conversion_lock(target):
    if is_artifact(target):
        print("found")
    else:
        with ArtifactWriter(target) as writer:
            print("converting", flush=True)
            time.sleep(float(sys.argv[1]))
            writer.finish({})
        print("made")
"""


def test_two_processes_convert_once(folder: Path) -> None:
    run = [sys.executable, "-c", CONVERT, "0.5"]
    both = [subprocess.Popen(run, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted((process.communicate(timeout=60)[0] or "").split()[-1] for process in both)
    assert said == ["found", "made"]


def test_a_killed_conversion_is_cleaned_up_by_the_next(folder: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", CONVERT, "60"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "converting\n"
    process.kill()
    process.wait(timeout=60)
    leftovers = [path for path in folder.iterdir() if path.name.endswith(".tmp")]
    assert len(leftovers) == 1
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", CONVERT, "0"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["converting", "made"], "the lock died with its process"
    assert time.monotonic() - started < 60
    assert not leftovers[0].exists()


def test_a_cache_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.parent.parent.joinpath("file").write_text("")
    monkeypatch.setenv("HAOMIAO_CACHE", str(folder.parent.parent / "file"))
    with pytest.raises(UnavailableError, match="HAOMIAO_CACHE"), cache.conversion_lock(cache.artifact_path("m", "i")):
        pass
    cache.touch(cache.artifact_path("m", "i"))
    assert cache.list_models() == []
