"""Labelled data for `haomiao eval --task`: JSON lines or a table, read into questions.

JSON lines: `{"prompt", "choices": [...], "answer": index or text}`. Without choices, the choices are all labels of the
file: `{"text" or "sentence", "label"}`, or a table of two columns between tabs (the one with fewer different values is
the label). Tables of more columns, or between commas, have a first line of names or are read by number: `Fields`. The
file is input from outside: bounded, and every fault is one line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from haomiao.errors import InputError
from haomiao.measure.accuracy import Question

MAX_CHOICES = 256
MAX_LINES = 1_000_000
PROMPTS, CHOICES = ("prompt", "question", "text", "sentence", "content", "utterance"), ("choices", "options")
ANSWERS = ("answer", "label", "category", "intent")
DEFAULT_TEMPLATE = "{text}\n"


@dataclass(frozen=True)
class Fields:
    """Where text and label stand: keys of JSON lines, names in a table's first line, or numbers of columns from 1."""

    text: str | None = None
    label: str | None = None


USUAL = Fields()


def read_questions(
    text: str, where: str, *, template: str = DEFAULT_TEMPLATE, limit: int | None = None, fields: Fields = USUAL
) -> list[Question]:
    """The first `limit` questions of a task file. `template` makes the prompt of labelled text; `{text}` stands for it.

    Raises `InputError` naming the line that is wrong.
    """
    if "{text}" not in template:
        raise InputError("the prompt template must hold {text}", param="prompt_template")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines or len(lines) > MAX_LINES:
        raise InputError(f"{where}: {len(lines)} lines, 1 to {MAX_LINES} are read", param="task")
    read = _from_json if lines[0].lstrip().startswith("{") else _from_table
    records = read(lines, where, fields)
    labels = _labels(records, where)
    questions = []
    for number, record in enumerate(records[:limit], 1):
        choices = record.get("choices")
        prompt = record["prompt"] if choices is not None else template.replace("{text}", record["prompt"])
        questions.append(_question(prompt, labels if choices is None else choices, record["answer"], where, number))
    return questions


def _from_json(lines: Sequence[str], where: str, fields: Fields) -> list[dict[str, Any]]:
    prompts = PROMPTS if fields.text is None else (fields.text,)
    answers = ANSWERS if fields.label is None else (fields.label,)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"{where}: line {number} is not JSON", param="task") from None
        if not isinstance(value, dict):
            raise InputError(f"{where}: line {number} is not an object", param="task")
        prompt = _first(value, prompts)
        answer = _first(value, answers)
        if not isinstance(prompt, str) or answer is None or isinstance(answer, (bool, float, list, dict)):
            raise InputError(f"{where}: line {number} needs a prompt and an answer", param="task")
        records.append({"prompt": prompt, "choices": _first(value, CHOICES), "answer": answer})
    return records


def _from_table(lines: Sequence[str], where: str, fields: Fields) -> list[dict[str, Any]]:
    rows = _rows(lines, where)
    if any(len(row) != len(rows[0]) for row in rows):
        wrong = next(number for number, row in enumerate(rows, 1) if len(row) != len(rows[0]))
        raise InputError(f"{where}: line {wrong} has another number of columns than line 1", param="task")
    names = {name.strip().lower(): place for place, name in enumerate(rows[0])}
    text, label = (
        _column(given, usual, names, len(rows[0]), where)
        for given, usual in ((fields.text, PROMPTS), (fields.label, ANSWERS))
    )
    if text is not None and label is not None and not _numbers(fields):
        rows = rows[1:]
    elif text is None and label is None and len(rows[0]) == 2:
        text, label = 1, 0
        if len({row[0].strip() for row in rows}) >= len({row[1].strip() for row in rows}):
            text, label = 0, 1
    if text is None or label is None or text == label:
        raise InputError(
            f"{where}: {len(rows[0])} columns: say with --text-field and --label-field which hold text and label",
            param="task",
        )
    return [{"prompt": row[text].strip(), "choices": None, "answer": row[label].strip()} for row in rows]


def _rows(lines: Sequence[str], where: str) -> list[list[str]]:
    """Cells of a table between tabs or commas."""
    if "\t" in lines[0]:
        return [line.split("\t") for line in lines]
    try:
        rows = list(csv.reader(lines, strict=True))
    except csv.Error as error:
        raise InputError(f"{where}: not a table between commas: {error}", param="task") from None
    if len(rows[0]) < 2:
        raise InputError(f"{where}: neither JSON lines nor columns between tabs or commas", param="task")
    return rows


def _numbers(fields: Fields) -> bool:
    return all(given is not None and given.isdigit() for given in (fields.text, fields.label))


def _column(given: str | None, usual: Sequence[str], names: Mapping[str, int], count: int, where: str) -> int | None:
    """The place of a column; None where nothing says it."""
    if given is None:
        return next((names[name] for name in usual if name in names), None)
    if given.isdigit() and 1 <= int(given) <= count:
        return int(given) - 1
    if given.lower() in names:
        return names[given.lower()]
    raise InputError(f"{where}: there is no column {given[:64]!r} among {count}", param="task")


def _labels(records: Sequence[Mapping[str, Any]], where: str) -> tuple[str, ...]:
    labels = sorted({str(record["answer"]) for record in records if record["choices"] is None})
    if len(labels) > MAX_CHOICES:
        raise InputError(f"{where}: {len(labels)} different labels, at most {MAX_CHOICES} are choices", param="task")
    if len(labels) == 1:
        raise InputError(f"{where}: every label is {labels[0][:64]!r}: a choice needs two", param="task")
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
