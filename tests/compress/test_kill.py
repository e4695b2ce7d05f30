"""kill -9 at ten random moments, anywhere in a run's life: resumed, the artifact is the same to the byte."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.compress.test_job import ROOT, content

MOMENTS = 10
RECIPES = {
    "gptq": {"awq": True, "max_kl": 0.05},
    "pruned": {"prune": ["structured:0.3", "layers:0.5", "tile:0.2"]},
}
PROGRAM = """
import json, sys
from pathlib import Path
from tests.compress.test_job import run
from tests.compress.test_structured import bigger
print("begun", flush=True)
run(Path(sys.argv[1]), bigger(), recipe=json.loads(sys.argv[2]))
"""


def start(out: Path, recipe: str) -> subprocess.Popen[str]:
    """A compression in a process of its own, imports done."""
    command = [sys.executable, "-c", PROGRAM, str(out), recipe]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.nightly
@pytest.mark.parametrize("name", list(RECIPES))
def test_ten_moments(name: str, tmp_path: Path) -> None:
    recipe = json.dumps(RECIPES[name])
    began = time.monotonic()
    process = start(tmp_path / "whole", recipe)
    assert process.wait() == 0
    lasts = time.monotonic() - began
    expected = content(tmp_path / "whole")
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    kills = 0
    for moment in range(MOMENTS):
        out = tmp_path / f"cut{moment}"
        process = start(out, recipe)
        time.sleep(rng.uniform(0, lasts))
        process.send_signal(signal.SIGKILL)
        killed = process.wait() == -signal.SIGKILL
        kills += killed
        if not out.exists():
            assert start(out, recipe).wait() == 0
        assert content(out) == expected, f"seed {seed}, moment {moment}"
    assert kills >= MOMENTS // 2, f"seed {seed}: {kills} of {MOMENTS} were killed before they ended"
