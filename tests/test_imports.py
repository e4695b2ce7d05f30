"""The one-way imports between rooms (docs/ARCHITECTURE.md, section 2), and the weight of the serving path."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "src" / "haomiao"
BASE = {"types", "errors", "config", "progress"}
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "config": {"errors"},
    "progress": set(),
    "metrics": BASE,
    "kernels": BASE | {"metrics"},
    "load": BASE | {"metrics", "kernels"},
    "text": BASE | {"metrics", "kernels"},
    "models": BASE | {"metrics", "kernels", "load", "text"},
    "engine": BASE | {"metrics", "kernels", "load", "models"},
    "api": BASE | {"metrics", "kernels", "load", "text", "models", "engine"},
    "measure": BASE | {"metrics", "kernels", "load", "text", "models", "engine", "api"},
    "compress": BASE | {"metrics", "kernels", "load", "text", "models", "engine", "api", "measure"},
    "train": BASE | {"metrics", "kernels", "load", "text", "models", "engine", "api", "measure", "compress"},
    "serve": BASE | {"metrics", "kernels", "load", "text", "models", "engine", "api", "measure"},
    "cli": BASE
    | {"metrics", "kernels", "load", "text", "models", "engine", "api", "measure", "compress", "train", "serve"},
}
HEAVY = {"torch", "transformers", "triton"}
MAY_USE_TORCH = ("train/", "engine/executors/torch")


def imports_of(path: Path) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; say the whole name"
            module = node.module or ""
            if module == "haomiao":
                found += [(node.lineno, f"haomiao.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, module))
    return found


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    relative = path.relative_to(ROOT)
    room = relative.parts[0].removesuffix(".py")
    wrong = []
    for line, name in imports_of(path):
        top, _, rest = name.partition(".")
        if top in HEAVY and not str(relative).startswith(MAY_USE_TORCH):
            wrong.append(f"line {line}: {name} (torch lives in train and engine/executors/torch)")
        if top != "haomiao" or room in ("__init__", "__main__"):
            continue
        target = rest.partition(".")[0]
        if target in ("", "_core", "__version__") or target == room:
            continue
        if target not in ALLOWED[room]:
            wrong.append(f"line {line}: {room} must not import {name}")
    assert not wrong, "\n".join(wrong)
