"""One GPTQ compression in a process of its own, for `benchmarks/compression_peers.py`.

    python compressors.py haomiao|llm-compressor CHECKPOINT IDS.json OUT GROUP THREADS

IDS.json holds the calibration samples as lists of token ids. Prints {"version", "solving_s"} as its last line. The
second is run by another interpreter, which has llmcompressor and not this package: imports come late.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

DAMPING = 0.01


def haomiao(checkpoint: str, ids: list[list[int]], out: str, group: int, threads: int) -> dict[str, object]:
    """Ours: no second plane, as the other has none."""
    import numpy as np

    from haomiao import __version__
    from haomiao.compress.job import compress
    from haomiao.compress.recipe import recipe_of
    from haomiao.compress.text import Samples
    from haomiao.load.source import open_source

    rows = np.array(ids, np.int32)
    samples = Samples(rows, rows[:1, :32], [{"name": "given", "sha256": "", "samples": len(rows)}])
    recipe = recipe_of({"group": group, "lo": False, "order": "static", "damping": DAMPING})
    began, ended = time.monotonic(), [0.0]

    def progress(what: str, done: int, total: int) -> None:
        if what.endswith("measuring") and not ended[0]:
            ended[0] = time.monotonic()

    compress(open_source(checkpoint), Path(out), recipe, samples=samples, threads=threads, progress=progress)
    return {"version": __version__, "solving_s": (ended[0] or time.monotonic()) - began}


def llm_compressor(checkpoint: str, ids: list[list[int]], out: str, group: int, threads: int) -> dict[str, object]:
    """The other, layer by layer: its W4A16 scheme, with our group."""
    import llmcompressor
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    data = Dataset.from_list([{"input_ids": each, "attention_mask": [1] * len(each)} for each in ids])
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    modifier = GPTQModifier(
        config_groups={"group_0": scheme}, ignore=["lm_head"], dampening_frac=DAMPING, actorder="static"
    )
    began = time.monotonic()
    oneshot(
        model=model,
        dataset=data,
        recipe=[modifier],
        max_seq_length=len(ids[0]),
        num_calibration_samples=len(ids),
    )
    solving = time.monotonic() - began
    model.save_pretrained(out, save_compressed=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (Path(checkpoint) / name).is_file():
            (Path(out) / name).write_bytes((Path(checkpoint) / name).read_bytes())
    return {"version": llmcompressor.__version__, "solving_s": solving}


if __name__ == "__main__":
    kind, model_path, ids_path, out_path, columns, thread_count = sys.argv[1:]
    run = {"haomiao": haomiao, "llm-compressor": llm_compressor}[kind]
    ids_given = json.loads(Path(ids_path).read_text())
    print(json.dumps(run(model_path, ids_given, out_path, int(columns), int(thread_count))), flush=True)
