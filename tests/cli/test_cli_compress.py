"""`haomiao compress` with a method or recipe, and `haomiao eval` against the original, on a small real checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.golden.cases import CASES
from tests.golden.checkpoint import random_checkpoint

from haomiao.cli.main import main
from haomiao.load.artifact import Artifact


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random Llama with the embedded model's tokenizer cut to its vocabulary: bytes only."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    monkeypatch.setenv("HAOMIAO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HAOMIAO_OFFLINE", "1")
    monkeypatch.delenv("HAOMIAO_MODEL", raising=False)
    config = {**CASES[0].config, "vocab_size": 260}
    folder = tmp_path / "tiny"
    folder.mkdir()
    save_file(random_checkpoint(config, 3), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸。 " * 40)
    return folder


def compress(checkpoint: Path, out: str, *flags: str) -> int:
    small = ("--samples", "12", "--held", "3", "--length", "32", "--text", str(checkpoint / "text.txt"))
    return main(["compress", str(checkpoint), "-o", str(checkpoint.parent / out), "--threads", "1", *small, *flags])


def last_object(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return value


def test_a_recipe_with_flags_over_it(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = checkpoint / "recipe.yaml"
    recipe.write_text("method: gptq\ngroup: 64\norder: static\nsamples: 9\n")
    assert compress(checkpoint, "out", "--recipe", str(recipe), "--group", "32", "--json") == 0
    about = last_object(capsys)
    assert (about["recipe"]["group"], about["recipe"]["order"], about["recipe"]["samples"]) == (32, "static", 12)
    assert set(about["errors"]) == {"int8", "int4"}
    assert about["recipe"]["text"] == ["text.txt"]
    assert main(["show", str(checkpoint.parent / "out"), "--verify"]) == 0


def test_eval_of_the_result_against_its_source(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compress(checkpoint, "out", "--method", "gptq", "--awq") == 0
    said = capsys.readouterr().err
    assert "int4   KL 0." in said
    text, out = str(checkpoint / "text.txt"), str(checkpoint.parent / "out")
    ask = ["eval", out, "--reference", str(checkpoint), "--text", text, "--window", "32", "--tokens", "200", "--json"]
    assert main([*ask, "--no-speed"]) == 0
    report = last_object(capsys)
    assert report["reference"]["point"] == "full"
    assert report["points"]["int8"]["kl_mean"] < report["points"]["int4"]["kl_mean"]
    for figures in report["points"].values():
        assert {"perplexity", "perplexity_pm", "kl_mean", "kl_p99", "top1", "ms_per_token", "bytes"} <= set(figures)
        assert figures["kl_median"] <= figures["kl_p99"]
    assert main(["eval", str(checkpoint), "--text", text, "--window", "32", "--tokens", "64", "--no-speed"]) == 0
    assert "against tiny at full" in capsys.readouterr().out


def test_other_forms(checkpoint: Path) -> None:
    assert compress(checkpoint, "eight", "--method", "gptq", "--bits", "8", "--quiet") == 0
    assert Artifact.open(checkpoint.parent / "eight").meta["points"] == ["int8"]
    assert compress(checkpoint, "rtn", "--method", "rtn", "--no-lo", "--rotate", "--quiet") == 0
    assert Artifact.open(checkpoint.parent / "rtn").meta["points"] == ["int4", "int8"]
    assert compress(checkpoint, "rtn", "--method", "gptq", "--order", "natural", "--damping", "0.1", "--force") == 0


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--method", "gptq", "--scheme", "full"), "--scheme belongs to a conversion"),
        (("--bits", "4"), "--bits needs --method or --recipe"),
        (("--method", "gptq", "--max-kl", "-1"), "max_kl must be"),
        (("--method", "gptq", "--prune", "all"), "KIND:SHARE"),
        (("--recipe", "absent.yaml"), "cannot be read"),
        (("--method", "gptq", "--length", "100000"), "samples of 100000 tokens"),
        (("--lo-shift", "auto"), "needs --method"),
    ],
)
def test_refusals_are_one_line(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], match: str
) -> None:
    out = checkpoint.parent / "out"
    assert main(["compress", str(checkpoint), "-o", str(out), *flags]) == 2
    said = capsys.readouterr().err
    assert match in said
    assert said.count("\n") == 1
    assert not out.exists()
