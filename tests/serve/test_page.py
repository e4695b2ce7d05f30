"""The page at `/`: its files and headers, and the page itself in a real Chromium, used as a person uses it."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from haomiao.serve.site import FOLDER, files
from tests.serve import chromium
from tests.serve.conftest import Running

READY = "document.getElementById('status').dataset.state === 'ready'"
AHEAD = "/\\d+ tokens read ahead/.test(document.getElementById('ahead').textContent)"
ANSWERED = (
    "document.getElementById('answer').getAttribute('aria-busy') === 'false'"
    " && !document.getElementById('outcome').hidden && document.querySelectorAll('#answer .token').length > 0"
)


# ---- files --------------------------------------------------------------------------------------------------------


def test_the_page_and_its_files_are_served_without_a_key(start: Callable[..., Running]) -> None:
    server = start(api_keys=("secret",), wait=False)
    reply = server.http.get("/")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    for name in files():
        found = server.http.get(f"/page/{name}")
        assert found.status_code == 200
        assert found.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in found.headers["content-security-policy"]
    again = server.http.get("/", headers={"if-none-match": reply.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert server.http.get("/v1/models").status_code == 401


@pytest.mark.parametrize("name", ["..%2fapp.py", "%2e%2e/site.py", "none.js", "index.html%00", "../site.py", ""])
def test_nothing_else_is_served(start: Callable[..., Running], name: str) -> None:
    server = start(wait=False)
    reply = server.http.get(f"/page/{name}")
    assert reply.status_code in (404, 405)
    assert reply.json()["error"]["code"] == "not_found"
    assert server.http.post("/").status_code == 405


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8")
        outside = [url for url in re.findall(r"https?://[^\s\"')>]+", text) if not url.startswith("http://www.w3.org/")]
        assert not outside
        assert "innerHTML" not in text
        assert not re.search(r"<[^>]*\s(style|on\w+)=", text)


def test_both_languages_say_the_same() -> None:
    text = (FOLDER / "words.js").read_text(encoding="utf-8")
    english, chinese = (re.findall(r'(\w+): ["{]', part) for part in re.split(r"\n  zh: ", text)[:2])
    english = english[english.index("skip") :]
    assert [name for name in english if name not in chinese] == []
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    used = set(re.findall(r'data-(?:say|placeholder)="(\w+)"', page))
    assert not used - set(english)


# ---- in a browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    path = chromium.find()
    if path is None:
        pytest.skip("no Chromium is installed (HAOMIAO_CHROMIUM names one)")
    opened = chromium.Browser(path, tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


@pytest.fixture
def tab(browser: chromium.Browser) -> Iterator[chromium.Tab]:
    opened = browser.tab()
    opened.look(1280, 1000)
    yield opened
    opened.close()


def text_of(tab: chromium.Tab, name: str) -> str:
    return str(tab.js(f"document.getElementById('{name}').textContent"))


def slide(tab: chromium.Tab, value: int) -> None:
    tab.js(
        f"(() => {{ const slider = document.getElementById('budget'); slider.value = {value};"
        " slider.dispatchEvent(new Event('input')); })()"
    )


def test_type_slide_ask_and_read_the_receipt(live: Running, tab: chromium.Tab) -> None:
    tab.open(live.url + "/")
    tab.wait(READY)
    assert tab.js("document.activeElement.id") == "prompt"  # one can type at once
    tab.type("Once upon a time")
    tab.wait(AHEAD)
    slide(tab, 99)
    assert text_of(tab, "budget-text") == "10 s"
    tab.press("Enter", 13)
    tab.wait(ANSWERED)
    receipt = tab.js(
        "Object.fromEntries([...document.querySelectorAll('#receipt dd')]"
        ".map(each => [each.dataset.name, each.textContent]))"
    )
    assert receipt["outcome"] in ("in time", "in time, at a lower point")
    assert receipt["budget_ms"] == "10 s"
    assert int(receipt["cached_tokens"]) >= int(receipt["prompt_tokens"]) - 2  # it was read ahead
    points = tab.js("[...document.querySelectorAll('#answer .token')].map(each => each.dataset.point)")
    assert points and set(points) <= {"int8", "int4"}
    assert tab.js("document.querySelectorAll('#timeline rect').length") == 3
    assert tab.js("document.querySelectorAll('#latency circle').length") == 1
    assert tab.js("document.querySelectorAll('#error circle').length") == 1
    assert "10 s" in tab.js("document.getElementById('timeline').getAttribute('aria-label')")
    tab.wait("document.querySelectorAll('#server dd').length >= 6")
    assert tab.js("document.getElementById('prompt').value") == "Once upon a time"  # to be asked again
    tab.wait(AHEAD)
    tab.js("document.getElementById('send').click()")
    tab.wait("document.querySelectorAll('#latency circle').length === 2")
    assert tab.problems == []
    assert not [url for url in tab.requested if not url.startswith((live.url, live.url.replace("http", "ws")))]


def test_a_budget_that_is_too_short_is_said_to_be(live: Running, tab: chromium.Tab) -> None:
    tab.open(live.url + "/")
    tab.wait(READY)
    tab.type("The sea")
    tab.js("document.getElementById('max-tokens').value = 2000")
    slide(tab, 0)
    assert text_of(tab, "budget-text") == "5 ms"
    tab.press("Enter", 13)
    tab.wait("!document.getElementById('outcome').hidden")
    assert text_of(tab, "outcome") in ("cut to fit", "refused", "late", "failed")
    slide(tab, 100)
    assert text_of(tab, "budget-text") == "none"
    assert tab.problems == []


def test_typing_during_an_answer_ends_it(start: Callable[..., Running], tab: chromium.Tab) -> None:
    server = start(pause=0.05)
    tab.open(server.url + "/")
    tab.wait(READY)
    tab.type("Tell me")
    tab.js("document.getElementById('max-tokens').value = 5000")
    tab.press("Enter", 13)
    tab.wait("document.querySelectorAll('#answer .token').length > 2")
    tab.js("document.getElementById('prompt').focus()")
    tab.type(" more")
    tab.wait("document.getElementById('outcome').textContent === 'stopped'")
    tab.press("Enter", 13)
    tab.wait("!document.getElementById('stop').hidden && document.querySelectorAll('#answer .token').length > 0")
    tab.js("document.getElementById('stop').click()")
    tab.wait("document.getElementById('stop').hidden")
    assert tab.problems == []


def test_chinese_dark_still_and_on_a_phone(live: Running, tab: chromium.Tab) -> None:
    tab.look(360, 740, dark=True, still=True, phone=True)
    tab.open(live.url + "/")
    tab.wait(READY)
    tab.js("document.getElementById('lang-zh').click()")
    assert text_of(tab, "answer-title") == "答复"
    assert tab.js("document.documentElement.lang") == "zh-CN"
    assert tab.js("document.documentElement.scrollWidth <= 360")  # nothing sticks out
    tab.js("document.getElementById('prompt').focus()")
    tab.type("从前有一个👩‍🚀女孩")
    tab.wait("/已预读 \\d+ 个词元/.test(document.getElementById('ahead').textContent)")
    tab.press("Enter", 13)
    tab.wait(ANSWERED)
    assert tab.js("getComputedStyle(document.querySelector('#answer .token')).animationName") == "none"
    assert tab.js("document.documentElement.scrollWidth <= 360")
    tab.open(live.url + "/?again")
    tab.wait(READY)
    assert text_of(tab, "answer-title") == "答复"  # the choice is kept
    tab.js("document.getElementById('lang-en').click()")
    assert tab.problems == []


@pytest.mark.parametrize("dark", [False, True])
def test_contrast(live: Running, tab: chromium.Tab, dark: bool) -> None:
    tab.look(1280, 1000, dark=dark)
    tab.open(live.url + "/")
    tab.wait(READY)
    pairs = [
        ("ink", "card"),
        ("soft", "card"),
        ("soft", "paper"),
        ("accent", "card"),
        ("accent-ink", "accent"),
        ("warn", "card"),
    ]
    for one, other in pairs:
        colours = [
            tab.js(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}')") for name in (one, other)
        ]
        assert contrast(*colours) >= 4.5, f"{one} on {other}"  # WCAG 2.2, 1.4.3


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG."""

    def luminance(colour: str) -> float:
        channels = [int(colour.strip()[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_everything_has_a_name_and_can_be_reached_by_keys(live: Running, tab: chromium.Tab) -> None:
    tab.open(live.url + "/")
    tab.wait(READY)
    tab.js("document.querySelector('details').open = true")
    tab.type("x")
    wanted = {"textbox", "button", "slider", "combobox", "spinbutton", "link"}
    named: dict[str, list[Any]] = {}
    for node in tab.nodes():
        role = node.get("role", {}).get("value")
        if role in wanted and not node.get("ignored"):
            named.setdefault(role, []).append(node.get("name", {}).get("value"))
    assert not [role for role, names in named.items() if not all(names)]
    assert named["slider"] == ["Budget"]
    reached = []
    tab.js("document.getElementById('lang-en').focus()")
    for _ in range(14):
        tab.press("Tab", 9)
        reached.append(tab.js("document.activeElement.id || document.activeElement.tagName"))
    for name in ("prompt", "budget", "max-tokens", "on-budget", "send", "answer"):
        assert name in reached
    tab.js("document.getElementById('budget').focus()")
    before = text_of(tab, "budget-text")
    tab.press("ArrowRight", 39)
    assert text_of(tab, "budget-text") != before
    assert tab.js("document.getElementById('budget').getAttribute('aria-valuetext')") == text_of(tab, "budget-text")


def test_a_server_with_a_key_asks_for_it(start: Callable[..., Running], tab: chromium.Tab) -> None:
    server = start(api_keys=("let-me-in",))
    tab.open(server.url + "/")
    tab.wait("!document.getElementById('key-form').hidden")
    tab.js("document.getElementById('key').focus()")
    tab.type("wrong")
    tab.press("Enter", 13)
    tab.wait("!document.getElementById('problem').hidden")
    tab.js("document.getElementById('key').value = 'let-me-in'")
    tab.press("Enter", 13)
    tab.wait(READY)
    assert tab.js("document.getElementById('key-form').hidden")
    assert tab.js("localStorage.getItem('haomiao-key')") is None  # in this tab only


def test_the_page_goes_on_after_a_crash_of_the_engine(start: Callable[..., Running], tab: chromium.Tab) -> None:
    server = start()
    tab.open(server.url + "/")
    tab.wait(READY)
    tab.js("document.getElementById('max-tokens').value = 3")
    tab.type("Hello")
    os.kill(server.service.supervisor.pid or 0, signal.SIGKILL)
    until = time.monotonic() + 30
    while not (server.service.supervisor.crashes and server.service.is_ready) and time.monotonic() < until:
        time.sleep(0.02)
    tab.press("Enter", 13)
    tab.wait(ANSWERED)
    assert text_of(tab, "answer").endswith(" w0 w1 w2")


def test_screenshots_can_be_taken(live: Running, tab: chromium.Tab, tmp_path: Path) -> None:
    tab.open(live.url + "/")
    tab.wait(READY)
    tab.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
