"""Fine-tuning: labels and completions are learnt, whole or by adapters; what is written opens everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haomiao.cli.main import main
from haomiao.errors import InputError
from haomiao.text.tokenizer import Tokenizer
from haomiao.train.examples import IGNORED, Example, batch_of, padded, read_pairs, split

MOODS = {"good": ("fine", "nice", "great", "lovely"), "bad": ("poor", "sad", "awful", "grim")}


def labelled() -> str:
    lines = [
        json.dumps({"text": f"a {word} {thing}", "label": label})
        for thing in ("day", "dog", "meal", "song", "walk", "hat", "room", "book", "house", "man", "river", "night")
        for label, words in MOODS.items()
        for word in words
    ]
    return "\n".join(lines)


def test_forms_of_data() -> None:
    assert read_pairs('{"prompt": "a", "completion": "b"}', "f").pairs == (("a", "b"),)
    assert read_pairs("good\ta day\nbad\ta dog\ngood\ta hat", "f").pairs[0] == ("a day\n", "good")
    pairs = read_pairs(labelled(), "f", template="{text} is ")
    assert pairs.labels
    assert pairs.pairs[0] == ("a fine day is ", "good")
    assert pairs.text_of("a fine day is ") == "a fine day" and pairs.text_of("no form") == "no form"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}', "line 2 needs a prompt and a completion"),
        ('{"prompt": "a", "completion": ""}', "line 1 needs"),
        ('{"prompt": "a", "completion": "b"}\n{', "line 2 is not JSON"),
        ('{"prompt": "a", "completion": "b"}\n[1]', "line 2 needs"),
        ("one column\nonly", "columns between"),
        ("", "0 lines"),
    ],
)
def test_faults_of_data_name_their_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_pairs(text, "f")


@given(st.lists(st.integers(2, 40), min_size=2, max_size=70), st.integers(1, 16), st.integers(0, 5))
def test_an_epoch_takes_every_example_at_most_once(lengths: list[int], size: int, seed: int) -> None:
    examples = [Example(tuple(range(100 * i, 100 * i + n)), 1) for i, n in enumerate(lengths)]
    count = len(examples) // min(size, len(examples))
    seen = [int(row[0]) for step in range(count) for row in batch_of(examples, seed, step, size)[0]]
    assert len(seen) == len(set(seen)) == count * min(size, len(examples))
    again, targets = batch_of(examples, seed, 1, size)
    assert (again == batch_of(examples, seed, 1, size)[0]).all()
    assert ((targets != IGNORED).sum(axis=1) == 1).all()


def test_targets_are_the_completion_alone() -> None:
    ids, targets = padded([Example((1, 2, 3, 4, 5), 2), Example((6, 7), 1)])
    assert ids.tolist() == [[1, 2, 3, 4], [6, 0, 0, 0]]
    assert targets.tolist() == [[IGNORED, IGNORED, 4, 5], [7, IGNORED, IGNORED, IGNORED]]


def test_split_is_fixed_and_leaves_nothing_out() -> None:
    train, held = split(50, 0.2, 1)
    assert len(held) == 10
    assert sorted(train + held) == list(range(50))
    assert (train, held) == split(50, 0.2, 1)
    assert split(2, 0.01, 1)[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "moods.jsonl"
    path.write_text(labelled())
    return path


@pytest.mark.parametrize(
    "flags",
    [
        ["--rate", "0.001"],
        ["--layers", "2", "--made", "1"],
        ["--lora", "4", "--alpha", "16"],
        ["--label-text", "--rate", "0.001"],
    ],
    ids=["full", "short", "lora", "text"],
)
def test_the_embedded_model_learns_labels(
    flags: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    out = str(tmp_path / "out")
    common = [
        "--epochs",
        "8",
        "--batch",
        "8",
        "--patience",
        "0",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--quiet",
        "--json",
    ]
    assert main(["finetune", "--data", str(data), "-o", out, *common, *flags, "--quiet", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["error"] <= 0.25
    assert report["began_with"] > report["error"]
    assert not Path(f"{out}.partial").exists()
    assert (tmp_path / "out" / "training_log.jsonl").is_file()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["num_hidden_layers"] == 2) is ("--layers" in flags)
    assert ("counting_error" in report) is ("--made" in flags)
    # straight into compress, and into eval
    assert main(["compress", out, "-o", str(tmp_path / "small"), "--quiet"]) == 0
    task = ["--task", str(data), "--no-speed", "--quiet", "--json", "--threads", "1", "--point", "int8"]
    assert main(["eval", str(tmp_path / "small"), *task]) == 0
    found = json.loads(capsys.readouterr().out)["points"]["int8"]["task"]
    assert found["accuracy"] >= 0.8
    coded = "--label-text" not in flags
    assert set(Tokenizer(tmp_path / "small").labels) == (set(MOODS) if coded else set())


@pytest.mark.parametrize("codes", [False, True])
def test_a_run_that_was_stopped_ends_with_the_same_bits(codes: bool, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from haomiao.train.finetune import Finetuning, finetune
    from haomiao.train.starting import open_starting

    given_settings = {"lora": 2, "epochs": 2, "batch": 16}
    settings = Finetuning.of_labels(**given_settings) if codes else Finetuning(**given_settings)  # type: ignore[arg-type]
    pairs = read_pairs(data.read_text(), "f")
    reports = []
    for name, stops in (("whole", ()), ("parts", (1, 2))):
        for stop in stops:
            given = {"device": "cpu", "threads": 1, "stop_after": stop}
            assert finetune(open_starting(None), pairs, tmp_path / name, settings, **given) is None  # type: ignore[arg-type]
        reports.append(finetune(open_starting(None), pairs, tmp_path / name, settings, device="cpu", threads=1))
    assert reports[0] == reports[1]
    whole, parts = (sorted((tmp_path / name).glob("*.safetensors")) for name in ("whole", "parts"))
    assert [file.name for file in whole] == [file.name for file in parts]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(whole, parts, strict=True))


def test_early_stop_keeps_the_best(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from haomiao.train.finetune import Finetuning, finetune
    from haomiao.train.starting import open_starting

    settings = Finetuning(epochs=20, batch=16, rate=0.2, patience=1)  # far too fast: it gets worse
    pairs = read_pairs(data.read_text(), "f")
    report = finetune(open_starting(None), pairs, tmp_path / "out", settings, device="cpu", threads=1)
    assert report is not None
    lines = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    errors = [line["valid_error"] for line in lines if "valid_error" in line]
    assert len(errors) < 21
    assert report["error"] == pytest.approx(min(errors), abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alpha", "2"], "without --lora"),
        (["--rate", "0"], "above 0"),
        (["--valid-share", "1"], "between 0 and 1"),
        (["--length", "2", "--label-text"], "does not fit"),
        (["--drop", "1"], "below 1"),
        (["--drop", "0.1", "--label-text"], "labels that are learnt as codes"),
        (["--made", "1", "--label-text"], "labels that are learnt as codes"),
        (["--layers", "99"], "cannot keep 99 layers"),
        (["--device", "cuda"], "no GPU"),
    ],
)
def test_flags_are_checked(
    flags: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["finetune", "--data", str(data), "-o", str(tmp_path / "out"), "--quiet", *flags]) != 0
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1
