"""The goldens, live: transformers is asked again, on every case and on checkpoints saved and loaded the usual way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from haomiao.models.open import open_model
from haomiao.models.registry import plan_for
from tests.golden.cases import CASES, Case
from tests.golden.checkpoint import tokens_of
from tests.golden.make_goldens import HERE, ROWS, answers, transformers_model
from tests.models.runs import EXECUTORS, Sequence1, greedy, make_artifact, make_executor, relative_error

pytestmark = pytest.mark.nightly
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_goldens_are_what_transformers_answers(case: Case) -> None:
    kept = np.load(HERE / f"{case.family}.npz")
    logits, tokens, _ = answers(case)
    assert relative_error(logits[list(ROWS)], kept[f"{case.name}/logits"]) <= 1e-4
    assert tokens == kept[f"{case.name}/greedy"].tolist()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rotary_frequencies_are_those_of_transformers(case: Case) -> None:
    """To the bit but for the last: float32 powers may be rounded either way."""
    if case.family == "gpt2":
        pytest.skip("no rotary embedding")
    rotary = transformers_model(case).model.rotary_emb
    length = 72
    rotary(
        torch.zeros(1),
        torch.arange(length)[None],
        **({"layer_type": "full_attention"} if case.family == "gemma3_text" else {}),
    )
    prefix = "full_attention_" if case.family == "gemma3_text" else ""
    theirs = getattr(rotary, f"{prefix}inv_freq").numpy()
    plan = plan_for(case.config, case.max_context)
    specs = {spec.inv_freq: spec for spec in plan.ropes}
    closest = min((np.abs(np.array(f) / theirs - 1).max() for f in specs if len(f) == len(theirs)), default=np.inf)
    assert closest <= 3e-7


SEEDS = (11, 12)


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "name", ["llama-odd-bias", "qwen3-head32", "gemma2-window", "gemma3-v5", "phi3-long", "gpt2-odd"]
)
def test_fresh_weights(name: str, seed: int, kind: str, tmp_path: Path) -> None:
    given = BY_NAME[name]
    case = Case(f"{name}-{seed}", given.config, given.max_context, seed, greedy_tokens=16)
    logits, tokens, margin = answers(case)
    with make_artifact(case, tmp_path) as artifact:
        executor = make_executor(kind, artifact, max_context=case.max_context, kv_type="f32")
        assert relative_error(Sequence1(executor, "full").feed(tokens_of(case)), logits) <= 1e-3
        if margin > 1e-4:
            assert greedy(executor, "full", tokens_of(case)[: case.prompt_tokens], 16) == tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["llama3-rope", "mistral-window", "qwen2-sliding", "gemma2-window", "gemma3-v4", "gpt2-plain"]
)
def test_what_transformers_saves_is_read(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """save_pretrained writes the config in transformers 5's own spelling, and the weights in their type."""
    monkeypatch.setenv("HAOMIAO_CACHE", str(tmp_path / "cache"))
    case = BY_NAME[name]
    model: Any = transformers_model(case).to(getattr(torch, dtype))
    model.config.dtype = dtype
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    opened = open_model(tmp_path / "saved", point="full")
    # float32 arithmetic over what was saved; Gemma's embedding scale is rounded to the saved type there and here
    reference = transformers_model(case).float()
    reference.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    if name.startswith("gemma") and dtype == "bfloat16":
        scale = torch.tensor(saved["hidden_size"] ** 0.5).to(torch.bfloat16).float()
        reference.model.embed_tokens.embed_scale.fill_(float(scale))
    tokens = tokens_of(case)
    with torch.no_grad():
        theirs = reference(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    executor = make_executor("reference", opened.artifact, kv_type="f32")
    assert relative_error(Sequence1(executor, "full").feed(tokens), theirs) <= 1e-3
