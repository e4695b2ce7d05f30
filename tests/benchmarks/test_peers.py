"""The benchmark against peers: what it reads from other programs, how samples become a table, one small run of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from peerlib import engines, plot, results  # noqa: E402
from peerlib.lines import LINES, Line  # noqa: E402

LINE = LINES["decode-0.5b-int4"]
BENCH = """#!{python}
import json, sys
if "--help" in sys.argv: print("--n-depth --no-warmup")
else: print("loading...\\n" + json.dumps([{{"n_gen": 64, "avg_ts": 50.0, "args": sys.argv[1:]}}]))
"""
BATCHED = """#!{python}
print("|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |")
print("|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|")
print("|    32 |     64 |    4 |    384 |    0.500 |   256.00 |    2.560 |   100.00 |    3.060 |   125.49 |")
"""
CLI = """#!{python}
import sys
sys.stdout.write("" if "--help" in sys.argv else " Paris")
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Stand-ins for llama-bench and its neighbours."""
    for name, text in (("llama-bench", BENCH), ("llama-batched-bench", BATCHED), ("llama-cli", CLI)):
        (tmp_path / name).write_text(text.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    return tmp_path / "llama-bench"


def record(samples: dict[str, list[float]], metric: str = "tok_s") -> dict[str, Any]:
    taken = {name: [{"round": i, metric: v} for i, v in enumerate(values)] for name, values in samples.items()}
    rounds = max(len(values) for values in samples.values())
    return {"samples": taken, "missing": {}, "ceilings": [{"read_gb_s": 40.0, "int8_gops": 900.0}] * rounds}


def test_the_limit_is_bytes_against_bandwidth_or_operations_against_the_peak() -> None:
    weights = (24 * (896 * 64 * (14 * 2 + 2 * 2) + 3 * 896 * 4864) + 151936 * 896) * 18 / 32
    kv = 2 * 24 * 2 * 64 * 2 * (512 + 32)
    assert LINE.limit_tok_s(40.0, 900.0) == pytest.approx(40e9 / (weights + kv))
    four = LINES["streams-0.5b-4"].limit_tok_s(40.0, 900.0)
    assert four == pytest.approx(4 * 40e9 / (weights + 4 * 2 * 24 * 2 * 64 * 2 * 64))
    prefill = LINES["prefill-0.5b-512"].limit_tok_s(40.0, 900.0)
    assert prefill == pytest.approx(900e9 / (2 * 24 * (896 * 64 * (14 * 2 + 2 * 2) + 3 * 896 * 4864)))
    assert LINES["coldstart-0.5b"].limit_tok_s(40.0, 900.0) is None


@pytest.mark.parametrize("name", ["decode-0.5b-int4", "prefill-0.5b-4096", "decode-0.5b-8192"])
def test_llama_bench_is_asked_and_read(program: Path, name: str) -> None:
    engine = engines.Program(program, LINES[name], Path("m.gguf"), 2)
    assert engine.sample(1) == {"tok_s": 50.0}
    command = engine._command_bench()
    assert command[command.index("-t") + 1] == "2"
    assert ("-d" in command) == (name != "prefill-0.5b-4096")
    assert ("--no-warmup" in command) == (name != "decode-0.5b-int4")
    assert ("q8_0" in command) == (name == "decode-0.5b-8192")


def test_the_neighbours_of_llama_bench(program: Path) -> None:
    model = Path("m.gguf")
    assert engines.Program(program, LINES["streams-0.5b-4"], model, 2).sample(1) == {"tok_s": 100.0}
    start = engines.Program(program, LINES["coldstart-0.5b"], model, 2).sample(1)
    assert 0 < start["first_ms"] <= start["exit_ms"]
    with pytest.raises(engines.Missing, match="single tokens"):
        engines.Program(program, LINES["itl-0.5b"], model, 2)
    (program.parent / "llama-cli").unlink()
    with pytest.raises(engines.Missing, match="llama-cli"):
        engines.Program(program, LINES["coldstart-0.5b"], model, 2)


@pytest.mark.parametrize("read", [engines.bench_rate, engines.batched_rate])
@pytest.mark.parametrize("output", ["", "error: no such file", "[]", "[{}]", "| a | b |"])
def test_other_words_are_one_clear_reason(read: Any, output: str) -> None:
    with pytest.raises(engines.Missing, match="not llama"):
        read(output)


def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no model there')"]
    with pytest.raises(engines.Missing, match="no model there"):
        engines.run(command)


def test_the_ratio_is_to_the_best_peer_and_times_count_the_other_way() -> None:
    found = results.summary(LINE, record({"haomiao": [90.0, 100.0, 110.0], "a": [80.0] * 3, "b": [50.0] * 3}))
    assert (found["best_peer"], found["ratio"]) == ("a", pytest.approx(1.25))
    share = found["engines"]["haomiao"]["share_of_limit"]["median"]
    assert share == pytest.approx(100.0 / LINE.limit_tok_s(40.0, 900.0))  # type: ignore[operator]
    cold = LINES["coldstart-0.5b"]
    found = results.summary(cold, record({"haomiao": [400.0], "a": [1600.0], "b": [2000.0]}, "exit_ms"))
    assert (found["best_peer"], found["ratio"]) == ("a", pytest.approx(4.0))
    assert "ratio" not in results.summary(LINE, record({"haomiao": [1.0]}))


def test_samples_gather_until_the_work_or_our_commit_changes(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    first = results.Results(path)
    kept = first.line(LINE, 2, "abc")
    kept.update(record({"haomiao": [90.0], "a": [80.0]}))
    first.write(LINE)
    assert set(results.Results(path).line(LINE, 2, "abc")["samples"]) == {"haomiao", "a"}
    assert set(results.Results(path).line(LINE, 2, "def")["samples"]) == {"a"}
    assert results.Results(path).line(LINE, 4, "abc")["samples"] == {}


def filled(tmp_path: Path) -> results.Results:
    found = results.Results(tmp_path / "found.json")
    for line, metric in ((LINE, "tok_s"), (LINES["coldstart-0.5b"], "exit_ms")):
        found.line(line, 2, "abc").update(record({"haomiao": [90.0, 95.0], "a<b": [80.0, 70.0]}, metric))
        found.write(line)
    return found


def test_the_table_and_the_plot(tmp_path: Path) -> None:
    data = filled(tmp_path).data
    lines = results.table(LINES, data).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert "1.23 (a<b)" in lines[2]
    root = ET.fromstring(plot.draw(LINES, data, "a & b"))
    bars = [each for each in root.iter() if each.tag.endswith("rect") and each.get("height") == "12"]
    assert len(bars) == 4
    assert "prefers-color-scheme: dark" in ET.tostring(root, "unicode")


def test_one_small_run(tmp_path: Path, program: Path) -> None:
    """A model of one layer in the place of the real one, our engine and a stand-in for the peer."""
    pytest.importorskip("gguf")
    folder = tmp_path / "peers"
    flags = ["qwen2.5-0.5b", "--layers", "1", "--vocab", "300", "--gguf", "Q4_0", "--no-safetensors"]
    make = [sys.executable, str(BENCHMARKS / "make_model.py"), *flags, "--out", str(folder / "models/qwen2.5-0.5b")]
    subprocess.run(make, check=True, capture_output=True)
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv.pop(1)); import peers;"
        "out = pathlib.Path(sys.argv.pop(1)); real = peers.results.Results;"
        "peers.results.Results = lambda path: real(out); peers.main()"
    )
    asked = ["--folder", str(folder), "--peer", f"fake={program}", "--lines", "streams-0.5b-4,coldstart-0.5b"]
    asked += [
        "--engines",
        "haomiao,fake",
        "--rounds",
        "2",
        "--threads",
        "1",
        "--others",
        "99",
        "--plot",
        str(tmp_path / "plot.svg"),
    ]
    command = [sys.executable, "-c", code, str(BENCHMARKS), str(tmp_path / "found.json"), *asked]
    environment = {**os.environ, "HAOMIAO_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    said = json.loads(done.stdout.splitlines()[-1])
    for name, metric in (("streams-0.5b-4", "tok_s"), ("coldstart-0.5b", "exit_ms")):
        assert said[name]["engines"]["haomiao"][metric]["samples"] == 2
        assert said[name]["best_peer"] == "fake"
    ET.parse(tmp_path / "plot.svg")


def test_time_that_others_take_is_seen() -> None:
    if not Path("/proc/stat").exists():
        assert engines.Others([]).cores() is None
        return
    others = engines.Others([])
    with engines.Neighbour():  # ours: once it has ended, its time counts as our own
        pass
    assert (others.cores() or 0.0) >= 0.0


def test_every_line_names_engines_and_a_target() -> None:
    for line in LINES.values():
        assert isinstance(line, Line)
        assert line.engines[0] == "haomiao"
        assert line.target
        assert line.bytes_per_step() > 0
