"""Labels of text as a model decides them: one token each, chosen from the row of logits that ends the prompt.

Every label is given a token of its own that the examples do not use. What is learnt is what is decided: the loss is
over the labels' tokens alone, since a choice compares nothing else, and no end follows. Small data are learnt by heart
within a few epochs, so four things hold against that: a classifier that counts words teaches the model on made-up text
(`made`), tokens of the prompt are left out at random (word dropout, Iyyer et al. 2015, "Deep unordered composition
rivals syntactic methods", section 3), part of the certainty goes to the other labels (Szegedy et al., arXiv:1512.00567,
section 7), and what is judged and kept is an exponential mean of the weights (Polyak and Juditsky 1992; `loop`). Knows
nothing about files.
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
from haomiao.train.examples import Example, Pairs, encode_prompts, taken
from haomiao.train.graph import Graph
from haomiao.train.made import TEMPERATURE, Maker

DROP = 3
"""Names the stream of random numbers that leaves tokens out."""


@dataclass(frozen=True)
class LabelledPrompt(Example):
    """An example whose prompt is remembered as text."""

    prompt: str


@dataclass(frozen=True)
class Coded:
    """Examples whose last token is the code of their label."""

    codes: Mapping[str, int]
    """Label -> token."""
    train: list[LabelledPrompt]
    valid: list[LabelledPrompt]
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
    examples = [
        LabelledPrompt((*ids, codes[label]), 1, prompt)
        for ids, (prompt, label) in zip(prompts, (*train, *valid), strict=True)
    ]
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
    def made(self) -> int: ...
    @property
    def precision(self) -> str: ...
    @property
    def seed(self) -> int: ...


class MadeUp:
    """Made-up examples as the model reads them, with the opinions that it learns."""

    def __init__(self, coded: Coded, form: Pairs, tokenizer: Tokenizer, settings: Settings) -> None:
        places = {code: place for place, code in enumerate(coded.codes.values())}
        (learnt, answers), held = (
            ([form.text_of(e.prompt) for e in part], [places[e.ids[-1]] for e in part])
            for part in (coded.train, coded.valid)
        )
        self.maker = Maker(learnt, answers, len(places), held, settings.seed)
        self._form, self._tokenizer, self._times = form, tokenizer, settings.made
        self._longest = max(len(example.ids) for example in coded.train)

    def of(self, step: int, examples: Sequence[LabelledPrompt]) -> tuple[list[Sequence[int]], Tensor]:
        """Prompts in tokens that vary those of `examples`, none longer than what is learnt, and logits [prompts,
        labels]."""
        texts = [self._form.text_of(example.prompt) for example in examples]
        made = self.maker.make(step, texts, self._times)
        prompts = [self._form.prompt_of(text) for text in made.texts]
        ids, _ = encode_prompts(prompts, self._tokenizer, self._longest)
        return list(ids), made.opinions


class Choices:
    """The task: the label of each prompt. `weights()` gives the model's weights as they are."""

    def __init__(
        self,
        plan: Plan,
        weights: Callable[[], Mapping[str, Tensor]],
        data: Coded,
        settings: Settings,
        device: torch.device,
        counted: MadeUp | None = None,
    ) -> None:
        self._graph, self._weights, self._data, self._counted = Graph(plan), weights, data, counted
        self._settings, self._device = settings, device
        self._codes = torch.tensor(list(data.codes.values()), device=device)
        self._place = {code: place for place, code in enumerate(data.codes.values())}
        average = sum(len(e.ids) - 1 for e in data.train) / len(data.train)
        self.tokens = max(1, round(settings.batch * (1 + settings.made) * average))

    def backward(self, step: int) -> Tensor:
        """Mean loss in nats of a decision about what is given; made-up examples add to the gradient alone."""
        examples = taken(self._data.train, self._settings.seed, step, self._settings.batch)
        read: Sequence[Example] = examples
        if self._settings.drop:
            random = np.random.Generator(np.random.Philox([self._settings.seed, DROP, step]))
            read = [with_gaps(example, self._settings.drop, random) for example in examples]
        prompts: list[Sequence[int]] = [example.ids[:-1] for example in read]
        made, opinions = self._counted.of(step, examples) if self._counted is not None else ([], None)
        logits = self._compute([*prompts, *made])
        loss = F.cross_entropy(logits[: len(prompts)], self._wanted(read), label_smoothing=self._settings.smooth)
        whole = loss
        if opinions is not None:
            share = len(made) / (len(prompts) + len(made))
            taught = distillation_loss(logits[len(prompts) :], opinions.to(self._device))
            whole = (1 - share) * loss + share * taught
        torch.autograd.backward(whole)
        return loss.detach()

    def _wanted(self, examples: Sequence[Example]) -> Tensor:
        """Places of the labels that are right."""
        return torch.tensor([self._place[example.ids[-1]] for example in examples], device=self._device)

    def _compute(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits [prompts, labels] at the end of each prompt."""
        longest = max(len(prompt) for prompt in prompts)
        ids, last = np.zeros((len(prompts), longest), np.int64), np.zeros((len(prompts), longest), np.bool_)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
            last[row, len(prompt) - 1] = True
        with precise(self._device, self._settings.precision):
            places = torch.from_numpy(last).to(self._device)
            logits = self._graph.logits(self._weights(), torch.from_numpy(ids).to(self._device), places)
        return logits.float()[:, self._codes]

    def validate(self) -> dict[str, float]:
        """`loss` in nats of a decision, and `error`: the share of wrong ones."""
        nats, wrong = 0.0, 0
        by_length = sorted(self._data.valid, key=lambda example: len(example.ids))
        with torch.no_grad():
            for begin in range(0, len(by_length), self._settings.batch):
                examples = by_length[begin : begin + self._settings.batch]
                logits, wanted = self._compute([e.ids[:-1] for e in examples]), self._wanted(examples)
                nats += float(F.cross_entropy(logits, wanted, reduction="sum"))
                wrong += int((logits.argmax(dim=-1) != wanted).sum())
        return {"loss": nats / len(by_length), "error": wrong / len(by_length)}


def distillation_loss(logits: Tensor, opinions: Tensor) -> Tensor:
    """Cross-entropy of a teacher's softened opinions, both as logits [examples, labels], with gradients of the size
    that a label's has (Hinton, Vinyals and Dean, arXiv:1503.02531, section 2). Of a few labels, all known; for a whole
    vocabulary see `teacher.divergence`."""
    soft = (opinions / TEMPERATURE).softmax(dim=1)
    return TEMPERATURE**2 * F.cross_entropy(logits / TEMPERATURE, soft)


def tokenizer_config(written: Path | bytes | None, codes: Mapping[str, int], template: str) -> bytes:
    """A tokenizer_config.json that names the codes and the form of prompts, as `Tokenizer.labels` reads them."""
    data = written.read_bytes() if isinstance(written, Path) else written
    config: dict[str, Any] = {} if data is None else parse_object(data, "tokenizer_config.json")
    marker = config.get("haomiao")
    config["haomiao"] = {**(marker if isinstance(marker, dict) else {}), "labels": dict(codes), "prompt": template}
    return (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode()
