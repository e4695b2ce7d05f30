"""The load generator over real sockets, and the arithmetic on its records by hand."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from haomiao.cli.main import main
from haomiao.errors import InputError
from haomiao.measure.attainment import is_on_time, lag_limit_ms, score, summarize_load
from haomiao.measure.load import DIALECTS, Load, Record, Run, events_of, model_of
from haomiao.measure.mix import BUILT_IN, Mix, Offer, RequestClass, draw_trace
from haomiao.measure.wire import Address, Client, Response
from tests.measure.stand_in import Reply, StandIn, chunk, event, head, running, stream_answer, whole

MIX = Mix(
    "m",
    (
        RequestClass("choice", 1, 60_000, max_tokens=1, options=("yes", "no"), prompts=("Q",)),
        RequestClass("text", 1, 60_000, ttft_ms=30_000, max_tokens=4, prompts=("P",)),
        RequestClass("chat", 1, max_tokens=3, endpoint="chat", prompts=("Hi",), body={"min_point": "int8"}),
    ),
)


def talk(reply: Reply, action: Callable[[StandIn, Client], Coroutine[Any, Any, Any]]) -> tuple[Any, StandIn]:
    """Run an action against a server in the same loop."""

    async def go() -> tuple[Any, StandIn]:
        server = StandIn(reply)
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        server.port = listening.sockets[0].getsockname()[1]
        client = Client(server.url)
        try:
            return await action(server, client), server
        finally:
            client.close()
            listening.close()

    return asyncio.run(go())


def offered(reply: Reply, *, mix: Mix = MIX, dialect: str = "haomiao", count: int = 24, **options: Any) -> Any:
    trace = draw_trace(mix, rate=2000, count=count, seed=0)

    async def action(_: StandIn, client: Client) -> Run:
        return await Load(client, mix, DIALECTS[dialect](), model="m", **options).open_loop(trace)

    return talk(reply, action)


# ---- sending ------------------------------------------------------------------------------------------------------


def test_open_loop_sends_everything_and_reads_it() -> None:
    run, server = offered(stream_answer)
    report = summarize_load(run, MIX)
    assert len(run.records) == len(server.asked) == 24
    assert [record.offer.index for record in run.records] == list(range(24))
    assert (report["on_time"], report["useful"], report["failed"]) == (1.0, 1.0, 0.0)
    for record in run.records:
        if record.offer.kind == "text":
            assert record.text == "t0 t1 t2 t3 "
            assert record.tokens == len(record.token_ms) == 4
            assert record.token_ms == sorted(record.token_ms)
            assert record.sent_ms <= record.token_ms[0] <= record.end_ms
    receipts = report["receipts"]
    assert receipts["coverage"] == 1.0
    assert receipts["tightness"] == pytest.approx(1.2)
    assert receipts["outcomes"] == {"met": 24}
    assert report["send_lag_ms"]["p50"] >= 0


def test_our_dialect_states_what_is_left_of_the_budget() -> None:
    _, server = offered(stream_answer)
    for body in server.asked:
        assert body["model"] == "m"
        if "structured_outputs" in body:
            assert body["structured_outputs"] == {"choice": ["yes", "no"]}
            assert 0 < body["budget_ms"] <= 60_000
            assert body["stream"] is False
        elif "messages" in body:
            assert body["messages"] == [{"role": "user", "content": "Hi"}]
            assert body["min_point"] == "int8"
            assert "budget_ms" not in body
        else:
            assert 0 < body["ttft_ms"] <= 30_000 < body["budget_ms"]


def test_the_plain_dialect_says_nothing_of_budgets() -> None:
    _, server = offered(stream_answer, dialect="openai")
    assert not [body for body in server.asked if "budget_ms" in body or "ttft_ms" in body]


def test_connections_are_used_again_and_closed_loop_is_closed() -> None:
    most = 0
    now = 0

    async def reply(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        await stream_answer(body, writer)
        now -= 1

    async def action(_: StandIn, client: Client) -> Run:
        return await Load(client, MIX, DIALECTS["haomiao"]()).closed_loop(draw_trace(MIX, rate=1, count=30, seed=0), 3)

    run, server = talk(reply, action)
    assert most == server.connections == 3
    assert [record.offer.index for record in run.records] == list(range(30))


def test_a_client_hangs_up_when_its_patience_ends() -> None:
    ended: list[bool] = []

    async def reply(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, "text/event-stream") + chunk(event({"choices": [{"text": "a"}]})))
        await writer.drain()
        while not writer.transport.is_closing():  # a peer that is gone shows when it is written to
            writer.write(chunk(b": still here\n\n"))
            await asyncio.sleep(0.001)
        ended.append(True)

    mix = Mix("m", (RequestClass("text", 1, 50, max_tokens=4, prompts=("P",)),))

    async def action(_: StandIn, client: Client) -> Run:
        run = await Load(client, mix, DIALECTS["haomiao"](), patience=1.0).open_loop(
            draw_trace(mix, rate=2000, count=3, seed=0)
        )
        while len(ended) < 3:
            await asyncio.sleep(0.001)
        return run

    run, _ = talk(reply, action)
    assert [record.error for record in run.records] == ["gave up"] * 3
    report = summarize_load(run, mix)
    assert report["on_time"] == 0.0
    assert report["useful"] == pytest.approx(0.25)  # one of four tokens came in time
    assert report["failed"] == 0.0


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"SSH-2.0-x\r\n\r\n", "not HTTP"),
        (head(200, "application/json", length=100) + b"{}", "connection ended|not HTTP"),
        (head(200, "application/json", length=2) + b"{]", "not JSON"),
        (b"", "connection ended"),
    ],
)
def test_a_server_that_breaks_is_a_failed_request(data: bytes, error: str) -> None:
    async def reply(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        writer.close()

    run, _ = offered(reply, count=3)
    for record in run.records:
        assert record.error is not None
        assert re.search(error, record.error)
    assert summarize_load(run, MIX)["failed"] == 1.0


def test_nobody_listens() -> None:
    async def go() -> None:
        client = Client("http://127.0.0.1:9")
        response = await client.request("POST", "/v1/completions", b"{}")
        assert response.error is not None
        assert response.error.startswith("no connection")
        with pytest.raises(InputError, match="no server"):
            await model_of(client)

    asyncio.run(go())


@pytest.mark.parametrize("url", ["", "localhost:80", "ftp://x", "http://", "http://a:b", "http://u:p@x", "http://[::1"])
def test_what_is_not_an_address(url: str) -> None:
    with pytest.raises(InputError):
        Address.of(url)


def test_addresses() -> None:
    assert Address.of("http://h") == Address("h", 80, False)
    assert Address.of("https://h/v1/") == Address("h", 443, True)
    assert Address.of("http://[::1]:8000/api/v1") == Address("::1", 8000, False, "/api")


def test_events_have_the_moment_of_their_last_byte() -> None:
    data = (
        event({"a": 1}) + b": ping\n\n" + event({"a": 2}).replace(b"\n", b"\r\n") + b"data: {broken\n\ndata: [DONE]\n\n"
    )
    response = Response(pieces=[data[:10], data[10:30], data[30:]], moments_ns=[1, 2, 3])
    assert events_of(response) == [(2, {"a": 1}), (3, {"a": 2})]


# ---- arithmetic ---------------------------------------------------------------------------------------------------

TEXT = RequestClass("text", 1, 100, max_tokens=4, prompts=("P",))
CHOICE = RequestClass("choice", 1, 100, max_tokens=1, options=("yes", "no"), prompts=("Q",))


def record(kind: str = "text", **more: Any) -> Record:
    offer = Offer(0, 1000.0, kind, "P", more.pop("expect", None))
    given: dict[str, Any] = {"sent_ms": 1001.0, "end_ms": 1050.0, "status": 200, "finish": "length"} | more
    return Record(offer, **given)


def test_a_deadline_counts_from_when_the_request_was_due() -> None:
    assert is_on_time(record(end_ms=1100.0), TEXT)
    assert not is_on_time(record(end_ms=1100.5), TEXT)
    assert not is_on_time(record(error="gave up"), TEXT)
    assert not is_on_time(record(code="engine_error"), TEXT)
    assert not is_on_time(record(finish=None), TEXT)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({"token_ms": [1010.0, 1020.0, 1030.0, 1040.0], "tokens": 4}, 1.0),
        ({"token_ms": [1010.0, 1020.0], "tokens": 4}, 1.0),  # two tokens a piece
        ({"token_ms": [1010.0, 1020.0], "tokens": 2}, 0.5),  # cut by the server
        ({"token_ms": [1010.0, 1020.0], "tokens": 2, "finish": "stop"}, 1.0),  # came to its own end
        ({"token_ms": [1010.0, 1020.0], "tokens": 2, "finish": "stop", "detail": "budget_exhausted"}, 0.5),
        ({"token_ms": [1010.0, 1101.0, 1120.0, 1130.0], "tokens": 4, "end_ms": 1130.0}, 0.25),  # late: what was in time
        ({"token_ms": [1010.0], "tokens": 1, "error": "gave up", "finish": None}, 0.25),
        ({"token_ms": []}, 0.0),
        ({"status": 429, "finish": None}, 0.0),
    ],
)
def test_the_score_of_text(given: dict[str, Any], value: float) -> None:
    assert score(record(**given), TEXT) == pytest.approx(value)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({"text": " yes\n"}, 1.0),
        ({"text": "maybe"}, 0.0),
        ({"text": "yes", "end_ms": 1200.0}, 0.0),
        ({"text": "yes", "status": 504}, 0.0),
    ],
)
def test_the_score_of_a_choice(given: dict[str, Any], value: float) -> None:
    assert score(record("choice", **given), CHOICE) == value


def test_everything_is_divided_by_all_that_was_offered() -> None:
    mix = Mix("m", (TEXT, CHOICE))
    full = {"token_ms": [1010.0, 1020.0, 1030.0, 1040.0], "tokens": 4}
    records = [
        record(**full, receipt={"total_ms": 40.0, "predicted_ms": 50.0, "outcome": "met", "schedule": []}),
        record(**full, end_ms=1140.0, receipt={"total_ms": 120.0, "predicted_ms": 90.0, "outcome": "missed"}),
        record(status=429, finish=None, end_ms=1003.0, code="overloaded"),
        record(status=504, finish=None, code="budget_exhausted"),
        record(status=500, finish=None, code="engine_error"),
        record("choice", text="yes", expect="yes"),
        record("choice", text="no", expect="yes"),
        record("choice", status=422, finish=None, end_ms=1002.0, code="budget_infeasible"),
    ]
    report = summarize_load(Run(records, 2000.0), mix)
    assert report["offered"] == 8
    assert report["on_time"] == pytest.approx(3 / 8)
    assert report["useful"] == pytest.approx(4 / 8)  # the late one's tokens came in time
    assert report["refused"] == pytest.approx(2 / 8)
    assert report["expired"] == pytest.approx(1 / 8)
    assert report["failed"] == pytest.approx(1 / 8)
    assert report["right"] == pytest.approx(1 / 2)
    assert report["late_among_admitted"] == pytest.approx(1 / 4)
    assert report["lateness_ms"]["max"] == pytest.approx(40.0)
    assert report["notice_ms"]["max"] == pytest.approx(2.0)
    assert report["notice_share_of_budget_p99"] == pytest.approx(0.02, rel=0.02)
    assert report["goodput_per_s"] == pytest.approx(1.5)
    assert report["receipts"]["coverage"] == pytest.approx(1 / 2)
    assert report["receipts"]["clock_error_ms"]["p50"] == pytest.approx((9 + 19) / 2)
    assert report["classes"]["choice"]["on_time"] == pytest.approx(2 / 3)


def test_a_late_client_makes_the_run_void() -> None:
    """By more than a tenth of the shortest budget, 100 ms; where budgets are short, or none, by more than 2 ms."""
    fine = summarize_load(Run([record(lag_ms=9.0) for _ in range(50)], 1.0), Mix("m", (TEXT,)))
    void = summarize_load(Run([record(lag_ms=11.0) for _ in range(50)], 1.0), Mix("m", (TEXT,)))
    assert (fine["void"], void["void"]) == (False, True)
    assert [
        lag_limit_ms(Mix("m", (RequestClass("c", 1, budget, prompts=("P",)),))) for budget in (None, 5.0, 60.0)
    ] == [2, 2, 6]


# ---- the command --------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with running(stream_answer) as server:
        flags = ["--server", server.url, "--workload", "mixed", "--rate", "400", "--requests", "20", "--seed", "3"]
        files = ["--records", str(tmp_path / "r.jsonl"), "--save-trace", str(tmp_path / "t.jsonl")]
        code = main(["bench", *flags, *files, "--api-key", "secret", "--budget-scale", "100", "--warmup", "2"])
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    assert code == 0
    assert report["offered"] == 20
    assert report["useful"] == 1.0
    assert "on time" in out
    assert "send lag" in out
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 20
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 20
    assert all("authorization: bearer secret" in top.lower() for top in server.headers)
    assert "secret" not in out
    with running(stream_answer) as server:
        replay = [
            "--server",
            server.url,
            "--trace",
            str(tmp_path / "t.jsonl"),
            "--closed",
            "2",
            "--json",
            "--warmup",
            "0",
        ]
        assert main(["bench", *replay, "--dialect", "openai", "--patience", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0])["closed"] == 2


@pytest.mark.parametrize(
    "flags",
    [
        ["--rate", "5"],
        ["--server", "nowhere"],
        ["--server", "http://127.0.0.1:9"],
        ["--server", "http://127.0.0.1:9", "--workload", "none"],
        ["--server", "http://127.0.0.1:9", "--arrivals", "sometimes"],
        ["--server", "http://127.0.0.1:9", "--rate", "0"],
        ["--server", "http://127.0.0.1:9", "--rate", "nan"],
        ["--server", "http://127.0.0.1:9", "--budget-scale", "-1"],
        ["--server", "http://127.0.0.1:9", "--requests", "0"],
        ["--server", "http://127.0.0.1:9", "--trace", "none.jsonl"],
        ["--server", "http://127.0.0.1:9", "--save-trace", "/no/such/folder/x", "--requests", "1"],
    ],
)
def test_refusals_are_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *flags]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("haomiao: ")


def test_a_server_that_answers_nothing_is_said_to(capsys: pytest.CaptureFixture[str]) -> None:
    async def reply(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(whole({"error": {"code": "not_found"}}, 404))

    with running(reply) as server:
        assert main(["bench", "--server", server.url]) == 2
    assert "status 404, not_found" in capsys.readouterr().err


def test_the_mix_of_the_research_note_stands() -> None:
    shares = {kind.name: (kind.share, kind.budget_ms, kind.max_tokens) for kind in BUILT_IN["mixed"].classes}
    assert shares["choice"] == (0.60, 150, 1)
    assert shares["extract"] == (0.25, 600, 16)
    assert shares["chat"] == (0.10, 3000, 64)
    assert shares["summary"][:2] == (0.05, 15000)
