"""Make tests/golden/*.npz: what transformers answers on tiny random checkpoints. Needs torch and transformers.

    PYTHONPATH=src:. python -m tests.golden.make_goldens [--check] [NAME ...]

For every case: the logits of some positions of a fixed sequence (float32, eager attention), and 64 greedy tokens after
its first 24, computed without a cache. Prints the least margin by which a greedy token won, in units of the greatest
logit: where it is small, rounding could decide, and the case wants another seed. `--check` compares with the files
instead of writing them.
"""

from __future__ import annotations

import argparse
import copy
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.golden.cases import CASES, Case
from tests.golden.checkpoint import random_checkpoint, tokens_of

HERE = Path(__file__).resolve().parent
ROWS = (0, 1, 2, 15, 16, 17, 23, 31, 32, 33, 47, 63, 64, 71)
LEAST_MARGIN = 5e-4


def transformers_model(case: Case) -> Any:
    """The case as a transformers model, every parameter accounted for."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = copy.deepcopy({k: v for k, v in case.config.items() if k != "model_type"})  # transformers writes into it
    config = AutoConfig.for_model(case.family, **values)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    tensors = {k: torch.from_numpy(v.copy()) for k, v in random_checkpoint(case.config, case.seed).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or any(name != "lm_head.weight" for name in missing):
        raise SystemExit(f"{case.name}: missing {missing}, unexpected {unexpected}")
    if missing and not case.config.get("tie_word_embeddings", True):
        raise SystemExit(f"{case.name}: {missing}")
    model.tie_weights()
    return model


def answers(case: Case) -> tuple[npt.NDArray[np.float32], list[int], float]:
    """(logits of the fixed sequence [tokens, vocab], greedy tokens, least relative margin)."""
    import torch

    model, tokens = transformers_model(case), tokens_of(case)
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
        sequence, margin = tokens[: case.prompt_tokens], np.inf
        for _ in range(case.greedy_tokens):
            last = model(torch.tensor([sequence]), use_cache=False).logits[0, -1].numpy()
            first, second = np.sort(last)[::-1][:2]
            margin = min(margin, float((first - second) / np.abs(last).max()))
            sequence = [*sequence, int(last.argmax())]
    return logits, sequence[case.prompt_tokens :], margin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="cases (default: all, and only then files are written)")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    files: dict[str, dict[str, npt.NDArray[Any]]] = defaultdict(dict)
    for case in CASES:
        if arguments.names and case.name not in arguments.names:
            continue
        logits, greedy, margin = answers(case)
        verdict = "" if margin >= LEAST_MARGIN else "   TOO SMALL: choose another seed"
        print(f"{case.name:24} |logit| {np.abs(logits).max():6.2f}  least margin {margin:.1e}{verdict}")
        files[case.family][f"{case.name}/logits"] = logits[list(ROWS)]
        files[case.family][f"{case.name}/greedy"] = np.array(greedy, np.int32)
    for family, arrays in files.items():
        path = HERE / f"{family}.npz"
        if arguments.check:
            kept = np.load(path)
            for name, array in arrays.items():
                np.testing.assert_allclose(kept[name], array, rtol=1e-4, atol=1e-4, err_msg=name)
        elif not arguments.names:
            np.savez_compressed(path, **arrays)
            print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
