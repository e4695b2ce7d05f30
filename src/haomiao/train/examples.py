"""Examples for fine-tuning: prompts and completions out of a file, as token ids, and the batches of a run.

JSON lines `{"prompt", "completion"}`, or labelled text as `haomiao eval --task` reads it (`measure.task`): the label is
the completion. A completion is encoded together with its prompt, as `choose` does it, and ends with the end token. The
file is input from outside: bounded, and every fault is one line. Knows nothing about models.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from haomiao.errors import InputError
from haomiao.measure.task import DEFAULT_TEMPLATE, MAX_LINES, USUAL, Fields, read_questions
from haomiao.text.tokenizer import Tokenizer

IGNORED = -100
"""Target of a token whose prediction does not count (torch's own)."""
SORTED_BATCHES = 32
"""Batches among which examples are sorted by length, so that little is padded."""

Ids = npt.NDArray[np.int64]
AnyExample = TypeVar("AnyExample", bound="Example")


@dataclass(frozen=True)
class Example:
    """One example in token ids; the last `learnt` of them are to be predicted."""

    ids: tuple[int, ...]
    learnt: int


@dataclass(frozen=True)
class Pairs:
    """What a file holds: prompts with their completions, and whether these are labels."""

    pairs: tuple[tuple[str, str], ...]
    labels: bool
    template: str = DEFAULT_TEMPLATE
    """Made the prompts out of labelled text."""

    def text_of(self, prompt: str) -> str:
        """What the template made `prompt` of; the prompt itself where that cannot be told."""
        before, _, after = self.template.partition("{text}")
        inside = prompt.removeprefix(before).removesuffix(after)
        return inside if inside and self.prompt_of(inside) == prompt else prompt

    def prompt_of(self, text: str) -> str:
        """The prompt that asks for the label of `text`."""
        return self.template.replace("{text}", text)


def read_pairs(text: str, where: str, *, template: str = DEFAULT_TEMPLATE, fields: Fields = USUAL) -> Pairs:
    """Prompts and completions of a file. Raises `InputError` naming the line that is wrong."""
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and lines[0].lstrip().startswith("{") and '"completion"' in lines[0]:
        return Pairs(tuple(_completions(lines, where)), False)
    questions = read_questions(text, where, template=template, fields=fields)
    return Pairs(tuple((q.prompt, q.choices[q.answer]) for q in questions), True, template)


def _completions(lines: Sequence[str], where: str) -> list[tuple[str, str]]:
    if len(lines) > MAX_LINES:
        raise InputError(f"{where}: {len(lines)} lines, at most {MAX_LINES} are read", param="data")
    found = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"{where}: line {number} is not JSON", param="data") from None
        prompt, completion = (value.get(k) if isinstance(value, dict) else None for k in ("prompt", "completion"))
        if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
            raise InputError(f"{where}: line {number} needs a prompt and a completion", param="data")
        found.append((prompt, completion))
    return found


def encode_pairs(
    pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, end: int | None, length: int
) -> tuple[list[Example], int]:
    """Examples of at most `length` tokens, and how many lost the beginning of their prompt. Raises `InputError` if a
    completion alone is longer."""
    examples, cut = [], 0
    for prompt, completion in pairs:
        before, whole = tokenizer.encode(prompt, True), tokenizer.encode(prompt + completion, True)
        common = 0
        while common < min(len(before), len(whole) - 1) and before[common] == whole[common]:
            common += 1
        ids = whole if end is None or whole[-1] == end else [*whole, end]
        learnt = len(ids) - common
        if learnt >= length:
            raise InputError(f"a completion of {learnt} tokens does not fit sequences of {length}", param="length")
        cut += len(ids) > length
        examples.append(Example(tuple(ids[-length:]), min(learnt, len(ids) - 1)))
    return examples, cut


def encode_prompts(prompts: Sequence[str], tokenizer: Tokenizer, length: int) -> tuple[list[tuple[int, ...]], int]:
    """Prompts that leave room for one token in `length`, as `choose` encodes them, and how many lost their beginning.
    Raises `InputError` for one without tokens."""
    found = [(*tokenizer.prefix_ids, *tokenizer.encode_part(prompt, True)) for prompt in prompts]
    if not all(found):
        raise InputError("a prompt is empty", param="data")
    return [ids[-(length - 1) :] for ids in found], sum(len(ids) >= length for ids in found)


def split(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Places for training and for validation: a fixed choice by `seed`, at least one of each."""
    order = np.random.Generator(np.random.Philox([seed, 1])).permutation(count).tolist()
    held = min(max(1, round(share * count)), count - 1)
    return sorted(order[held:]), sorted(order[:held])


def batch_of(examples: Sequence[Example], seed: int, step: int, size: int) -> tuple[Ids, Ids]:
    """The batch of step `step` (`taken`) as (ids, targets), [size, longest]."""
    return padded(taken(examples, seed, step, size))


def taken(examples: Sequence[AnyExample], seed: int, step: int, size: int) -> list[AnyExample]:
    """The examples of step `step`, a function of these arguments alone. An epoch takes every example once (but for the
    last few that do not fill a batch), in another order each time."""
    size = min(size, len(examples))
    count = len(examples) // size
    epoch, place = divmod(step, count)
    random = np.random.Generator(np.random.Philox([seed, 2, epoch]))
    order = random.permutation(len(examples))[: count * size]
    chunk = size * SORTED_BATCHES
    for begin in range(0, len(order), chunk):
        part = order[begin : begin + chunk]
        order[begin : begin + chunk] = part[np.argsort([len(examples[i].ids) for i in part], kind="stable")]
    batches = order.reshape(count, size)[random.permutation(count)]
    return [examples[i] for i in batches[place]]


def padded(examples: Sequence[Example]) -> tuple[Ids, Ids]:
    """Examples as (ids, targets) [examples, longest - 1]: target j is the token after id j where it counts."""
    longest = max(len(example.ids) for example in examples)
    ids = np.zeros((len(examples), longest - 1), np.int64)
    targets = np.full((len(examples), longest - 1), IGNORED, np.int64)
    for row, example in enumerate(examples):
        size = len(example.ids)
        ids[row, : size - 1] = example.ids[:-1]
        targets[row, size - 1 - example.learnt : size - 1] = example.ids[size - example.learnt :]
    return ids, targets
