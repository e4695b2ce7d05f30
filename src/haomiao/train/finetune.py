"""Fine-tuning: a model learns prompts and completions, or labels of text; a Hugging Face directory comes out.

Labels are one token each (`labels`), which the written tokenizer_config.json names, or completions. The best weights on
the validation split are kept: by the share of wrong labels (as completions: of those that greedy decoding would get
wrong), else by loss. `OUT.partial` holds what is done, so that the same command goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from haomiao.compress.export.compressed_tensors import check_target
from haomiao.errors import InputError
from haomiao.models.plan import Plan
from haomiao.train.devices import precise, take_device
from haomiao.train.examples import IGNORED, Example, Ids, Pairs, batch_of, encode_pairs, padded, split
from haomiao.train.graph import Graph
from haomiao.train.labels import Choices, MadeUp, encode_labels, name_codes, tokenizer_config
from haomiao.train.loop import LOG, Loop, Rhythm, Tell, read_log
from haomiao.train.lora import Lora
from haomiao.train.optimizers import Optimizer
from haomiao.train.settings import Schedule
from haomiao.train.starting import Starting
from haomiao.train.state import RunFolder
from haomiao.train.weights import write_checkpoint

FULL_RATE, LABEL_RATE, MADE_RATE, LORA_RATE = 5e-4, 1e-3, 2e-3, 3e-3
TRAINING_LOG, TOKENIZER_CONFIG = "training_log.jsonl", "tokenizer_config.json"


@dataclass(frozen=True, slots=True)
class Finetuning:
    """What decides the result."""

    lora: int = 0
    """Rank of the adapters; 0: all weights are trained."""
    alpha: float | None = None
    """Of the adapters; None: twice the rank."""
    epochs: int = 5
    batch: int = 32
    rate: float | None = None
    length: int = 256
    weight_decay: float = 0.05
    valid_share: float = 0.1
    patience: int = 2
    """Validations (one an epoch) without improvement after which it ends; 0: never."""
    codes: bool = False
    """Give every label a token of its own and learn to choose among these (`labels`); else labels are completions."""
    drop: float = 0.0
    """Share of a prompt's tokens that are left out at random, anew in each step. Of codes only."""
    smooth: float = 0.0
    """Share of the certainty that goes to the other labels. Of codes only."""
    made: int = 0
    """Made-up examples beside each, with the opinion of a classifier that counts (`train.made`). Of codes only."""
    layers: int = 0
    """How many of the model's layers are kept, from the first; 0: all."""
    mean: float = 0.0
    """Greatest decay of the exponential mean of the weights that is judged and kept; 0: the weights themselves."""
    precision: str = "f32"
    seed: int = 1

    @classmethod
    def of_labels(cls, **given: Any) -> Finetuning:
        """What was found good for labels of small data (docs/LOG.md), but for what is `given`."""
        return cls(**(LABELS | given))


LABELS: dict[str, Any] = {
    "codes": True,
    "epochs": 10,
    "batch": 16,
    "patience": 4,
    "drop": 0.2,
    "smooth": 0.1,
    "mean": 0.99,
}


class Completions:
    """The task: the tokens of completions, given their prompts. `weights()` gives the model's weights as they are."""

    def __init__(
        self,
        plan: Plan,
        weights: Callable[[], Mapping[str, Tensor]],
        train: Sequence[Example],
        valid: Sequence[Example],
        settings: Finetuning,
        device: torch.device,
    ) -> None:
        self._graph, self._weights = Graph(plan), weights
        self._train, self._valid, self._settings, self._device = train, valid, settings, device
        self.tokens = max(1, settings.batch * sum(len(e.ids) for e in train) // len(train))  # on average

    def backward(self, step: int) -> Tensor:
        """Mean loss in nats per token of the completions."""
        ids, targets = batch_of(self._train, self._settings.seed, step, self._settings.batch)
        logits, wanted = self._compute(self._weights(), ids, targets)
        loss = F.cross_entropy(logits, wanted)
        torch.autograd.backward(loss)
        return loss.detach()

    def _compute(self, weights: Mapping[str, Tensor], ids: Ids, targets: Ids) -> tuple[Tensor, Tensor]:
        """Logits [places, vocab] where a prediction counts, and the tokens that are wanted there."""
        wanted = torch.from_numpy(targets).to(self._device)
        counts = wanted != IGNORED
        with precise(self._device, self._settings.precision):
            logits = self._graph.logits(weights, torch.from_numpy(ids).to(self._device), counts)
        return logits.float(), wanted[counts]

    def validate(self) -> dict[str, float]:
        """`loss` in nats per token, and `error`: the share of completions that greedy decoding would get wrong."""
        nats, tokens, wrong = 0.0, 0, 0
        by_length = sorted(self._valid, key=lambda example: len(example.ids))
        with torch.no_grad():
            weights = self._weights()
            for begin in range(0, len(by_length), self._settings.batch):
                ids, targets = padded(by_length[begin : begin + self._settings.batch])
                logits, wanted = self._compute(weights, ids, targets)
                nats += float(F.cross_entropy(logits, wanted, reduction="sum"))
                tokens += len(wanted)
                rows = torch.from_numpy(np.nonzero(targets != IGNORED)[0]).to(self._device)
                wrong += len(torch.unique(rows[logits.argmax(dim=-1) != wanted]))
        return {"loss": nats / tokens, "error": wrong / len(by_length)}


def finetune(
    model: Starting,
    data: Pairs,
    out: Path,
    settings: Finetuning,
    *,
    valid: Pairs | None = None,
    device: str = "auto",
    threads: int | None = None,
    restart: bool = False,
    stop_after: int | None = None,
    tell: Tell | None = None,
    note: Callable[[str], None] | None = None,
) -> dict[str, Any] | None:
    """Train, write the directory `out` and return the figures of its weights; None if the run was interrupted.

    Raises `InputError` for data that cannot be learnt, and as `RunFolder` and `write_checkpoint` do.
    """
    check_target(out)
    where = take_device(device, threads)
    if settings.codes and not (data.labels and (valid is None or valid.labels)):
        raise InputError("codes are for labels; these data are completions", param="data")
    if not settings.codes and (settings.drop or settings.smooth or settings.made):
        raise InputError("drop, smooth and made are for labels that are learnt as codes", param="drop")
    if settings.layers:
        model = model.shortened(settings.layers)
    train, held = _parts(data, valid, settings)
    tokenizer = model.tokenizer()
    coded = None
    learnt: Sequence[Example]
    judged: Sequence[Example]
    if settings.codes:
        vocabulary = int(model.config.get("vocab_size", tokenizer.vocab_size))
        coded = encode_labels(train, held, tokenizer, vocabulary, settings.length)
        learnt, judged, cut = coded.train, coded.valid, coded.cut
    else:
        (learnt, cut), (judged, more) = (
            encode_pairs(part, tokenizer, model.end_token(), settings.length) for part in (train, held)
        )
        cut += more
    if cut and note is not None:
        note(f"{cut} prompts are longer than {settings.length} tokens and lose their beginning")
    plan = model.plan(max(len(example.ids) for example in (*learnt, *judged)))
    base = {name: weight.to(where) for name, weight in model.weights(plan).items()}
    if coded is not None:
        name_codes(plan, base, coded.codes, tokenizer)
    lora = (
        Lora(plan, base, settings.lora, settings.alpha or 2.0 * settings.lora, settings.seed) if settings.lora else None
    )
    if lora is None:
        for weight in base.values():
            weight.requires_grad_()
    trained = base if lora is None else lora.weights
    usual = MADE_RATE if settings.made else LABEL_RATE if settings.codes else FULL_RATE
    rate = settings.rate or (LORA_RATE if settings.lora else usual)
    steps_of_epoch = max(1, len(learnt) // min(settings.batch, len(learnt)))
    steps = settings.epochs * steps_of_epoch
    schedule = Schedule(steps=steps, schedule="cosine", warmup=min(steps - 1, steps // 20 + 1), floor=0.02)
    rhythm = Rhythm(
        log_every=max(1, min(10, steps_of_epoch // 4)),
        validate_every=steps_of_epoch,
        checkpoint_minutes=2.0,
        patience=settings.patience or settings.epochs + 1,
        mean=settings.mean,
        judge="error" if data.labels else "loss",
        stop_after=stop_after,
    )
    partial = out.absolute().with_name(f"{out.absolute().name}.partial")
    identity = dataclasses.asdict(settings) | {"model": model.identity, "data": _digest(learnt)}
    identity |= {"valid": _digest(judged)}
    with RunFolder(partial, identity, restart=restart) as folder:

        def weights() -> Mapping[str, Tensor]:
            return base if lora is None else lora.merged()

        counted = None if coded is None or not settings.made else MadeUp(coded, data, tokenizer, settings)
        task = (
            Completions(plan, weights, learnt, judged, settings, where)
            if coded is None
            else Choices(plan, weights, coded, settings, where, counted)
        )
        optimizer = Optimizer(plan, trained, "adamw", rate, settings.weight_decay)
        loop = Loop(task, trained, optimizer, schedule, folder, rhythm, tell)
        if not loop.run():
            return None
        with torch.no_grad():
            whole = weights()
            figures = task.validate()
        files = dict(model.files) | {TRAINING_LOG: (partial / LOG).read_bytes()}
        if coded is not None:
            files[TOKENIZER_CONFIG] = tokenizer_config(files.get(TOKENIZER_CONFIG), coded.codes, data.template)
        write_checkpoint(out, plan, whole, model.config, files, dtype="float32")
        report = {"examples": len(learnt), "validation": len(judged), "steps": loop.step, **figures}
        report["labels"] = 0 if coded is None else len(coded.codes)
        if counted is not None:
            report["counting_error"] = 1 - max(counted.maker.shares)
        report["began_with"] = read_log(partial)[0]["valid_error"]
    shutil.rmtree(partial, ignore_errors=True)
    return report


def _parts(
    data: Pairs, valid: Pairs | None, settings: Finetuning
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What is learnt, and what is held out."""
    if len(data.pairs) < 2:
        raise InputError("at least two examples are needed", param="data")
    if valid is not None:
        return list(data.pairs), list(valid.pairs)
    kept, held = split(len(data.pairs), settings.valid_share, settings.seed)
    return [data.pairs[i] for i in kept], [data.pairs[i] for i in held]


def _digest(examples: Sequence[Example]) -> str:
    return hashlib.sha256(repr([(e.ids, e.learnt) for e in examples]).encode()).hexdigest()[:16]
