"""Labels of text as a model decides them: one token each, chosen from the row of logits that ends the prompt.

Every label is given a token of its own that the examples do not use. What is learnt is what is decided: the loss is
over the labels' tokens alone, since a choice compares nothing else, and no end follows. Small data are learnt by heart
within a few epochs, so three things hold against that: tokens of the prompt are left out at random (word dropout, Iyyer
et al. 2015, "Deep unordered composition rivals syntactic methods", section 3), part of the certainty goes to the other
labels (Szegedy et al., arXiv:1512.00567, section 7), and what is judged and kept is an exponential mean of the weights
(Polyak and Juditsky 1992; `loop`). Knows nothing about files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from haomiao.errors import InputError, UnsupportedModelError
from haomiao.load.jsonfile import parse_object
from haomiao.models.plan import Head, Plan
from haomiao.text.tokenizer import Tokenizer
from haomiao.train.devices import precise
from haomiao.train.examples import Example, encode_prompts, taken
from haomiao.train.graph import Graph

DROP = 3
"""Names the stream of random numbers that leaves tokens out."""


@dataclass(frozen=True)
class Coded:
    """Examples whose last token is the code of their label."""

    codes: Mapping[str, int]
    """Label -> token."""
    train: list[Example]
    valid: list[Example]
    cut: int
    """Prompts that lost their beginning."""


def encode_labels(
    train: Sequence[tuple[str, str]],
    valid: Sequence[tuple[str, str]],
    tokenizer: Tokenizer,
    vocabulary: int,
    length: int,
) -> Coded:
    """Examples of prompts and labels. A model that has these labels already keeps their tokens; else they are the
    last of the vocabulary that no prompt uses. Raises `InputError` if there are not as many."""
    labels = sorted({label for _, label in (*train, *valid)})
    if len(labels) < 2:
        raise InputError("labels of at least two kinds are needed", param="data")
    prompts, cut = encode_prompts([prompt for prompt, _ in (*train, *valid)], tokenizer, length)
    known = tokenizer.codes(labels)
    if known is not None:
        codes = {label: code for label, (code,) in zip(labels, known, strict=True)}
    else:
        used = {id_ for ids in prompts for id_ in ids} | set(tokenizer.special_ids) | set(tokenizer.eos_ids)
        free = (id_ for id_ in range(min(vocabulary, tokenizer.vocab_size) - 1, -1, -1) if id_ not in used)
        codes = dict(zip(labels, free, strict=False))
        if len(codes) < len(labels):
            raise InputError(f"the vocabulary has no {len(labels)} tokens that the data do not use", param="data")
    examples = [Example((*ids, codes[label]), 1) for ids, (_, label) in zip(prompts, (*train, *valid), strict=True)]
    return Coded(codes, examples[: len(train)], examples[len(train) :], cut)


def name_codes(plan: Plan, weights: Mapping[str, Tensor], codes: Mapping[str, int], tokenizer: Tokenizer) -> None:
    """Let each label's token begin as the mean of the tokens that its name is written with, in the head's rows; not
    where the model has learnt these labels before."""
    if tokenizer.codes(list(codes)) is not None:
        return
    head = plan.ops[-1]
    if not isinstance(head, Head):
        raise UnsupportedModelError(f"the plan of {plan.family} does not end with its head")
    table = weights[head.weight]
    with torch.no_grad():
        rows = {code: table[tokenizer.encode_part(label.replace("_", " "), False)] for label, code in codes.items()}
        for code, written in rows.items():
            if len(written):
                table[code] = written.mean(dim=0)


def with_gaps(example: Example, share: float, random: np.random.Generator) -> Example:
    """The example without a share of its tokens; the first, the last of the prompt and the label stay."""
    ids = np.array(example.ids)
    stays = random.random(len(ids)) >= share
    stays[[0, -2, -1] if len(ids) > 1 else [0]] = True
    return replace(example, ids=tuple(ids[stays].tolist()))


class Settings(Protocol):
    """What of a run's settings matters here; `finetune.Finetuning` says what they are."""

    @property
    def batch(self) -> int: ...
    @property
    def drop(self) -> float: ...
    @property
    def smooth(self) -> float: ...
    @property
    def precision(self) -> str: ...
    @property
    def seed(self) -> int: ...


class Choices:
    """The task: the label of each prompt. `weights()` gives the model's weights as they are."""

    def __init__(
        self,
        plan: Plan,
        weights: Callable[[], Mapping[str, Tensor]],
        data: Coded,
        settings: Settings,
        device: torch.device,
    ) -> None:
        self._graph, self._weights, self._data = Graph(plan), weights, data
        self._settings, self._device = settings, device
        self._codes = torch.tensor(list(data.codes.values()), device=device)
        self._place = {code: place for place, code in enumerate(data.codes.values())}
        self.tokens = max(1, settings.batch * sum(len(e.ids) - 1 for e in data.train) // len(data.train))  # on average

    def backward(self, step: int) -> Tensor:
        """Mean loss in nats of a decision."""
        examples = taken(self._data.train, self._settings.seed, step, self._settings.batch)
        if self._settings.drop:
            random = np.random.Generator(np.random.Philox([self._settings.seed, DROP, step]))
            examples = [with_gaps(example, self._settings.drop, random) for example in examples]
        logits, wanted = self._compute(examples)
        loss = F.cross_entropy(logits, wanted, label_smoothing=self._settings.smooth)
        torch.autograd.backward(loss)
        return loss.detach()

    def _compute(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Logits [examples, labels] at the end of each prompt, and the places of the labels that are right."""
        longest = max(len(example.ids) for example in examples) - 1
        ids, last = np.zeros((len(examples), longest), np.int64), np.zeros((len(examples), longest), np.bool_)
        for row, example in enumerate(examples):
            size = len(example.ids) - 1
            ids[row, :size] = example.ids[:-1]
            last[row, size - 1] = True
        wanted = torch.tensor([self._place[example.ids[-1]] for example in examples], device=self._device)
        with precise(self._device, self._settings.precision):
            places = torch.from_numpy(last).to(self._device)
            logits = self._graph.logits(self._weights(), torch.from_numpy(ids).to(self._device), places)
        return logits.float()[:, self._codes], wanted

    def validate(self) -> dict[str, float]:
        """`loss` in nats of a decision, and `error`: the share of wrong ones."""
        nats, wrong = 0.0, 0
        by_length = sorted(self._data.valid, key=lambda example: len(example.ids))
        with torch.no_grad():
            for begin in range(0, len(by_length), self._settings.batch):
                logits, wanted = self._compute(by_length[begin : begin + self._settings.batch])
                nats += float(F.cross_entropy(logits, wanted, reduction="sum"))
                wrong += int((logits.argmax(dim=-1) != wanted).sum())
        return {"loss": nats / len(by_length), "error": wrong / len(by_length)}


def tokenizer_config(written: Path | bytes | None, codes: Mapping[str, int], template: str) -> bytes:
    """A tokenizer_config.json that names the codes and the form of prompts, as `Tokenizer.labels` reads them."""
    data = written.read_bytes() if isinstance(written, Path) else written
    config: dict[str, Any] = {} if data is None else parse_object(data, "tokenizer_config.json")
    marker = config.get("haomiao")
    config["haomiao"] = {**(marker if isinstance(marker, dict) else {}), "labels": dict(codes), "prompt": template}
    return (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode()
