"""What a command imports before its first token: every module has its price, so the list is pinned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from haomiao.models.open import ASSETS, EMBEDDED

ALLOWED = {"numpy", "tokenizers", "haomiao"}
"""Packages that answering from a local artifact needs."""
HEAVY = (
    *("asyncio", "concurrent.futures", "multiprocessing", "ssl", "http", "email", "unittest", "sqlite3"),
    *(
        "haomiao.load.hub",
        "haomiao.load.source",
        "haomiao.load.safetensors",
        "haomiao.load.gguf",
        "haomiao.load.quantized",
    ),
    *("haomiao.models.convert", "haomiao.models.encode", "haomiao.kernels.rtn"),
    *("haomiao.text.template", "haomiao.text.constraint", "haomiao.text.library", "haomiao.text.pieces"),
    *("haomiao.text.pretokenizers", "haomiao.text.sentencepiece_model", "haomiao.engine.executors.reference"),
    *("haomiao.compress", "haomiao.train", "haomiao.measure", "haomiao.serve"),
)
"""Modules, of ours and of the standard library, that it must not."""
SCRIPT = """
import json, sys
before = set(sys.modules)
from haomiao.cli.main import main
code = main(["generate", *sys.argv[1:]])
print()
print(json.dumps({"code": code, "modules": sorted(set(sys.modules) - before)}))
"""


@pytest.fixture(scope="module")
def modules() -> list[str]:
    """Everything that `haomiao generate ARTIFACT PROMPT` imported."""
    command = [sys.executable, "-c", SCRIPT, str(ASSETS / EMBEDDED), "Once upon a time", "--max-tokens", "2", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["code"] == 0
    found: list[str] = said["modules"]
    return found


def test_no_package_is_imported_that_is_not_needed(modules: list[str]) -> None:
    foreign = {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)
    assert {name for name in foreign if not name.startswith("_")} <= ALLOWED


def test_no_module_is_imported_that_only_others_need(modules: list[str]) -> None:
    loaded = [name for name in modules if any(name == each or name.startswith(each + ".") for each in HEAVY)]
    assert loaded == []


def test_help_imports_nothing_but_the_commands_and_errors() -> None:
    script = "import sys\nfrom haomiao.cli.main import main\nmain(['--help'])\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    names = {name for name in done.stderr.split() if name.startswith("haomiao") or name == "numpy"}
    assert names == {"haomiao", "haomiao.cli", "haomiao.cli.main", "haomiao.errors"}
    assert Path(ASSETS).is_dir()
