"""The parts of benchmarks/deadlines.py that decide: the proxy before llama-server, budgets, and the report."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from haomiao.measure.load import Record, Run
from haomiao.measure.mix import BUILT_IN, Mix, Offer, RequestClass

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
if not (FOLDER / "deadlines.py").exists():
    pytest.skip("the benchmarks are not beside the tests", allow_module_level=True)
sys.path.insert(0, str(FOLDER))
import baselines  # noqa: E402
import deadlines  # noqa: E402

CHOICE = RequestClass("choice", 1, 100, max_tokens=1, options=("A", "B"), prompts=("Q",))
TEXT = RequestClass("text", 1, 100, max_tokens=4, prompts=("P",))


def test_the_proxy_lets_in_by_deadline_and_turns_away_what_is_hopeless() -> None:
    async def go() -> list[str]:
        proxy = baselines.EdfProxy(1, {"choice": 20.0, "text": 20.0})
        let_in: list[str] = []

        async def ask(name: str, kind: RequestClass, left: float) -> None:
            if await proxy.ready(Offer(0, 0.0, kind.name, ""), kind, lambda: left):
                let_in.append(name)
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                proxy.finished(kind)
            else:
                let_in.append(f"not {name}")

        await asyncio.gather(
            ask("first", CHOICE, 90.0),  # nobody waits yet
            ask("late", TEXT, 900.0),
            ask("soon", TEXT, 50.0),
            ask("hopeless", CHOICE, 10.0),  # a choice takes 20
            ask("partly", TEXT, 10.0),  # half a text is worth something
        )
        return let_in

    assert asyncio.run(go()) == ["first", "not hopeless", "partly", "soon", "late"]


def test_a_request_that_grew_old_in_the_proxy_is_turned_away() -> None:
    async def go() -> bool:
        proxy = baselines.EdfProxy(1, {"choice": 20.0})
        left = [90.0]
        assert await proxy.ready(Offer(0, 0.0, "choice", ""), CHOICE, lambda: 90.0)
        waiting = asyncio.ensure_future(proxy.ready(Offer(1, 0.0, "choice", ""), CHOICE, lambda: left[0]))
        await asyncio.sleep(0)
        left[0] = 5.0
        proxy.finished(CHOICE)
        return await waiting

    assert asyncio.run(go()) is False


def test_what_each_server_is_told() -> None:
    offer = Offer(0, 0.0, "choice", "Q")
    proxy = baselines.EdfProxy(2, {})
    assert proxy.body(offer, CHOICE, 50.0)["grammar"] == 'root ::= "A" | "B"'
    assert proxy.body(offer, TEXT, 50.0)["cache_prompt"] is True
    assert baselines.Stock().body(offer, CHOICE, 50.0)["grammar"] == 'root ::= "A" | "B"'
    early, late = (baselines.VllmPriority().body(offer, TEXT, left)["priority"] for left in (10.0, 9000.0))
    assert early < late
    assert baselines.Haomiao().body(offer, TEXT, 50.0)["budget_ms"] == 50.0


def test_budgets_follow_the_best_server() -> None:
    mix = deadlines.budgets(BUILT_IN["mixed"], [dict.fromkeys(names(), 10.0), dict.fromkeys(names(), 4.0)], 3.0)
    assert {kind.budget_ms for kind in mix.classes} == {12.0}


def names() -> list[str]:
    return [kind.name for kind in BUILT_IN["mixed"].classes]


def test_the_report_pairs_requests(capsys: pytest.CaptureFixture[str]) -> None:
    mix = Mix("m", (TEXT,))

    def run(ends: list[float]) -> Run:
        moments = [5.0, 6.0, 7.0, 8.0]
        records: list[Record] = [
            Record(Offer(i, 0.0, "text", "P"), end_ms=end, status=200, finish="length", tokens=4, token_ms=moments)
            if end
            else Record(Offer(i, 0.0, "text", "P"), status=429, end_ms=1.0)
            for i, end in enumerate(ends)
        ]
        return Run(records, 100.0)

    cells: dict[str, Any] = {"haomiao": {"2": [run([9.0, 9.0, 0.0, 9.0])]}, "peer": {"2": [run([9.0, 0.0, 0.0, 0.0])]}}
    rows = deadlines.report(cells, mix)
    assert rows["2"]["haomiao"]["useful"]["estimate"] == pytest.approx(0.75)
    assert rows["2"]["peer"]["ours_less"]["estimate"] == pytest.approx(0.5)
    assert rows["2"]["ratio_to_best"] == pytest.approx(3.0)
    assert "load 2" in capsys.readouterr().out
