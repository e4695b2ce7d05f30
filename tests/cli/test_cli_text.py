"""Pieces of the command line that print and parse: receipts, tables, token ids, estimates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haomiao.cli.detokenize import parse_ids
from haomiao.cli.doctor import estimates
from haomiao.cli.terminal import human_bytes, receipt_line, table, write_json
from haomiao.errors import InputError


@given(st.lists(st.integers(0, 2**31 - 1), max_size=20), st.sampled_from([" ", ",", ", ", "\n"]))
def test_ids_in_every_form(ids: list[int], separator: str) -> None:
    joined = separator.join(map(str, ids))
    assert parse_ids(joined) == ids
    assert parse_ids(f"[{joined}]\n") == ids
    assert parse_ids(f'{{"token_ids": {ids}, "count": {len(ids)}}}') == ids


@pytest.mark.parametrize(
    "text",
    [
        "1 two",
        "-1",
        "1.5",
        "{",
        '{"ids": [1]}',
        '{"token_ids": [-1]}',
        '{"token_ids": [true]}',
        "9" * 30,
        "٣",
        "{" * 9999,
    ],
)
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_ids(text)


def test_receipt_with_a_budget() -> None:
    line = receipt_line(
        {
            "outcome": "met_lower_point",
            "budget_ms": 50.0,
            "total_ms": 48.25,
            "completion_tokens": 1,
            "ttft_ms": 48.0,
            "schedule": [{"point": "int8"}, {"point": "int4"}, {"point": "int8"}],
            "estimated_error": 0.0123,
        }
    )
    assert line == (
        "[met_lower_point (48.2 of 50 ms) · 1 token · ttft 48.0 ms · point int8+int4 · error 0.0123 nats/token]"
    )


def test_an_empty_receipt_is_still_a_line() -> None:
    assert receipt_line({}) == "[no budget · 0 tokens · error not measured]"


def test_table_aligns() -> None:
    assert table(("a", "b"), [("long", "1"), ("x", "22")]) == "a      b\nlong   1\nx     22"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e6, "2.5 MB"), (7e12, "7000.0 GB")]
)
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


def test_json_never_holds_what_json_has_no_form_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError):
        write_json({"x": float("nan")})
    write_json({"毫秒": 1})
    assert capsys.readouterr().out == '{"毫秒": 1}\n'


def test_estimates_are_the_ceilings_over_bytes_and_operations() -> None:
    rows = {(row["model"], row["point"]): row for row in estimates(read_gb_s=10.0, int8_gops=1000.0)}
    assert len(rows) == 6
    seven = rows["llama-2-7b", "int8"]
    assert seven["decode_tok_s"] * seven["weights_gb"] == pytest.approx(10.0)
    assert rows["llama-2-7b", "int4"]["decode_tok_s"] > seven["decode_tok_s"]
    assert rows["llama-2-7b", "int4"]["prefill_tok_s"] == seven["prefill_tok_s"]
