"""The overload benchmark's own parts: the search for the greatest load that is kept, a proxy that waits for slots."""

from __future__ import annotations

import asyncio
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from haomiao.measure.load import Record, Run
from haomiao.measure.mix import BUILT_IN, Offer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
baselines: Any = pytest.importorskip("baselines")
deadlines: Any = pytest.importorskip("deadlines")
MIX = BUILT_IN["choice"]


def run_at(rate: float, kept_up_to: float) -> Run:
    """A hundred choices, on time as long as the rate is one that the server keeps."""
    end = 20.0 if rate <= kept_up_to else 500.0
    return Run(
        [Record(Offer(index, 0.0, "choice", "?"), end_ms=end, status=200, finish="stop") for index in range(100)], 1.0
    )


@pytest.mark.parametrize("kept_up_to", [0.7, 1.0, 3.3, 13.0, 100.0])
def test_the_greatest_kept_rate_is_found(monkeypatch: pytest.MonkeyPatch, kept_up_to: float) -> None:
    """Within a step of the bisection, from above or from below, whatever the unit."""
    seeds: list[int] = []

    def one_run(args: Any, contender: Any, url: str, mix: Any, rate: float, seed: int, least: int) -> Run:
        seeds.append(seed)
        return run_at(rate, kept_up_to)

    monkeypatch.setattr(deadlines, "one_run", one_run)
    found = deadlines.rho99(Namespace(probes=6), None, "", MIX, 4.0)
    assert found["per_s"] <= kept_up_to <= found["per_s"] * 1.05 or found["per_s"] == max(
        probe["per_s"] for probe in found["probes"]
    )
    assert len(set(seeds)) == len(seeds), "no probe meets a prompt that was cached before"


def test_a_server_that_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "one_run", lambda *args, **options: run_at(1.0, 0.0))
    found = deadlines.rho99(Namespace(probes=3), None, "", MIX, 4.0)
    assert found["per_s"] == 0.0 and len(found["probes"]) == 7


def test_a_slot_that_was_hung_up_on_is_taken_until_the_server_says_so() -> None:
    """One slot: the next request is let in when `/slots` says that it is idle, not when the client gave up."""
    asked: list[bool] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (await reader.readline()).strip():
            while (await reader.readline()).strip():
                pass
            asked.append(len(asked) < 3)
            body = json.dumps([{"is_processing": asked[-1]}]).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body))
            writer.write(body)
        writer.close()

    async def go() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        proxy = baselines.EdfProxy(1, {"choice": 10.0}, f"http://127.0.0.1:{port}")
        kind, offer = MIX.classes[0], Offer(0, 0.0, "choice", "?")
        assert await proxy.ready(offer, kind, lambda: 10_000.0)
        waiting = asyncio.ensure_future(proxy.ready(offer, kind, lambda: 10_000.0))
        await asyncio.sleep(0)
        assert not waiting.done()
        proxy.finished(kind, True)
        await asyncio.sleep(0)
        assert not waiting.done()
        assert await asyncio.wait_for(waiting, 30)
        assert asked == [True, True, True, False]
        proxy.finished(kind)
        server.close()

    asyncio.run(go())
