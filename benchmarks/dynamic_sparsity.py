"""Skipping the FFN neurons that a token hardly uses: what it costs in KL, and what of a decode step it would save.

    python benchmarks/dynamic_sparsity.py ARTIFACT CHECKPOINT --text english.txt --text chinese.txt \\
        --static compression.jsonl --out RESULTS.json

An experiment with numpy: nothing in the engine skips neurons. ARTIFACT's matrices at --point, float32 activations; a
neuron's score is |act(gate)| (`gate`: CATS, arXiv 2404.08763; `up` and `down` are then skipped) or |act(gate) * up|
(`product`: `down`'s input by TEAL, arXiv 2408.14690; `down` is skipped. `oracle` is the same choice, known beforehand
and skipping all three: a bound on every predictor), times the norm of its column of `down`. Groups of neurons stay or
go as a whole, by the root of the sum of their squares; thresholds come from the package's calibration text, a share of
groups in every layer alike; KL against CHECKPOINT's own weights is measured on --text, which is not in it. `permuted`:
neurons that are on and off together are put together first (greedily, then by swaps). `rows4`: the share that four
tokens of different places all skip.

The time of a step is arithmetic: bytes of Qwen2.5-0.5B's step at int4, and for the matrices concerned either what is
left of them (`free`) or the speeds that prototypes of such kernels had (`threads2`, `threads1`; AVX-512, 896 columns).
Beside each the KL of pruning neurons for good at the same time, from --static (`benchmarks/compression.py table`),
log-linear between its points, and the time where four tokens share a step. The table first, one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from haomiao.compress.forward import Weights, activate, run
from haomiao.kernels.packed import PackedTensor
from haomiao.models import plan as ops
from haomiao.types import F32, I32

WINDOW = 512
ROWS = 4
WAYS = ("gate", "product")
SIZES = (1, 4, 8)
SHARES = (0.3, 0.42, 0.55, 0.7)
ACTIVE = 0.5
"""Share of neurons that count as active where co-activation is measured."""

FFN_MB, STEP_MB = 176.5, 277.9
"""Of a step of Qwen2.5-0.5B at int4, group 32: its FFN, and all (screened head: the first plane)."""
SKIPPED = {"gate": 2 / 3, "product": 1 / 3, "oracle": 1.0}
"""Of the FFN's bytes: the part that is skipped by neuron."""
MEASURED_AT = (0.0, 0.3, 0.5, 0.7)
SPEEDS = {  # over the dense kernel's, where that share is skipped
    ("threads2", 1): (0.79, 1.04, 1.28, 2.11),
    ("threads1", 1): (0.57, 0.70, 0.87, 1.36),
    ("threads2", 4): (0.89, 1.23, 1.61, 2.32),
    ("threads1", 4): (0.75, 0.93, 1.22, 1.66),
}
STATIC = ("gptq-g32", "neurons-10", "neurons-30")
"""Ways of the table that prune neurons for good; the first prunes none."""


# ---- the model


@dataclass(frozen=True)
class Layer:
    """An FFN: its `Glu`, which neurons it really has (not padding), and the norms of their columns of `down`."""

    op: ops.Glu
    real: I32
    norms: F32


class Model:
    """An artifact's plan with its matrices in float32."""

    def __init__(self, plan: ops.Plan, tensors: dict[str, PackedTensor], vectors: dict[str, F32], point: str) -> None:
        from haomiao.kernels.pack import unpack

        self.plan, self.vectors = plan, vectors
        body = "hi" if point == "int4" else "hi+lo"
        roles = {name: spec.role for name, spec in plan.weights.items()}
        self.matrices = {n: unpack(t, body if roles.get(n) == "body" else "hi+lo") for n, t in tensors.items()}
        self.weights = Weights(self._matrix, lambda name, ids: self._matrix(name)[ids], lambda name: vectors[name])
        self.layers: dict[int, Layer] = {}
        self.ffn_bytes = 0
        for place, op in enumerate(plan.ops):
            if isinstance(op, ops.Glu):
                down = next(o for o in plan.ops[place:] if isinstance(o, ops.Linear) and o.source == op.out)
                before = reversed(plan.ops[:place])  # layers share their buffers: the nearest is this one's
                up = next(o for o in before if isinstance(o, ops.Linear) and o.out == op.source)
                for read in (up, down):  # weights of layers have names of their own
                    tensor = tensors[read.weight]
                    self.ffn_bytes += tensor.hi.nbytes if point == "int4" else tensor.nbytes
                norms = np.linalg.norm(self._matrix(down.weight), axis=0)
                self.layers[place] = Layer(op, np.flatnonzero(norms).astype(np.int32), norms[norms > 0])
        if not self.layers:
            raise SystemExit(f"a model of family {plan.family} has no gated FFN")

    def _matrix(self, name: str) -> F32:
        return self.matrices[name]

    def logits(self, ids: Sequence[int], skip: Skip | None = None) -> F32:
        """Logits [tokens, vocab] of one sequence."""
        buffers: dict[str, F32] = {}
        tokens = np.asarray(ids, np.int32)[None]
        for place, op in enumerate(self.plan.ops):
            if isinstance(op, ops.Head):
                logits: F32 = buffers[op.source] @ self._matrix(op.weight).T * np.float32(op.scale)
                return np.float32(op.softcap) * np.tanh(logits / np.float32(op.softcap)) if op.softcap else logits
            run(self.plan, self.weights, buffers, tokens, place, place + 1)
            if skip is not None and place in self.layers:
                layer = self.layers[place]
                gates = buffers[layer.op.source].reshape(len(ids), -1, 2, 32)[:, :, 0]
                skip(place, layer, activate(gates, layer.op.activation).reshape(len(ids), -1), buffers[layer.op.out])
        raise SystemExit("the plan has no head")


class Skip:
    """Called at every FFN with act(gate) and act(gate) * up [tokens, neurons]; the latter is set to 0 where skipped."""

    def __call__(self, place: int, layer: Layer, gates: F32, products: F32) -> None:
        """To be overridden."""


class Record(Skip):
    """Keeps the squares of both scores: way -> place -> [tokens, real neurons]."""

    def __init__(self) -> None:
        self.squares: dict[str, dict[int, list[F32]]] = {way: {} for way in WAYS}

    def __call__(self, place: int, layer: Layer, gates: F32, products: F32) -> None:
        for way, values in zip(WAYS, (gates, products), strict=True):
            self.squares[way].setdefault(place, []).append(squares(values, layer))


class Groups(Skip):
    """Skips groups below a threshold: place -> (group of every real neuron, threshold of the sum of squares)."""

    def __init__(self, way: str, groups: dict[int, tuple[I32, float]]) -> None:
        self.way, self.groups = way, groups
        self.kept: dict[int, list[Any]] = {}

    def __call__(self, place: int, layer: Layer, gates: F32, products: F32) -> None:
        member, threshold = self.groups[place]
        kept = summed(squares(gates if self.way == "gate" else products, layer), member) > threshold
        self.kept.setdefault(place, []).append(kept)
        products[:, layer.real] *= kept[:, member]

    def skipped(self, rows: int) -> float:
        """Share of groups that `rows` tokens all skip, one of each of as many equal parts of the text."""
        shares = []
        for parts in self.kept.values():
            kept = np.concatenate(parts)
            kept = kept[: len(kept) // rows * rows].reshape(rows, -1, kept.shape[1])
            shares.append(1 - float(kept.any(axis=0).mean()))
        return float(np.mean(shares))


def squares(values: F32, layer: Layer) -> F32:
    """Squared scores of the real neurons."""
    return np.square(values[:, layer.real] * layer.norms)


def summed(values: F32, member: I32) -> F32:
    """Sums over groups: [tokens, neurons] -> [tokens, groups]."""
    order = np.argsort(member, kind="stable")
    first = np.searchsorted(member[order], np.arange(member.max() + 1))
    out: F32 = np.add.reduceat(values[:, order], first, axis=1)
    return out


# ---- neurons that are active together


def put_together(active: Any, size: int, rounds: int = 50) -> I32:
    """The group of every neuron, so that neurons of a group are on and off together; `active` bool [tokens, neurons].

    Greedily (the most active neuron that is left, and those that agree with it and each other most), then pairs of
    neurons change places while that helps. The last group holds what does not fill one.
    """
    signs = np.where(active, 1, -1).astype(np.float32)
    agree = signs.T @ signs / np.float32(len(signs))
    member = np.empty(len(agree), np.int32)
    left = np.ones(len(agree), np.bool_)
    for begin in range(0, len(agree), size):
        closeness = signs.mean(axis=0)
        for at in range(begin, min(begin + size, len(agree))):
            chosen = int(np.argmax(np.where(left, closeness, -np.inf)))
            closeness = agree[chosen] + (closeness if at > begin else 0)
            member[chosen], left[chosen] = begin // size, False
    for _ in range(rounds):
        if not _swap(agree, member):
            break
    return member


def _swap(agree: F32, member: I32) -> bool:
    """Swap the pairs that gain most, each group at most once; whether any did."""
    totals = agree @ np.eye(int(member.max()) + 1, dtype=np.float32)[member]  # [neurons, groups], itself included
    own = totals[np.arange(len(member)), member] - agree.diagonal()
    there = totals[:, member]
    gain = there + there.T - own[:, None] - own[None, :] - 2 * agree
    gain[member[:, None] == member[None, :]] = 0
    partner = gain.argmax(axis=1)
    best = gain[np.arange(len(member)), partner]
    touched: set[int] = set()
    for i in np.argsort(-best):
        j = partner[i]
        if best[i] <= 1e-4:
            break
        if touched.isdisjoint((int(member[i]), int(member[j]))):
            touched |= {int(member[i]), int(member[j])}
            member[i], member[j] = member[j], member[i]
    return bool(touched)


# ---- time


def step_time(way: str, share: float, size: int, speeds: str) -> float:
    """Of a step, 1 where nothing is skipped; `speeds` names how well skipping pays."""
    if speeds == "free":
        left = 1 - share
    else:
        left = float(np.interp(share, MEASURED_AT, [1 / s for s in SPEEDS[speeds, min(size, 4)]]))
    return 1 - FFN_MB / STEP_MB * SKIPPED[way] * (1 - left)


def front(static: Sequence[tuple[float, float]], time: float) -> float | None:
    """KL of pruning neurons for good so that a step takes `time`; `static` as `static_points` gives it, None beyond."""
    share = (1 - time) / (FFN_MB / STEP_MB)
    if not static or not static[0][0] <= share <= static[-1][0]:
        return None
    shares, logs = [pruned for pruned, _ in static], [math.log(kl) for _, kl in static]
    return math.exp(float(np.interp(share, shares, logs)))


def static_points(path: Path | None, point: str, ffn_bytes: int) -> list[tuple[float, float]]:
    """(share of neurons pruned, KL), ascending, of a file of `benchmarks/compression.py table`.

    The share is the bytes that a step reads less of the `ffn_bytes` that it reads of the FFN at `point`.
    """
    found: dict[str, tuple[int, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path else []:
        record = json.loads(line)
        if record.get("way") in STATIC and point in record.get("points", {}):
            figures = record["points"][point]
            found[record["way"]] = figures["bytes"], figures["kl_mean"]
    if STATIC[0] not in found:
        return []
    whole = found[STATIC[0]][0]
    return sorted(((whole - size) / ffn_bytes, kl) for size, kl in found.values())


# ---- the experiment


def groupings(record: Record, way: str) -> dict[tuple[int, str], dict[int, I32]]:
    """(size, order) -> place -> groups."""
    found: dict[tuple[int, str], dict[int, I32]] = {}
    for size in SIZES:
        for order in ("as they are", "permuted")[: 1 if size == 1 else 2]:
            found[size, order] = {}
            for place, parts in record.squares[way].items():
                values = np.concatenate(parts)
                active = values > np.quantile(values, ACTIVE)
                plain = np.arange(values.shape[1], dtype=np.int32) // size
                found[size, order][place] = plain if order == "as they are" else put_together(active, size)
    return found


def experiment(model: Model, record: Record, reference: Any, ids: list[int], args: Any) -> list[dict[str, Any]]:
    """Every way, size, order and share: a record each."""
    from haomiao.measure.accuracy import measure_agreement

    static = static_points(args.static, args.point, model.ffn_bytes)
    found = []

    def measured(skip: Groups | None) -> dict[str, Any]:
        result = measure_agreement(reference, lambda part: model.logits(part, skip), ids, window=WINDOW)
        half = (result.kl.high - result.kl.low) / 2
        return {"kl": result.kl.estimate, "kl_pm": half, "top1": result.top1.estimate}

    found.append({"way": "none", "size": 0, "order": "", "asked": 0.0, **measured(None)})
    for way in WAYS:
        for (size, order), members in groupings(record, way).items():
            for asked in args.share or SHARES:
                groups = {}
                for place, member in members.items():
                    sums = summed(np.concatenate(record.squares[way][place]), member)
                    groups[place] = member, float(np.quantile(sums, asked))
                skip = Groups(way, groups)
                line = {"way": way, "size": size, "order": order, "asked": asked, **measured(skip)}
                line |= {"skipped": skip.skipped(1), "rows4": skip.skipped(ROWS), "time": {}}
                for kind in (way,) if way == "gate" else (way, "oracle"):
                    for speeds in ("free", "threads2", "threads1"):
                        step, four = (step_time(kind, line[of], size, speeds) for of in ("skipped", "rows4"))
                        line["time"][f"{kind} {speeds}"] = {"step": step, "front": front(static, step), "step4": four}
                found.append(line)
                print(row(line), flush=True)
    return found


def row(line: dict[str, Any]) -> str:
    """Of the table on the terminal."""
    times = "  ".join(
        f"{name} {t['step']:.3f} ({'-' if t['front'] is None else format(t['front'], '.4f')}) x4 {t['step4']:.3f}"
        for name, t in line["time"].items()
    )
    return (
        f"{line['way']:8} {line['size']} {line['order']:12} {line['skipped']:.3f} x4 {line['rows4']:.3f} "
        f"KL {line['kl']:.5f} ± {line['kl_pm']:.5f} top-1 {line['top1']:.3f} | {times}"
    )


def main() -> None:
    """The table, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("checkpoint", help="what the artifact was made of: the reference")
    parser.add_argument("--text", type=Path, action="append", required=True, help="held-out text; repeatable")
    parser.add_argument("--calibration", type=Path, action="append", default=[], help="(default: the package's)")
    parser.add_argument("--tokens", type=int, default=2048, help="of each text")
    parser.add_argument("--samples", type=int, default=32, help="of 256 tokens, for thresholds and permutation")
    parser.add_argument("--point", choices=("int8", "int4"), default="int4")
    parser.add_argument("--share", type=float, action="append", help="of groups to be skipped; repeatable")
    parser.add_argument("--static", type=Path, help="results of `benchmarks/compression.py table`")
    parser.add_argument("--out", type=Path, help="add the JSON line to this file")
    args = parser.parse_args()

    from haomiao.api import LLM
    from haomiao.compress.text import read_texts, take_samples
    from haomiao.load.artifact import Artifact
    from haomiao.models.registry import plan_for

    ids: list[int] = []
    with LLM(args.checkpoint, point="full", max_context=WINDOW, speculate="off") as full:
        for path in args.text:
            text = path.read_text(encoding="utf-8")
            ids += full.tokenize(text[len(text) // 3 :][: args.tokens * 8])[: args.tokens]
        samples = take_samples(read_texts(args.calibration), full.tokenize, samples=args.samples, held=1, length=256)
        windows = [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]
        known = {tuple(part): full.logits(part).copy() for part in windows}
    with Artifact.open(args.artifact) as artifact:
        config = artifact.meta["config"]
        model = Model(plan_for(config, WINDOW), dict(artifact.tensors), dict(artifact.vectors), args.point)
        record = Record()
        for sample in samples.calibration:
            model.logits(sample.tolist(), record)
        found = experiment(model, record, lambda part: known[tuple(part)], ids, args)
    report = {"benchmark": "dynamic_sparsity", "artifact": args.artifact.name, "point": args.point, "tokens": len(ids)}
    line = json.dumps(report | {"samples": args.samples, "points": found})
    if args.out:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
