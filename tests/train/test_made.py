"""Made-up examples, and the classifier over counts that has an opinion of each."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from haomiao.train import counting, made  # noqa: E402 (needs torch)
from haomiao.train.labels import distillation_loss  # noqa: E402

GOOD = ["a fine day", "what a fine hat", "今天很好", "好天气, fine"]
BAD = ["a grim day", "what a grim, sad hat", "今天很坏", "坏天气, sad"]
TEXTS, ANSWERS = [*GOOD, *BAD], [0] * len(GOOD) + [1] * len(BAD)


def maker(seed: int = 1) -> made.Maker:
    return made.Maker(TEXTS, ANSWERS, 2, (["a fine idea", "a sad idea", "坏了"], [0, 1, 1]), seed)


def test_words_their_pairs_and_characters_are_counted() -> None:
    words, characters = counting.features_of("Go on, go on")
    assert words == {"go": 2, "on": 2, "go on": 2, "on go": 1}
    assert characters["go"] == 2 and characters[" go "] == 2 and characters["n, "] == 1
    assert max(map(len, characters)) == counting.CHARACTERS


def test_rows_have_one_part_of_length_one_for_each_kind() -> None:
    features = counting.Features.of(TEXTS)
    bags = features.bags(["a fine day", "ξ ξ", ""])
    first = bags.values[: int(bags.begins[1])]
    assert float(first.square().sum()) == pytest.approx(2.0, abs=1e-5)
    dense = bags.times(torch.eye(len(features.weights)))
    assert dense.shape == (3, len(features.weights)) and not dense[2].any()


def test_the_classifier_is_at_the_least_of_its_loss_and_knows_what_it_has_not_read() -> None:
    targets = torch.nn.functional.one_hot(torch.tensor(ANSWERS), 2).float()
    fitted = counting.Counting(TEXTS, targets, 3.0)
    assert fitted.share_right(TEXTS, ANSWERS) == 1.0
    assert fitted.share_right(["the fine one", "so sad", "很坏"], [0, 1, 1]) == 1.0
    bags = fitted._features.bags(TEXTS)
    table, bias = (tensor.clone().requires_grad_() for tensor in (fitted._table, fitted._bias))
    wrong = torch.nn.functional.cross_entropy(bags.times(table) + bias, targets, reduction="sum")
    (3.0 * wrong + 0.5 * table.square().sum()).backward()
    assert float(table.grad.abs().max()) < 1e-2 and float(bias.grad.abs().max()) < 1e-2


@given(st.text())
def test_units_spoken_again_are_the_text(text: str) -> None:
    assert made.spoken(made.units_of(text)) == text.strip()


def test_words_that_meet_are_held_apart() -> None:
    assert made.units_of("don't go, 今天a") == ["don't", " go", ",", " 今", "天", "a"]
    assert made.spoken(["go", "on", "", ",", "今", "天"]) == "go on,今天"


def test_what_is_made_is_a_function_of_the_step_and_speaks_with_words_of_the_data() -> None:
    first, again, later, other = (maker(seed).make(step, TEXTS, 3) for seed, step in ((1, 5), (1, 5), (1, 6), (2, 5)))
    assert first.texts == again.texts and torch.equal(first.opinions, again.opinions)
    assert first.texts != later.texts and first.texts != other.texts
    assert len(first.texts) == 3 * len(TEXTS) and first.opinions.shape == (3 * len(TEXTS), 2)
    known = {unit.strip() for text in TEXTS for unit in made.units_of(text)}
    assert {unit.strip() for text in first.texts for unit in made.units_of(text)} <= known
    assert all(first.texts) and len(set(first.texts)) > len(TEXTS)


def test_opinions_that_are_shared_pull_nowhere() -> None:
    opinions = torch.tensor([[3.0, -1.0, 0.5], [0.0, 2.0, 1.0]])
    for logits, agrees in ((opinions + 7.0, True), (-opinions, False)):
        given_logits = logits.clone().requires_grad_()
        distillation_loss(given_logits, opinions).backward()
        assert (float(given_logits.grad.abs().max()) < 1e-6) is agrees
