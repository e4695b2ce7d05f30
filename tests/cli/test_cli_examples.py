"""The examples run with the embedded model and print something."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from haomiao.models.open import ASSETS, EMBEDDED

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.py"))


@pytest.mark.skipif(not (ASSETS / EMBEDDED / "model.haomiao").exists(), reason="no embedded model is installed")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path) -> None:
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_examples_are_listed() -> None:
    listed = (EXAMPLES[0].parent / "README.md").read_text(encoding="utf-8")
    assert not [example.name for example in EXAMPLES if f"({example.name})" not in listed]
