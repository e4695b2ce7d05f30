"""Prompts made from a seed: the kinds of text that the built-in mix asks about, and the right answer if there is one.

The text is plain English out of short word lists, so that the same seed gives the same bytes everywhere and nothing has
to be shipped or fetched. Knows nothing about models, tokenizers or servers.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import msgspec

LETTERS = ("A", "B", "C", "D")
_ROOMS = ("kitchen", "bedroom", "hall", "garage", "study", "bathroom", "garden", "cellar")
_DEVICES = {
    "A": ("lamp", "ceiling light", "desk light", "night light"),
    "B": ("heater", "radiator", "thermostat", "air conditioner"),
    "C": ("radio", "speaker", "record player", "television"),
    "D": ("front door", "window", "gate", "blind"),
}
_VERBS = ("turn on the", "turn off the", "please switch the", "could you check the", "set the", "i want to change the")
_RULES = (
    "You sort spoken commands of a household. Answer with one letter. A is light: lamps of every kind. B is climate: "
    "heating and cooling. C is sound: music and television. D is doors: doors, windows, gates and blinds. "
    "A command names one device and one room. The device alone decides; the room does not matter. "
)
_NAMES = ("Anna Weber", "Li Na", "Omar Haddad", "Grace Okafor", "Tom Reyes", "Mei Tanaka", "Ivan Petrov", "Sara Lind")
_CITIES = ("Oslo", "Chengdu", "Lagos", "Lima", "Turin", "Kyoto", "Leeds", "Quito")
_GOODS = ("copper wire", "roof tiles", "green tea", "bicycle tyres", "printer paper", "olive oil")
_TOPICS = ("the harvest", "the new bridge", "the school", "the railway", "the flood", "the market", "the old mill")
_ACTS = ("was discussed at length", "cost more than expected", "pleased most of those present", "was put off again")
_TIMES = ("In spring", "Last week", "On Monday", "After the meeting", "By the evening", "A year later")


class Prompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is asked, and the right answer where the text fixes one."""

    prompt: str
    expect: str | None = None


def command(rng: Random, words: int) -> Prompt:
    """A household command to be sorted into one of four kinds, after rules that every such prompt begins with."""
    letter = rng.choice(LETTERS)
    spoken = f"{rng.choice(_VERBS)} {rng.choice(_DEVICES[letter])} in the {rng.choice(_ROOMS)}"
    rules = _filled(_RULES, words)
    return Prompt(f"{rules}\nCommand: {spoken}\nLetter: ", letter)


def record(rng: Random, words: int) -> Prompt:
    """A delivery note from which the customer and the city are to be taken."""
    name, city = rng.choice(_NAMES), rng.choice(_CITIES)
    lines = [
        f"{rng.randint(2, 90)} boxes of {rng.choice(_GOODS)}, position {n + 1}." for n in range(max(1, words // 7))
    ]
    body = " ".join(lines)
    return Prompt(f"Delivery note. Customer: {name}. City: {city}. {body}\nCustomer and city: ", f"{name}, {city}")


def talk(rng: Random, words: int) -> Prompt:
    """A few lines of conversation that wait for an answer."""
    return Prompt(f"User: {_story(rng, words)} What do you think of {rng.choice(_TOPICS)}?\nAssistant: ")


def report(rng: Random, words: int) -> Prompt:
    """A long report to be summed up."""
    return Prompt(f"Report.\n{_story(rng, words)}\nSummary: ")


MAKERS: dict[str, Callable[[Random, int], Prompt]] = {
    "command": command,
    "record": record,
    "talk": talk,
    "report": report,
}
"""Name of a kind of text -> what makes one of about so many words."""


def _story(rng: Random, words: int) -> str:
    sentences: list[str] = []
    count = 0
    while count < words:
        sentence = f"{rng.choice(_TIMES)} {rng.choice(_TOPICS)} {rng.choice(_ACTS)}."
        sentences.append(sentence)
        count += len(sentence.split())
    return " ".join(sentences)


def _filled(rules: str, words: int) -> str:
    """The rules again and again, up to about so many words: the beginning that requests have in common."""
    every = rules.split()
    return " ".join(every[index % len(every)] for index in range(max(len(every), words)))
