"""What speculation costs at stated acceptance, and, apart from that, what a trained model accepts.

    python benchmarks/speculation.py costs MODEL [--threads 2] [--context 512]       # random weights of real shape will
    do python benchmarks/speculation.py acceptance [MODEL] --text FILE [--text FILE]    # a trained model; default:
    embedded

`costs`: single steps first (one token, four tokens with four rows of logits, one token at the drafting point), in
turns; then whole answers of the engine with drafts whose tokens are right at a forced rate, in turns with answers
without. Their tokens are compared: a difference ends the benchmark. `acceptance`: prompts are cut from the texts;
drafts of fixed lengths, greedy and at temperature 0.8. Small models fall into loops when greedy, which flatters
suffixes: hence both. The two kinds of figures are never multiplied. The last line is one JSON object; --name writes it
to results/ too."""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from haomiao.api import LLM
from haomiao.engine.engine import Engine
from haomiao.engine.request import DoneEvent, EngineRequest, TokenEvent
from haomiao.engine.speculate.costs import Allowance, StepCosts
from haomiao.engine.speculate.forced import ForcedProposer
from haomiao.engine.speculate.own_plane import OwnPlaneProposer
from haomiao.engine.speculate.proposer import Proposer
from haomiao.engine.speculate.speculator import Speculator
from haomiao.engine.speculate.suffix import SuffixProposer
from haomiao.measure.machine import describe_machine
from haomiao.metrics.ceilings import measure_ceilings
from haomiao.metrics.statistics import bootstrap_mean, summarize
from haomiao.types import KV_BLOCK_TOKENS, Executor, SamplingParams, StepBatch

RESULTS = Path(__file__).resolve().parent / "results"
DRAFTED = 3


class FixedLength(StepCosts):
    """Says that drafting and verifying cost nothing, so that every draft is as long as it may be."""

    def observe(self, name: str, tokens: int, nanoseconds: float) -> None:
        """Learn nothing."""

    def knows(self, name: str) -> bool:
        return True

    def ratio(self, name: str, tokens: int) -> float:
        return 1.0

    def widest(self, name: str) -> int:
        return 99

    def predict(self, name: str, tokens: int) -> float:
        return 1.0 if name == "int8" else 0.0


class Unbounded(Allowance):
    """Never stops drafting."""

    @property
    def open(self) -> bool:
        return True


def answer(engine: Engine, prompt: list[int], tokens: int, **sampling: Any) -> tuple[list[int], DoneEvent]:
    """One answer of exactly `tokens` tokens."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, **sampling)
    events = engine.run_until(engine.submit(EngineRequest(prompt, sampling=params)))
    done = next(event for event in events if isinstance(event, DoneEvent))
    if done.error is not None:
        raise done.error
    return [token for event in events if isinstance(event, TokenEvent) for token in event.token_ids], done


def engine_of(executor: Executor, proposer: Proposer | None, costs: StepCosts, most: int, context: int) -> Engine:
    """An engine that drafts with one proposer."""
    speculator = Speculator([proposer] if proposer else [], costs=costs, most=most)
    if isinstance(costs, FixedLength):
        speculator.allowance = Unbounded()
    return Engine(executor, max_context=context, prefix_cache=True, point="int8", speculator=speculator)


# ---- costs ----------------------------------------------------------------------------------------------------------


def single_steps(executor: Executor, context: int, repeat: int) -> dict[str, Any]:
    """Milliseconds of single steps after `context` tokens, in turns; greedy rows, as a greedy answer asks for them."""
    rng = np.random.default_rng(1)
    blocks = -(-(context + 8) // KV_BLOCK_TOKENS)
    table = np.arange(blocks, dtype=np.int32)[None, :]

    def batch(tokens: int, past: int, point: str, rows: int) -> StepBatch:
        ids = rng.integers(0, min(executor.vocab_size, 1000), tokens).astype(np.int32)
        starts = np.array([0, tokens], np.int32)
        wanted = np.arange(tokens - rows, tokens, dtype=np.int32)
        return StepBatch(ids, starts, np.array([past], np.int32), table, wanted, point, np.ones(rows, np.bool_))

    for past in range(0, context, executor.max_step_tokens):
        executor.step(batch(min(executor.max_step_tokens, context - past), past, "int8", 0))
    kinds = {"int8 x1": (1, "int8"), "int4 x1": (1, "int4")}
    kinds |= {f"int8 x{tokens}": (tokens, "int8") for tokens in (2, 3, 4, 5, 6, 8)}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(repeat + 1):
        for kind, (tokens, point) in kinds.items():
            elapsed = executor.step(batch(tokens, context, point, tokens)).elapsed_ns / 1e6
            if turn:
                times[kind].append(elapsed)
    found: dict[str, Any] = {kind: summarize(each).as_dict() for kind, each in times.items()}
    median = {kind: statistics.median(each) for kind, each in times.items()}
    found["verify of 4 / one step"] = median["int8 x4"] / median["int8 x1"]
    found["3 drafts + verify / 4 steps"] = (3 * median["int4 x1"] + median["int8 x4"]) / (4 * median["int8 x1"])
    return found


def forced(executor: Executor, context: int, new_tokens: int, repeat: int) -> list[dict[str, Any]]:
    """Whole answers at forced acceptance, in turns with plain ones."""
    prompt = [int(token) for token in np.random.default_rng(2).integers(0, min(executor.vocab_size, 1000), context)]
    limit = context + new_tokens + KV_BLOCK_TOKENS
    plain = engine_of(executor, None, StepCosts(), 0, limit)
    expected, _ = answer(plain, prompt, new_tokens)
    engines: dict[str, tuple[str, str, float | None, Engine]] = {"off": ("off", "", None, plain)}
    for rate in (0.5, 0.7, 0.9):
        for way in ("suffix", "self"):
            for length in ("fixed", "adaptive"):
                costs: StepCosts = FixedLength() if length == "fixed" else StepCosts()
                around = OwnPlaneProposer(executor, "int4", costs) if way == "self" else None
                proposer = ForcedProposer(lambda sequence: expected, rate, around=around, seed=3)
                most = DRAFTED if length == "fixed" else 8
                engines[f"{way} {length} {rate}"] = (
                    way,
                    length,
                    rate,
                    engine_of(executor, proposer, costs, most, limit),
                )
    times: dict[str, list[float]] = {name: [] for name in engines}
    counts: dict[str, tuple[int, int]] = {}
    for turn in range(repeat + 1):
        for name, (_, _, _, engine) in engines.items():
            found, done = answer(engine, prompt, new_tokens)
            if found != expected:
                raise SystemExit(f"{name}: speculation changed the answer")
            receipt = done.receipt
            counts[name] = receipt.drafted_tokens, receipt.accepted_tokens
            if turn:
                times[name].append(receipt.decode_ms / (new_tokens - 1))
    base = statistics.median(times["off"])
    rows = []
    for name, (way, length, rate, _) in engines.items():
        drafted, accepted = counts[name]
        steps = new_tokens - accepted
        rows.append(
            {
                "way": way, "length": length, "forced": rate, "ms_per_token": summarize(times[name]).as_dict(),
                "time_vs_off": statistics.median(times[name]) / base, "drafted": drafted, "accepted": accepted,
                "tokens_per_step": new_tokens / steps, "step_vs_off": statistics.median(times[name]) / base * new_tokens
                / steps,
            }
        )  # fmt: skip
    return rows


def costs(args: argparse.Namespace) -> dict[str, Any]:
    """Everything about time."""
    with LLM(
        args.model, point="int8", threads=args.threads, max_context=args.context + args.new_tokens + 64, speculate="off"
    ) as llm:
        ceilings = measure_ceilings(llm.threads)
        print(
            f"ceilings: read {ceilings.read_gb_s:.1f} GB/s, int8 {ceilings.int8_gops:.0f} Gop/s, {llm.threads} threads"
        )
        executor = llm._driver.alone(lambda engine: engine.executor)
        steps = single_steps(executor, args.context, args.repeat * 5)
        for kind, figure in steps.items():
            single = isinstance(figure, dict)
            shown = (
                f"{figure['median']:.2f} ms [{figure['low']:.2f}, {figure['high']:.2f}]" if single else f"{figure:.3f}"
            )
            print(f"  {kind:<28} {shown}")
        rows = forced(executor, args.context, args.new_tokens, args.repeat)
        for row in rows:
            print(
                f"  {row['way']:<7} {row['length']:<9} {row['forced'] or '':<4} "
                f"{row['ms_per_token']['median']:7.2f} ms/token, {row['time_vs_off']:.3f} of off; "
                f"{row['tokens_per_step']:.2f} tokens a step, a step {row['step_vs_off']:.2f} of one; "
                f"{row['accepted']} of {row['drafted']} stood"
            )
        settings = {"model": llm.name, "threads": llm.threads, "isa": llm.isa, "context": args.context,
                    "new_tokens": args.new_tokens, "repeat": args.repeat}  # fmt: skip
    return {"benchmark": "speculation costs", "settings": settings, "ceilings": ceilings.as_dict(), "steps": steps,
            "answers": rows}  # fmt: skip


# ---- acceptance -----------------------------------------------------------------------------------------------------


def prompts(llm: LLM, path: Path, count: int, tokens: int) -> Iterator[list[int]]:
    """Prompts of `tokens` tokens, evenly spread over a text."""
    text = path.read_text(encoding="utf-8", errors="replace")
    for index in range(count):
        start = index * max(0, len(text) - 8 * tokens) // max(1, count - 1) if count > 1 else 0
        yield llm.tokenize(text[start : start + 8 * tokens])[:tokens]


def acceptance(args: argparse.Namespace) -> dict[str, Any]:
    """Drafts of fixed lengths on real text: what share stands."""
    rows: list[dict[str, Any]] = []
    with LLM(args.model, point="int8", threads=args.threads, speculate="off") as llm:
        executor = llm._driver.alone(lambda engine: engine.executor)
        ways: dict[str, Callable[[StepCosts], Proposer]] = {
            "suffix": lambda costs: SuffixProposer(),
            "self": lambda costs: OwnPlaneProposer(executor, "int4", costs),
        }
        for path in args.text:
            for temperature in (0.0, 0.8):
                for way, make in ways.items():
                    for most in (1, 3, 4, 8):
                        costs = FixedLength()
                        engine = engine_of(executor, make(costs), costs, most, llm.max_context)
                        shares, sizes, drafted, accepted = [], [], 0, 0
                        for index, prompt in enumerate(prompts(llm, path, args.prompts, args.prompt_tokens)):
                            _, done = answer(engine, prompt, args.new_tokens, temperature=temperature, seed=index)
                            receipt = done.receipt
                            drafted += receipt.drafted_tokens
                            accepted += receipt.accepted_tokens
                            shares.append(args.new_tokens / (args.new_tokens - receipt.accepted_tokens))
                            sizes.append(float(args.new_tokens - receipt.accepted_tokens))
                        per_step = bootstrap_mean(shares, sizes)
                        rows.append(
                            {
                                "text": path.name, "temperature": temperature, "way": way, "most": most,
                                "drafted": drafted, "accepted": accepted,
                                "share": accepted / drafted if drafted else None, "tokens_per_step": per_step.as_dict(),
                            }
                        )  # fmt: skip
                        print(
                            f"  {path.name:<20} T={temperature:<4} {way:<7} at most {most}: "
                            f"{accepted} of {drafted} stood, {per_step.estimate:.2f} "
                            f"[{per_step.low:.2f}, {per_step.high:.2f}] tokens a step"
                        )
        settings = {"model": llm.name, "prompts": args.prompts, "prompt_tokens": args.prompt_tokens,
                    "new_tokens": args.new_tokens}  # fmt: skip
    return {"benchmark": "speculation acceptance", "settings": settings, "texts": rows}


def commit() -> str | None:
    """The commit of this checkout, with a mark if it has changes."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=RESULTS.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return described.stdout.strip() or None


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("costs", "acceptance"))
    parser.add_argument("model", nargs="?", help="default: the embedded model")
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--prompt-tokens", type=int, default=96)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--name", help="of the result file: results/speculation-NAME.json")
    args = parser.parse_args()
    result = costs(args) if args.what == "costs" else acceptance(args)
    result |= {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": describe_machine().as_dict(),
    }
    if args.name:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"speculation-{args.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
