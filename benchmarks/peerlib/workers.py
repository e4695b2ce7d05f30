"""An engine in a process of its own: loads the model once, then answers each line of input with one sample.

    PYTHON workers.py ENGINE SETTINGS     (JSON; started by peers.py, in the engine's own environment)

Knows nothing about the other engines: it runs where only one of them is installed, so the top imports the standard
library alone. llama.cpp is measured below its Python layer, as its own llama-bench does it (llama_decode on ready
batches, no sampling); ours through `LLM.stream`, OpenVINO through its pipeline: sampling and Python included.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

Sample = dict[str, Any]


def haomiao(settings: dict[str, Any]) -> Callable[[int], Sample]:
    """Our engine through its public API."""
    from haomiao.api import LLM
    from haomiao.measure.latency import run_once

    prompt, new, streams = settings["prompt"], settings["new"], settings["streams"]
    work = settings["work"]
    long = prompt > 4096  # prefilled once; later samples find its blocks
    llm = LLM(
        settings["model"],
        point=settings["point"],
        threads=settings["threads"],
        max_context=settings["context"],
        kv=settings["kv"],
        prefix_cache=long and work == "decode",
        speculate="off",  # random weights fall into loops, which would flatter it
    )

    def run(seed: int) -> Sample:
        rng = random.Random(0 if long and work == "decode" else seed)
        prompts = [[rng.randrange(llm.vocab_size) for _ in range(prompt)] for _ in range(streams)]
        if work == "prefill":
            return {"tok_s": prompt * 1e3 / run_once(llm, prompts, 1).prefill_ms}
        done = run_once(llm, prompts, new)
        if work == "itl":
            return gaps(done.gaps_ms)
        sample: Sample = {"tok_s": done.decode_rate()}
        return sample | ({"peak_gb": peak_gb()} if work == "memory" else {})

    return run


def llama_cpp(settings: dict[str, Any]) -> Callable[[int], Sample]:
    """llama.cpp through llama-cpp-python's C interface."""
    import llama_cpp as c

    prompt, new, streams = settings["prompt"], settings["new"], settings["streams"]
    work, long = settings["work"], settings["prompt"] > 4096
    c.llama_log_set(_silent(c), None)
    c.llama_backend_init()
    model = c.llama_model_load_from_file(settings["model"].encode(), c.llama_model_default_params())
    params = c.llama_context_default_params()
    params.n_ctx = (settings["context"] + 32) * streams
    params.n_batch, params.n_ubatch, params.n_seq_max = 2048, 512, streams
    params.n_threads = params.n_threads_batch = settings["threads"]
    if settings["kv"] == "int8":
        params.type_k = params.type_v = c.GGML_TYPE_Q8_0
        params.flash_attn_type = 1
    context = c.llama_init_from_model(model, params)
    if not context:
        raise SystemExit("llama.cpp made no context")
    memory = c.llama_get_memory(context)
    vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    batch = c.llama_batch_init(max(512, streams), 0, 1)
    filled = False

    def decode(tokens: list[int], position: int, sequences: list[int]) -> None:
        """A run of one sequence's tokens, or one token of each of several."""
        batch.n_tokens = len(tokens)
        several = len(sequences) > 1
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = position if several else position + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequences[index if several else 0]
            batch.logits[index] = several or index == len(tokens) - 1
        if c.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed")
        c.llama_synchronize(context)

    def prefill(rng: random.Random) -> None:
        for sequence in range(streams):
            tokens = [rng.randrange(vocab) for _ in range(prompt)]
            for first in range(0, prompt, 512):
                decode(tokens[first : first + 512], first, [sequence])

    def run(seed: int) -> Sample:
        nonlocal filled
        rng = random.Random(seed)
        start = time.perf_counter()
        if long and work == "decode" and filled:
            c.llama_memory_seq_rm(memory, 0, prompt, -1)
        else:
            c.llama_memory_clear(memory, True)
            prefill(rng)
            filled = True
        if work == "prefill":
            return {"tok_s": prompt / (time.perf_counter() - start)}
        moments = [time.perf_counter()]
        for step in range(new - 1):
            decode([rng.randrange(vocab) for _ in range(streams)], prompt + step, list(range(streams)))
            moments.append(time.perf_counter())
        if work == "itl":
            return gaps([1e3 * (b - a) for a, b in pairwise(moments)])
        sample: Sample = {"tok_s": (new - 1) * streams / (moments[-1] - moments[0])}
        return sample | ({"peak_gb": peak_gb()} if work == "memory" else {})

    return run


def _silent(c: Any) -> Any:
    """A log callback that drops every line; kept alive by the module."""
    global _callback
    _callback = c.llama_log_callback(lambda level, text, user: None)
    return _callback


_callback: Any = None


def openvino(settings: dict[str, Any]) -> Callable[[int], Sample]:
    """OpenVINO GenAI on the same GGUF file, through its own performance figures."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    options = {"INFERENCE_NUM_THREADS": settings["threads"], "NUM_STREAMS": 1}
    pipeline = genai.LLMPipeline(settings["model"], "CPU", **options)
    new = 1 if settings["work"] == "prefill" else settings["new"]
    config = genai.GenerationConfig(max_new_tokens=new, min_new_tokens=new, ignore_eos=True, do_sample=False)
    config.apply_chat_template = False

    def run(seed: int) -> Sample:
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, 30000, (1, settings["prompt"]), dtype=np.int64)
        figures = pipeline.generate(ov.Tensor(ids), config).perf_metrics
        if settings["work"] == "prefill":
            return {"tok_s": settings["prompt"] * 1e3 / figures.get_ttft().mean}
        return {"tok_s": 1e3 / figures.get_tpot().mean}

    return run


def gaps(values: list[float]) -> Sample:
    """Percentiles of the times between tokens (nearest rank)."""
    ordered = sorted(values)
    p50, p99 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.99))
    return {"p50_ms": p50, "p99_ms": p99, "p99_over_p50": p99 / p50}


def peak_gb() -> float | None:
    """The most memory that this process ever held, mapped file pages included (VmHWM), in 10^9 bytes."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123  no imports that an engine may lack
            line = next(line for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024 / 1e9


def main() -> None:
    """Load, say so, then a seed in and a sample out."""
    engine = {"haomiao": haomiao, "llama.cpp": llama_cpp, "openvino": openvino}[sys.argv[1]]
    run = engine(json.loads(sys.argv[2]))
    print("ready", flush=True)
    for line in sys.stdin:
        print("sample " + json.dumps(run(int(line))), flush=True)


if __name__ == "__main__":
    main()
