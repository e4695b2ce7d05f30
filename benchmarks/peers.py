"""Haomiao beside llama.cpp, OpenVINO and any llama-bench: same weights, same threads, in turns, each beside its limit.

    python benchmarks/peers.py --install                                        # once: the peers' environments
    python benchmarks/peers.py --peer ik_llama.cpp=PATH/llama-bench             # every line, about an hour
    python benchmarks/peers.py --lines decode-0.5b-int4,itl-0.5b --seconds 170  # a few, for that long at most
    python benchmarks/peers.py --report --plot docs/speed.svg                   # the table, and the README's plot

Everything made lies in .peers (ignored by git): the environments, and random checkpoints of real shapes as GGUF
(make_model.py), which every engine reads; ours converts them once into its cache, code for code. A peer is a process of
its own. A round measures the ceilings and then takes one sample from every engine, in an order that turns; the first
sample of an engine warms it up and is dropped. Samples gather in benchmarks/results/<name>.json until there are
--rounds of each, so that a long measurement can be made in short pieces: what is there is not measured again unless our
commit or the line has changed. A sample beside which other programs took more than a tenth of a core is
disturbed and taken again, in at most four times the rounds. Random weights serve for speed only. The last line printed
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from peerlib import engines, plot, results
from peerlib.lines import LINES, Line

HERE = Path(__file__).resolve().parent


def make_checkpoint(folder: Path, line: Line, tokenizer: Path | None) -> Path:
    """The line's GGUF file, written if it is not there."""
    path = folder / line.shape / f"model-{line.file}.gguf"
    if not path.exists():
        print(f"making {path}", flush=True)
        command = [sys.executable, str(HERE / "make_model.py"), line.shape, "--out", str(path.parent)]
        command += ["--no-safetensors", "--gguf", line.file, "--random-codes"]
        if tokenizer is not None and line.shape.startswith("qwen"):
            command += ["--tokenizer", str(tokenizer)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def start(name: str, line: Line, model: Path, args: argparse.Namespace) -> engines.Engine:
    """An engine, ready to sample. Raises `Missing`."""
    if name in args.programs:
        return engines.Program(args.programs[name], line, model, args.threads)
    if line.work == "coldstart":
        from haomiao.models.open import open_model

        artifact = open_model(str(model), point=line.point).artifact.directory
        return engines.ColdStart(artifact, args.threads, line.point)
    python = {"haomiao": sys.executable, "llama.cpp": args.llama_python, "openvino": args.openvino_python}[name]
    if not Path(python).exists():
        raise engines.Missing(f"{python} is not there (--install makes it)")
    return engines.Worker(python, name, line, model, args.threads)


def names_for(line: Line, args: argparse.Namespace) -> list[str]:
    """The engines that do a line, programs last."""
    able = [name for name in line.engines if name != "programs"]
    if "programs" in line.engines:
        able += [name for name in args.programs if name not in able]
    return [name for name in able if not args.engines or name in args.engines]


def measure(line: Line, args: argparse.Namespace, found: results.Results, deadline: float) -> bool:
    """Take samples of a line until every engine has its rounds, or the time is up. True if all have them."""
    from haomiao.metrics.ceilings import measure_ceilings

    record = found.line(line, args.threads, results.commit_of(HERE))
    samples: dict[str, list[Any]] = record["samples"]
    wanted = [n for n in names_for(line, args) if len(samples.get(n, [])) < args.rounds]
    if not wanted:
        return True
    model = make_checkpoint(args.folder / "models", line, args.tokenizer)
    running: dict[str, engines.Engine] = {}
    longest, most = 0.0, turns_allowed(args, record)
    try:
        for name in wanted:
            try:
                running[name] = start(name, line, model, args)
                if not isinstance(running[name], engines.Program):
                    running[name].sample(0)
                record["missing"].pop(name, None)
            except engines.Missing as reason:
                running.pop(name, None)
                record["missing"][name] = str(reason)
                print(f"{line.name}: {name}: {reason}", flush=True)
        while running and time.monotonic() + longest < deadline and len(record["ceilings"]) < most:
            begun = time.monotonic()
            turn = len(record["ceilings"])
            ceilings = measure_ceilings(args.threads)
            record["ceilings"].append({"read_gb_s": ceilings.read_gb_s, "int8_gops": ceilings.int8_gops})
            order = list(running)
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                others = engines.Others([engine.pid for engine in running.values() if engine.pid is not None])
                try:
                    sample = {"round": turn, **take(running[name], line, turn + 1)}
                except engines.Missing as reason:
                    record["missing"][name] = str(reason)
                    running.pop(name).close()
                    continue
                if (others.cores() or 0.0) > args.others:
                    record["disturbed"][name] = record["disturbed"].get(name, 0) + 1
                    continue
                samples.setdefault(name, []).append(sample)
                if len(samples[name]) >= args.rounds:
                    running.pop(name).close()
            found.write(line)
            longest = max(longest, time.monotonic() - begun)
    finally:
        for engine in running.values():
            engine.close()
        found.write(line)
    return all(len(samples.get(n, [])) >= args.rounds for n in names_for(line, args) if n not in record["missing"])


def turns_allowed(args: argparse.Namespace, record: dict[str, Any]) -> int:
    """Rounds after which a run gives up: a machine that others use all the time would keep it for ever."""
    return len(record["ceilings"]) + 4 * args.rounds


def take(engine: engines.Engine, line: Line, seed: int) -> engines.Sample:
    """One sample, beside a neighbour where the line wants one."""
    if not line.neighbour:
        return engine.sample(seed)
    with engines.Neighbour():
        return engine.sample(seed)


def show(line: Line, record: dict[str, Any]) -> None:
    """What was found, the ceilings first."""
    found = record["summary"]
    reads = sorted(c["read_gb_s"] for c in record["ceilings"])
    peaks = sorted(c["int8_gops"] for c in record["ceilings"])
    if reads:
        print(f"{line.name}: read {reads[len(reads) // 2]:.1f} GB/s, int8 {peaks[len(peaks) // 2]:.0f} Gop/s")
    for name, figures in found["engines"].items():
        share = figures.get("share_of_limit")
        beside = f"{share['median']:.0%} of the limit" if share else ""
        rest = "  ".join(
            f"{key} {value['median']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"
            for key, value in figures.items()
            if key not in (line.metric, "share_of_limit")
        )
        print(f"  {name:<14}{results.shown(line, figures):<24}{results.TITLES[line.metric]:<6}{beside}  {rest}")
    if "ratio" in found:
        print(f"  ratio {found['ratio']:.2f} to {found['best_peer']} (wanted: {line.target})", flush=True)


def program(text: str) -> tuple[str, Path]:
    """NAME=PATH."""
    name, equals, path = text.partition("=")
    if not equals or not name or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"must be NAME=PATH of a program, not {text!r}")
    return name, Path(path).resolve()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--install", action="store_true", help="make the peers' environments and stop")
    add("--folder", type=Path, default=HERE.parent / ".peers", help="environments and checkpoints")
    add("--llama-python", help="interpreter with llama-cpp-python; default: the one that --install makes")
    add("--openvino-python", help="interpreter with openvino-genai; default: the one that --install makes")
    add("--peer", type=program, action="append", default=[], metavar="NAME=PATH", help="a llama-bench; repeatable")
    add("--lines", default="", help=f"comma-separated; default all: {', '.join(LINES)}")
    add("--engines", default="", help="comma-separated names; default all")
    add("--rounds", type=int, default=5, help="samples of each engine")
    add("--seconds", type=float, default=float("inf"), help="begin no round that would end after this")
    add("--others", type=float, default=0.1, help="cores that other programs may take beside a sample (Linux)")
    add("--threads", type=int)
    add("--tokenizer", type=Path, help="a real tokenizer for the Qwen checkpoint (make_model.py --tokenizer)")
    add("--name", default="peers", help="of the file in benchmarks/results")
    add("--report", action="store_true", help="measure nothing; print the table")
    add("--plot", type=Path, metavar="FILE", help="draw the file of results as SVG")
    args = parser.parse_args()
    args.programs = dict(args.peer)
    args.engines = [name for name in args.engines.split(",") if name]
    args.lines = [name for name in args.lines.split(",") if name] or list(LINES)
    unknown = [name for name in args.lines if name not in LINES]
    if unknown:
        parser.error(f"there is no line {', '.join(unknown)}; there are {', '.join(LINES)}")
    args.folder = args.folder.resolve()
    args.llama_python = args.llama_python or engines.environment_python(args.folder / "llama")
    args.openvino_python = args.openvino_python or engines.environment_python(args.folder / "openvino")
    return args


def main() -> None:
    """Install, measure or report."""
    args = parse()
    if args.install:
        engines.install(args.folder)
        return
    found = results.Results(HERE / "results" / f"{args.name}.json")
    if not args.report:
        from haomiao.measure.machine import default_threads, describe_machine
        from haomiao.metrics.ceilings import measure_ceilings

        args.threads = args.threads or default_threads()
        ceilings = measure_ceilings(args.threads)
        print(
            f"ceilings: read {ceilings.read_gb_s:.1f} GB/s, int8 {ceilings.int8_gops:.0f} Gop/s, {args.threads} threads"
        )
        found.data["machine"] = describe_machine().as_dict()
        deadline = time.monotonic() + args.seconds
        for name in args.lines:
            done = measure(LINES[name], args, found, deadline)
            show(LINES[name], found.data["lines"][name])
            if not done:
                print(f"{name}: not finished; the same command goes on where this one stopped", flush=True)
    print(results.table(LINES, found.data))
    if args.plot is not None:
        date = max((record.get("date", "") for record in found.data["lines"].values()), default="")[:10]
        machine = found.data.get("machine", {})
        title = f"{machine.get('processor')}, {machine.get('allowed')} cores, {date}: longer is faster"
        args.plot.write_text(plot.draw(LINES, found.data, title), encoding="utf-8")
    print(json.dumps({name: record.get("summary") for name, record in found.data["lines"].items()}))


if __name__ == "__main__":
    main()
