"""Pretrain a model from nothing: `python -m haomiao.train.pretrain CONFIG --data DATA --out RUN`.

CONFIG is one file per class of machine (configs/); DATA comes from `haomiao.train.prepare`. The run may be stopped at
any moment and goes on with the same command. At the end, and with --export at any time, RUN/model is a Hugging Face
directory that every command opens; RUN/log.jsonl holds loss, throughput and held-out perplexity by language.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from haomiao.errors import InputError
from haomiao.load.source import open_source
from haomiao.models.plan import Plan
from haomiao.models.registry import plan_for
from haomiao.progress import ProgressBar
from haomiao.train.command import run_command
from haomiao.train.devices import precise, take_device
from haomiao.train.graph import Graph
from haomiao.train.grow import Grown
from haomiao.train.loop import Loop, Rhythm, read_log
from haomiao.train.optimizers import Optimizer
from haomiao.train.settings import Training, read_training
from haomiao.train.shards import Shards
from haomiao.train.state import RunFolder
from haomiao.train.weights import new_weights, read_weights, write_checkpoint

DECIDES = ("model", "length", "batch", "accumulate", "optimizer", "learning_rate", "weight_decay", "clip")
DECIDES_TOO = ("warmup", "schedule", "decay", "floor", "precision", "seed")
"""Settings that decide the numbers; a run goes on only under the same ones. `steps` joins them except for a trapezoid
that has not begun to fall."""


class NextToken:
    """The task of pretraining: the next token of packed text."""

    def __init__(
        self, plan: Plan, weights: Mapping[str, Tensor], shards: Shards, training: Training, device: torch.device
    ) -> None:
        self.weights, self.shards, self.training, self.device = weights, shards, training, device
        self.tokens = training.batch * training.accumulate * training.length
        self._graph = Graph(plan)
        self._learn: Callable[[Tensor], Tensor] = torch.compile(self._loss) if training.compile else self._loss
        self._bytes = token_bytes(shards.folder / "tokenizer.json", plan.vocab_size)

    def backward(self, step: int) -> Tensor:
        """Mean loss in nats per token, gradients left in the weights."""
        t = self.training
        total = torch.zeros((), device=self.device)
        for index in range(t.accumulate):
            rows = self.shards.batch(t.seed, step * t.accumulate + index, t.batch, t.length)
            loss = self._learn(torch.from_numpy(rows).to(self.device)) / t.accumulate
            torch.autograd.backward(loss)
            total += loss.detach()
        return total

    def _loss(self, rows: Tensor) -> Tensor:
        with precise(self.device, self.training.precision):
            logits = self._graph.logits(self.weights, rows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())

    def validate(self) -> dict[str, float]:
        """Held-out nats per token and per byte, by language; `loss` is the mean of the latter over languages."""
        figures: dict[str, float] = {}
        for language, stream in self.shards.valid.items():
            length, batch = self.training.length, self.training.batch
            count = min(len(stream) - 1, self.training.validate_tokens) // length
            if count < 1:
                raise InputError(f"the held-out {language} text is shorter than {length} tokens", param="length")
            rows = np.stack([np.asarray(stream[i * length : (i + 1) * length + 1], np.int64) for i in range(count)])
            nats = 0.0
            with torch.no_grad():
                for begin in range(0, count, batch):
                    part = torch.from_numpy(rows[begin : begin + batch]).to(self.device)
                    nats += float(self._loss(part)) * part.shape[0] * length
            figures[f"{language}_token"] = nats / (count * length)
            figures[f"{language}_byte"] = nats / float(self._bytes[rows[:, 1:]].sum())
        per_byte = [value for name, value in figures.items() if name.endswith("_byte")]
        return {"loss": sum(per_byte) / len(per_byte)} | figures


def token_bytes(path: Path, size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """How many bytes of text each token of a byte-level vocabulary stands for; specials for none."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    special = set(tokenizer.get_added_tokens_decoder())
    counts = np.zeros(size, np.int64)
    for token, index in tokenizer.get_vocab().items():
        counts[index] = 0 if index in special else len(token)  # one character stands for one byte
    return counts


def model_config(training: Training, vocab_size: int) -> dict[str, Any]:
    """The config.json of the model: Llama's terms, with what the settings leave out."""
    given = dict(training.model)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **given,
    }
    if config["vocab_size"] < vocab_size:
        raise InputError(f"vocab_size {config['vocab_size']} is less than the data's {vocab_size}", param="model")
    return config


def identity_of(training: Training, shards: Shards) -> dict[str, Any]:
    """What decides the numbers of a run."""
    values = dataclasses.asdict(training)
    decides = {name: values[name] for name in (*DECIDES, *DECIDES_TOO)}
    if training.schedule != "trapezoid":
        decides["steps"] = training.steps
    return decides | {"data": shards.identity}


def pretrain(
    training: Training,
    data: Path,
    out: Path,
    *,
    start: str | None = None,
    restart: bool = False,
    stop_after: int | None = None,
    export_only: bool = False,
    tell: Callable[[str, int, int, str], None] | None = None,
) -> bool:
    """Train in the folder `out`, from random weights or those of the smaller model `start`; False if the run was
    interrupted. Writes `out/model` at the end."""
    shards = Shards(data)
    device = take_device(training.device, training.threads)
    config = model_config(training, shards.vocab_size)
    plan = plan_for(config, max_context=max(training.length, 2))
    identity = identity_of(training, shards)
    if start is None:
        first = new_weights(plan, training.seed)
    else:
        smaller = Grown(open_source(start), config, training.seed)
        first = read_weights(plan, smaller)
        identity["start"] = Path(smaller.name).name
        smaller.close()
    weights = {n: w.to(device).requires_grad_() for n, w in first.items()}
    optimizer = Optimizer(plan, weights, training.optimizer, training.learning_rate, training.weight_decay)
    with RunFolder(out, identity, part_mib=training.part_mib, restart=restart) as folder:
        if export_only:
            state = folder.latest()
            if state is None:
                raise InputError(f"{out} holds no checkpoint yet", param="out")
            kept = {n.removeprefix("weight/"): t for n, t in state.tensors.items() if n.startswith("weight/")}
            write_checkpoint(out / "model", plan, kept, config, shards.files, overwrite=True)
            return True
        rhythm = Rhythm(
            log_every=training.log_every,
            validate_every=training.validate_every,
            checkpoint_minutes=training.checkpoint_minutes,
            clip=training.clip,
            stop_after=stop_after,
        )
        task = NextToken(plan, weights, shards, training, device)
        finished = Loop(task, weights, optimizer, training.plan, folder, rhythm, tell).run()
        if finished:
            write_checkpoint(out / "model", plan, weights, config, shards.files, overwrite=True)
    return finished


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder that haomiao.train.prepare wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, help="instead of the config's")
    parser.add_argument("--threads", type=int, help="CPU threads (default: the cores this process may use)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--restart", action="store_true", help="discard the run's checkpoints and begin anew")
    parser.add_argument("--export", action="store_true", help="only write RUN/model from the newest checkpoint")
    parser.add_argument("--start", metavar="MODEL", help="begin as this smaller model, and grow it")
    args = parser.parse_args(argv)
    training = read_training(args.config, steps=args.steps, threads=args.threads, device=args.device)
    with ProgressBar(counted=True) as bar:
        finished = pretrain(
            training,
            args.data,
            args.out,
            start=args.start,
            restart=args.restart,
            export_only=args.export,
            tell=bar,
        )
    held: dict[str, Any] = next((line for line in reversed(read_log(args.out)) if "valid_loss" in line), {})
    for name in held:
        if name.endswith("_token"):
            token, byte = held[name], held[name.replace("_token", "_byte")]
            language = name.removeprefix("valid_").removesuffix("_token")
            told = f"{token:.4f} nats/token (perplexity {math.exp(token):.1f}), {byte:.4f} nats/byte"
            print(f"held out at step {held['step']}, {language}: {told}")
    print(f"{args.out}: {'finished' if finished else 'stopped; the same command goes on'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
