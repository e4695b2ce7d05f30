"""What a trained model knows beyond counting: held-out nats of a model beside n-gram models of the same tokens.

    python benchmarks/ngram.py DATA --model CHECKPOINT --log CHECKPOINT/training_log.jsonl --out results.json

DATA is a folder that `haomiao.train.prepare` wrote: the n-gram models (`haomiao.train.ngram`, interpolated Kneser-Ney)
count all its training tokens, and everything is judged on the same held-out tokens, each language apart. The model sees
windows of its training length, an n-gram model every token before it, so that windows are the model's disadvantage.
Nats per token belong to one vocabulary, nats per byte compare any two. Intervals (95 %, bootstrap) are over windows of
512 tokens; `gain` is the model against the order 5 on the same windows. With `--log`, the training log's loss against
tokens is reported beside (of several logs, one after another: a model that began as another), and with `--svg` drawn.
The machine is printed first, one JSON line last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from haomiao.metrics.statistics import bootstrap_mean
from haomiao.train.curve import loss_against_tokens
from haomiao.train.ngram import NGram
from haomiao.train.pretrain import token_bytes
from haomiao.train.shards import Shards

WINDOW = 512
SHARES = 16
"""Of all tokens, in the curve of the loss."""
F64 = npt.NDArray[np.float64]


def training_stream(data: Shards) -> npt.NDArray[np.int64]:
    """All training tokens."""
    names = [name for name, _ in data.manifest["train"]]
    return np.concatenate([np.fromfile(data.folder / Path(name).name, "<u2") for name in names]).astype(np.int64)


def model_nats(name: str | None, stream: npt.NDArray[np.int64], threads: int) -> F64:
    """Nats of each token but the first of every window, float64 [windows, WINDOW], in torch (float32)."""
    import torch
    import torch.nn.functional as F

    from haomiao.train.graph import Graph
    from haomiao.train.starting import open_starting

    torch.set_num_threads(threads)
    model = open_starting(name)
    plan = model.plan(WINDOW + 1)
    graph, weights = Graph(plan), model.weights(plan)
    found = np.empty((len(stream) // WINDOW, WINDOW))
    with torch.no_grad():
        for row in range(len(found)):
            ids = torch.from_numpy(stream[row * WINDOW : (row + 1) * WINDOW + 1])
            logits = graph.logits(weights, ids[None, :-1])[0]
            found[row] = F.cross_entropy(logits.float(), ids[1:], reduction="none").numpy()
    return found


def summary(nats: F64, sizes: F64) -> dict[str, Any]:
    """Nats [windows, WINDOW] and the bytes of each window: per token, perplexity, per byte, with their intervals."""
    token = bootstrap_mean(nats.mean(axis=1))
    byte = bootstrap_mean(nats.sum(axis=1) / sizes, sizes)
    return {
        "nats_token": [round(x, 4) for x in (token.estimate, token.low, token.high)],
        "perplexity": [round(float(np.exp(x)), 1) for x in (token.estimate, token.low, token.high)],
        "nats_byte": [round(x, 4) for x in (byte.estimate, byte.low, byte.high)],
    }


def main() -> None:
    """Count, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", help="checkpoint or artifact (default: the embedded model)")
    parser.add_argument("--orders", default="3,4,5")
    parser.add_argument("--tokens", type=int, default=1 << 16, help="held-out tokens of each language")
    parser.add_argument("--log", type=Path, action="append", help="training log of the model; repeatable, in order")
    parser.add_argument("--svg", type=Path, help="draw loss against tokens beside the n-gram models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    from haomiao.measure.machine import describe_machine

    print(json.dumps(dataclasses.asdict(describe_machine()), default=str))
    data = Shards(args.data)
    bytes_of = token_bytes(args.data / "tokenizer.json", data.vocab_size)
    stream = training_stream(data)
    windows = {name: min(args.tokens, len(held) - 1) // WINDOW for name, held in data.valid.items()}
    held = {name: np.asarray(data.valid[name][: count * WINDOW + 1], np.int64) for name, count in windows.items()}
    sizes = {
        name: bytes_of[tokens[1:]].reshape(-1, WINDOW).sum(axis=1).astype(np.float64) for name, tokens in held.items()
    }
    nats: dict[str, dict[str, F64]] = {name: {} for name in held}
    about: dict[str, Any] = {}
    for order in map(int, args.orders.split(",")):
        began = time.perf_counter()
        model = NGram(stream, data.vocab_size, order)
        grams = [len(level.keys) for level in model.orders]
        about[f"order {order}"] = {"n-grams": grams, "seconds": round(time.perf_counter() - began, 1)}
        for name, tokens in held.items():
            nats[name][f"order {order}"] = -np.log(model.probabilities(tokens)[1:]).reshape(-1, WINDOW)
        print(f"order {order}: {grams[-1]} n-grams, {time.perf_counter() - began:.0f} s", flush=True)
        del model
    for name, tokens in held.items():
        nats[name]["model"] = model_nats(args.model, tokens, args.threads)
    results: dict[str, Any] = {"train_tokens": len(stream), "vocabulary": data.vocab_size, "about": about}
    for name, kinds in nats.items():
        best = min((kind for kind in kinds if kind != "model"), key=lambda kind: float(kinds[kind].mean()))
        gain = bootstrap_mean((kinds[best] - kinds["model"]).mean(axis=1))
        results[name] = {kind: summary(values, sizes[name]) for kind, values in kinds.items()}
        results[name]["tokens"] = windows[name] * WINDOW
        results[name]["gain"] = {
            "over": best,
            "nats_token": [round(x, 4) for x in (gain.estimate, gain.low, gain.high)],
            "windows": f"{int((kinds['model'].mean(axis=1) < kinds[best].mean(axis=1)).sum())} of {windows[name]}",
        }
    if args.log:
        curve = loss_against_tokens(args.log, SHARES)
        results["scaling"] = [{"tokens": tokens, "loss": round(loss, 4)} for tokens, loss in curve]
    if args.svg:
        args.svg.write_text(drawn(results), encoding="utf-8")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


def drawn(results: dict[str, Any]) -> str:
    """Training loss against tokens as SVG; dashed: held-out figures of the model and of the best n-gram model."""
    width, height, left, top = 640, 300, 52, 20
    inner, tall = width - left - 150, height - top - 40
    points = results.get("scaling", [])
    marks = []
    for name in ("en", "zh"):
        if name in results:
            order = results[name]["gain"]["over"]
            ours, counted = (results[name][kind]["nats_token"][0] for kind in ("model", order))
            place_ours, place_counted = (-3, 9) if ours > counted else (9, -3)  # the greater stands above
            marks += [
                (f"{name}, held out", ours, "#1f6feb", place_ours),
                (f"{name}, {order.removeprefix('order ')}-gram", counted, "#888", place_counted),
            ]
    most = max([p["tokens"] for p in points], default=1)
    values = [p["loss"] for p in points] + [value for _, value, _, _ in marks]
    low, high = min(values) - 0.3, max(values) + 0.3

    def place(tokens: float, loss: float) -> tuple[float, float]:
        return left + inner * tokens / most, top + tall * (high - loss) / (high - low)

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(p["tokens"], p["loss"]) for p in points))
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<polyline points="{line}" fill="none" stroke="#d97706" stroke-width="2"/>',
    ]
    for loss in range(int(np.ceil(low)), int(high) + 1):
        _, y = place(0, loss)
        out.append(
            f'<path d="M{left} {y:.1f}H{left + inner}" stroke="#ddd"/>'
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{loss}</text>'
        )
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, _ = place(share * most, low)
        out.append(f'<text x="{x:.1f}" y="{top + tall + 16}" text-anchor="middle">{share * most / 1e6:.0f} M</text>')
    for text, value, colour, below in marks:
        _, y = place(most, value)
        out.append(f'<path d="M{left} {y:.1f}H{left + inner}" stroke="{colour}" stroke-dasharray="4 3"/>')
        out.append(f'<text x="{left + inner + 6}" y="{y + below:.1f}" fill="{colour}">{text} {value:.2f}</text>')
    out.append(f'<text x="{left + inner / 2:.0f}" y="{height - 6}" text-anchor="middle">tokens seen</text>')
    out.append(f'<text x="{left}" y="12">nats per token; the line: training loss, both languages</text></svg>')
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    main()
