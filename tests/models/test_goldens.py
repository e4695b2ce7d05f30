"""The same answers as transformers, at `full` with f32 KV: logits and greedy tokens of every family (tests/golden)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.golden.cases import CASES, Case
from tests.golden.checkpoint import tokens_of
from tests.golden.make_goldens import HERE, ROWS
from tests.models.runs import EXECUTORS, Sequence1, greedy, make_artifact, make_executor, relative_error


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_answers_as_transformers(case: Case, kind: str, tmp_path: Path) -> None:
    goldens = np.load(HERE / f"{case.family}.npz")
    with make_artifact(case, tmp_path) as artifact:
        executor = make_executor(kind, artifact, max_context=case.max_context, kv_type="f32")
        logits = Sequence1(executor, "full").feed(tokens_of(case), cuts=(1, 17, 40))
        assert relative_error(logits[list(ROWS)], goldens[f"{case.name}/logits"]) <= 1e-3
        prompt = tokens_of(case)[: case.prompt_tokens]
        assert greedy(executor, "full", prompt, case.greedy_tokens) == goldens[f"{case.name}/greedy"].tolist()
        executor.close()
