"""Labels as single tokens: which tokens, what is left out of prompts, and the mean of weights that is kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haomiao.errors import InputError
from haomiao.models.open import embedded_path
from haomiao.text.tokenizer import Tokenizer
from haomiao.train.examples import Example, encode_prompts

torch = pytest.importorskip("torch")

from haomiao.train import labels as module  # noqa: E402 (needs torch)

ROWS = [("a fine day\n", "good"), ("a grim day\n", "bad"), ("今天很好\n", "good"), ("a sad hat\n", "bad")]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(embedded_path())


def test_codes_are_tokens_that_the_data_do_not_use(tokenizer: Tokenizer) -> None:
    last = tokenizer.vocab_size - 1
    coded = module.encode_labels(ROWS, ROWS[:1], tokenizer, tokenizer.vocab_size, 64)
    used = {id_ for example in coded.train for id_ in example.ids[:-1]}
    assert sorted(coded.codes) == ["bad", "good"]
    assert not used & set(coded.codes.values()) and max(coded.codes.values()) <= last
    assert [example.ids[-1] for example in coded.train] == [coded.codes[label] for _, label in ROWS]
    assert coded.train[0].ids[:-1] == tuple(tokenizer.encode(ROWS[0][0], True))
    assert len(coded.valid) == 1 and coded.cut == 0


def test_long_prompts_lose_their_beginning(tokenizer: Tokenizer) -> None:
    coded = module.encode_labels(ROWS, [], tokenizer, tokenizer.vocab_size, 4)
    assert max(len(example.ids) for example in coded.train) == 4
    assert coded.cut > 0
    assert coded.train[0].ids[:-1] == tuple(tokenizer.encode(ROWS[0][0], True)[-3:])


def test_what_cannot_be_labels_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="two kinds"):
        module.encode_labels(ROWS[:1], [], tokenizer, tokenizer.vocab_size, 64)
    with pytest.raises(InputError, match="do not use"):
        module.encode_labels(ROWS, [], tokenizer, 1, 64)
    with pytest.raises(InputError, match="empty"):
        encode_prompts([""], tokenizer, 8)


def test_a_label_begins_as_its_name_unless_it_was_learnt(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from haomiao.models.plan import Head
    from haomiao.train.starting import open_starting

    model = open_starting(None)
    plan = model.plan(8)
    head = plan.ops[-1]
    assert isinstance(head, Head)
    before = model.weights(plan)[head.weight]
    wanted = before[tokenizer.encode_part("a fine day", False)].mean(dim=0)
    folder = tmp_path / "taught"
    shutil.copytree(embedded_path(), folder)
    written = module.tokenizer_config(folder / "tokenizer_config.json", {"a_fine_day": 7, "rain": 8}, "{text}")
    (folder / "tokenizer_config.json").write_bytes(written)
    for taught, codes, named in (
        (tokenizer, {"a_fine_day": 7}, True),
        (Tokenizer(folder), {"a_fine_day": 7}, False),  # learnt before: what was learnt stays
        (Tokenizer(folder), {"a_fine_day": 7, "snow": 9}, True),  # taught others: its tokens mean nothing here
    ):
        weights = {head.weight: before.clone()}
        module.name_codes(plan, weights, codes, taught)
        assert torch.allclose(weights[head.weight][7], wanted if named else before[7])


@given(st.lists(st.integers(0, 99), min_size=2, max_size=30), st.floats(0, 0.99), st.integers(0, 9))
def test_gaps_leave_the_ends(ids: list[int], share: float, seed: int) -> None:
    found = module.with_gaps(Example(tuple(ids), 1), share, np.random.default_rng(seed)).ids
    assert (found[0], *found[-2:]) == (ids[0], *ids[-2:]) or len(ids) == 2
    rest = iter(ids)
    assert all(id_ in rest for id_ in found)  # a subsequence
    assert share > 0 or list(found) == ids


def test_tokenizer_config_keeps_what_it_said(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text('{"model_max_length": 7, "haomiao": {"tokenizer": "tokenizer.model"}}')
    written = module.tokenizer_config(path, {"gut": 3, "好": 4}, "{text}?")
    again = module.tokenizer_config(written, {"gut": 5}, "{text}: ")
    assert module.parse_object(again, "f") == {
        "model_max_length": 7,
        "haomiao": {"tokenizer": "tokenizer.model", "labels": {"gut": 5}, "prompt": "{text}: "},
    }


def test_the_mean_of_weights_is_what_is_judged_and_left(tmp_path: Path) -> None:
    from haomiao.train.loop import Loop, Rhythm
    from haomiao.train.settings import Schedule
    from haomiao.train.state import RunFolder

    weight = torch.zeros(1)
    judged: list[float] = []

    class Task:
        tokens = 1

        def backward(self, step: int) -> torch.Tensor:
            weight.grad = torch.ones(1)
            return torch.zeros(())

        def validate(self) -> dict[str, float]:
            judged.append(float(weight))
            return {"loss": -len(judged)}

    class Plus:
        rate = 1.0

        def step(self, share: float) -> None:
            weight.add_(1.0)

        def tensors(self) -> dict[str, torch.Tensor]:
            return {}

    schedule = Schedule(steps=4, warmup=0)
    with RunFolder(tmp_path / "run", {}) as folder:
        rhythm = Rhythm(mean=0.5, validate_every=1, log_every=4)
        assert Loop(Task(), {"w": weight}, Plus(), schedule, folder, rhythm).run()  # type: ignore[arg-type]
    mean, wanted = 0.0, [0.0]
    for step in range(1, 5):
        mean += (1 - min(0.5, (1 + step) / (10 + step))) * (step - mean)
        wanted.append(mean)
    assert judged == pytest.approx(wanted)
    assert float(weight) == pytest.approx(mean)
