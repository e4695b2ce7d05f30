"""Labelled data for `haomiao eval --task`: JSON lines or tab-separated text, read into questions.

JSON lines: `{"prompt", "choices": [...], "answer": index or text}`. Without choices, the choices are all labels of the
file: `{"text" or "sentence", "label"}`, or lines of `label<TAB>text` or `text<TAB>label` (the column with fewer
different values is the label). The file is input from outside: bounded, and every fault is one line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from haomiao.errors import InputError
from haomiao.measure.accuracy import Question

MAX_CHOICES = 256
MAX_LINES = 1_000_000
PROMPTS, CHOICES, ANSWERS = ("prompt", "question", "text", "sentence"), ("choices", "options"), ("answer", "label")
DEFAULT_TEMPLATE = "{text}\n"


def read_questions(
    text: str, where: str, *, template: str = DEFAULT_TEMPLATE, limit: int | None = None
) -> list[Question]:
    """The first `limit` questions of a task file. `template` makes the prompt of labelled text; `{text}` stands for it.

    Raises `InputError` naming the line that is wrong.
    """
    if "{text}" not in template:
        raise InputError("the prompt template must hold {text}", param="prompt_template")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines or len(lines) > MAX_LINES:
        raise InputError(f"{where}: {len(lines)} lines, 1 to {MAX_LINES} are read", param="task")
    records = _from_json(lines, where) if lines[0].lstrip().startswith("{") else _from_table(lines, where)
    labels = _labels(records, where)
    questions = []
    for number, record in enumerate(records[:limit], 1):
        choices = record.get("choices")
        prompt = record["prompt"] if choices is not None else template.replace("{text}", record["prompt"])
        questions.append(_question(prompt, labels if choices is None else choices, record["answer"], where, number))
    return questions


def _from_json(lines: Sequence[str], where: str) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"{where}: line {number} is not JSON", param="task") from None
        if not isinstance(value, dict):
            raise InputError(f"{where}: line {number} is not an object", param="task")
        prompt = _first(value, PROMPTS)
        answer = _first(value, ANSWERS)
        if not isinstance(prompt, str) or answer is None or isinstance(answer, (bool, float, list, dict)):
            raise InputError(f"{where}: line {number} needs a prompt and an answer", param="task")
        records.append({"prompt": prompt, "choices": _first(value, CHOICES), "answer": answer})
    return records


def _from_table(lines: Sequence[str], where: str) -> list[dict[str, Any]]:
    rows = [line.split("\t") for line in lines]
    if any(len(row) != 2 for row in rows):
        raise InputError(f"{where}: neither JSON lines nor two columns between tabs", param="task")
    first, second = ([row[i].strip() for row in rows] for i in (0, 1))
    if len(set(first)) < len(set(second)):
        first, second = second, first
    return [{"prompt": prompt, "choices": None, "answer": label} for prompt, label in zip(first, second, strict=True)]


def _labels(records: Sequence[Mapping[str, Any]], where: str) -> tuple[str, ...]:
    labels = sorted({str(record["answer"]) for record in records if record["choices"] is None})
    if len(labels) > MAX_CHOICES:
        raise InputError(f"{where}: {len(labels)} different labels, at most {MAX_CHOICES} are choices", param="task")
    return tuple(labels)


def _question(prompt: str, choices: Any, answer: Any, where: str, number: int) -> Question:
    if not isinstance(choices, (list, tuple)) or not 2 <= len(choices) <= MAX_CHOICES:
        raise InputError(f"{where}: line {number} needs 2 to {MAX_CHOICES} choices", param="task")
    texts = tuple(str(choice) for choice in choices)
    if isinstance(answer, int) and isinstance(choices, list):
        index = answer if 0 <= answer < len(texts) else -1
    else:
        index = texts.index(str(answer)) if str(answer) in texts else -1
    if index < 0 or not all(texts):
        raise InputError(f"{where}: the answer of line {number} is not among its choices", param="task")
    return Question(prompt, texts, index)


def _first(value: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((value[name] for name in names if name in value), None)
