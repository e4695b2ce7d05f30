"""The engine's side of the connection, in this process: messages in, messages out."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from haomiao.errors import BudgetError
from haomiao.serve.engine_loop import EngineLoop
from haomiao.serve.messages import Cancel, Constraint, Done, Hello, Open, Refused, Submit, Token
from haomiao.types import SamplingParams


class Loop:
    """A loop on a thread, and what it said."""

    def __init__(self, **options: Any) -> None:
        self.said: list[Any] = []
        self._news = threading.Condition()
        self.loop = EngineLoop(Open(options={"threads": 1, **options}), self._send)
        self._thread = threading.Thread(target=self.loop.run)
        self._thread.start()

    def _send(self, *messages: Any) -> None:
        with self._news:
            self.said += messages
            self._news.notify_all()

    def ask(self, request: Submit) -> list[Any]:
        """Everything that is said about a request until it has ended."""
        self.loop.take(request)
        return self.end_of(request.id)

    def end_of(self, request_id: int) -> list[Any]:
        def found() -> list[Any]:
            return [message for message in self.said if getattr(message, "id", None) == request_id]

        with self._news:
            ended = self._news.wait_for(lambda: any(isinstance(each, (Done, Refused)) for each in found()), 30)
            assert ended
            return found()

    def close(self) -> None:
        self.loop._closed = True
        self.loop._wake.set()
        self._thread.join(10)
        self.loop.close()


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


def submit(request_id: int, **fields: Any) -> Submit:
    return Submit(id=request_id, token_ids=fields.pop("token_ids", [5, 6, 7]), arrival_ns=1, **fields)


def test_it_says_what_it_loaded(loop: Loop) -> None:
    (hello,) = [message for message in loop.said if isinstance(message, Hello)]
    assert hello.points == ["int8", "int4"] and hello.max_request_tokens <= hello.max_context
    assert hello.step_seconds > 0


def test_an_answer(loop: Loop) -> None:
    *tokens, done = loop.ask(submit(1, sampling=SamplingParams(max_tokens=5, ignore_eos=True)))
    assert isinstance(done, Done) and done.finish_detail == "max_tokens"
    assert sum(len(token.token_ids) for token in tokens if isinstance(token, Token)) == 5
    assert done.receipt.completion_tokens == 5


@pytest.mark.parametrize(
    ("kind", "value", "texts"),
    [
        ("regex", "yes|no|maybe", ["yes", "no", "maybe"]),
        ("choice", ["是", "否"], ["是", "否"]),
        ("json_schema", {"enum": ["a", 1]}, ['"a"', "1"]),
        (
            "json_schema",
            {
                "type": "object",
                "properties": {"sure": {"type": "boolean"}, "mood": {"const": "good"}},
                "required": ["sure", "mood"],
                "additionalProperties": False,
            },
            ['{"sure":true,"mood":"good"}', '{"sure":false,"mood":"good"}'],
        ),
    ],
)
def test_few_answers_are_chosen_among_when_there_is_no_time(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, kind: str, value: Any, texts: list[str]
) -> None:
    """Its text comes as tokens, as if it had been generated, and is the likeliest of all that the constraint allows."""
    engine, tokenizer = loop.loop.engine, loop.loop._llm.requests.need_tokenizer()
    admit = engine.budgets.admit

    def no_time_to_generate(job: Any, now: int) -> None:
        if job.request.work == "generate":
            raise BudgetError("no time", predicted_ms=1e6)
        admit(job, now)

    monkeypatch.setattr(engine.budgets, "admit", no_time_to_generate)
    now, number = time.monotonic_ns(), 500 + hash(str(value)) % 100_000
    fields = {"constraint": Constraint(kind=kind, text=json.dumps(value)), "deadline_ns": now + 60_000_000_000}
    *tokens, done = loop.ask(submit(number, sampling=SamplingParams(max_tokens=40), **fields))
    assert isinstance(done, Done) and done.finish_detail == "single_prefill" and done.finish_reason == "stop"
    told = [id_ for token in tokens for id_ in token.token_ids]
    options = [tokenizer.encode_part(text, False) for text in texts]
    scored = loop.ask(submit(number + 1, work="choose", options=options, deadline_ns=fields["deadline_ns"]))[-1]
    best = max(range(len(texts)), key=scored.scores.__getitem__)
    assert told == options[best] and "".join(token.text for token in tokens) == texts[best]
    assert done.receipt.completion_tokens == len(told) and done.scores is None
    assert loop.loop._jobs == {} and loop.loop._ids == {}
    several = SamplingParams(max_tokens=40, n=2)
    assert isinstance(loop.ask(submit(number + 2, sampling=several, **fields))[-1], Refused)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"token_ids": []}, "invalid_value"),
        ({"token_ids": [1 << 30]}, "invalid_value"),
        ({"constraint": Constraint(kind="regex", text='"("')}, "invalid_constraint"),
        ({"constraint": Constraint(kind="magic", text='"x"')}, "invalid_constraint"),
        ({"point": "full"}, "invalid_value"),
        ({"sampling": SamplingParams(max_tokens=1 << 20)}, "context_length_exceeded"),
    ],
)
def test_refusals_name_their_code(loop: Loop, fields: dict[str, Any], code: str) -> None:
    number = 100 + hash(str(fields)) % 100_000
    (refused,) = loop.ask(submit(number, **fields))
    assert isinstance(refused, Refused) and refused.code == code
    assert refused.exception().code == code


def test_33_no_memory_for_a_step(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request that the machine has no memory for is shed with 503; the next one is served."""

    def fail(batch: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(loop.loop.engine.executor, "step", fail)
        (refused,) = loop.ask(submit(2, sampling=SamplingParams(max_tokens=2)))
    assert refused.exception().status == 503 and refused.code == "kv_exhausted"
    assert isinstance(loop.ask(submit(3, sampling=SamplingParams(max_tokens=2)))[-1], Done)
    loop.loop.engine.check_integrity()


def test_cancelled_requests_hold_nothing(loop: Loop) -> None:
    loop.loop.take(submit(4, sampling=SamplingParams(max_tokens=1500, ignore_eos=True)))
    loop.loop.take(Cancel(id=4))
    last = loop.end_of(4)[-1]
    assert isinstance(last, Refused) and last.code == "cancelled"
    assert loop.loop.stats().running == 0
    assert loop.loop._jobs == {} and loop.loop._ids == {}


def test_a_limit_on_the_live_error_keeps_the_throttle_off_a_point() -> None:
    watched = Loop(max_kl=1e-9, monitor_rate=1.0)
    try:
        low = submit(1, sampling=SamplingParams(max_tokens=60, ignore_eos=True), point="int4")
        done = watched.ask(low)[-1]
        assert isinstance(done, Done) and done.receipt.step_kl is not None and done.receipt.step_kl > 1e-9
        gauges: dict[str, float] = {}
        patience = time.monotonic() + 30  # steps are run again in spare time, and gauges are renewed now and then
        for number in itertools.count(100):
            watched.loop._gauged = -1e9
            again = SamplingParams(max_tokens=60, ignore_eos=True)
            watched.ask(submit(number, sampling=again, point="int4"))
            gauges = dict(watched.loop.stats().gauges)
            if gauges.get("point_forbidden_int4") == 1 or time.monotonic() > patience:
                break
        assert gauges["point_forbidden_int4"] == 1 and gauges["point_forbidden_int8"] == 0 and gauges["max_kl"] == 1e-9
        assert gauges["live_step_kl_int4"] > 1e-9 and gauges["live_step_kl_int4_samples"] >= 32
        assert 0 <= gauges["live_step_kl_int4_top1"] <= 1
        now = time.monotonic_ns()
        hurried = Submit(
            id=3,
            token_ids=[5, 6, 7],
            sampling=SamplingParams(max_tokens=500, ignore_eos=True),
            arrival_ns=now,
            deadline_ns=now + 60_000_000,
        )
        end = watched.ask(hurried)[-1]
        assert isinstance(end, (Done, Refused)) and end.receipt is not None
        assert {entry.point for entry in end.receipt.schedule} <= {"int8"}, "a budget lowers nobody to that point"
    finally:
        watched.close()
