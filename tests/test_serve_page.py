"""The page in a real browser: typing, streams side by side, stopping, errors; and nothing that is said becomes markup."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pytest
import serving
from playwright.sync_api import Browser, Page, expect, sync_playwright
from serving import Served

from qaperso import reply

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import newcomer  # noqa: E402

EVIL = "<script>window.evil = 1</script><img src=x onerror='window.evil = 1'>"
ASKED = "what do i still owe?"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        path = newcomer.browser_path(playwright)
        if path is None:
            pytest.skip(
                f"no browser: none of {', '.join(newcomer.NAMES)} is on PATH, nor is playwright's own installed"
            )
        found = playwright.chromium.launch(executable_path=path, args=newcomer.OPTIONS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("page") / "town"
    with serving.serving(folder) as found:
        yield found


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    """The page, opened; whatever its policy or its script complains of is an error."""
    found = browser.new_page()
    complaints: list[str] = []
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on("console", lambda said: complaints.append(said.text) if "Content Security Policy" in said.text else None)
    found.goto(served.base)
    expect(found.locator("#main")).to_be_visible()
    yield found
    assert complaints == [] and found.evaluate("window.evil") is None
    found.close()


def slowed(served: Served, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.1) -> None:
    """A token a step, and a pause before it."""
    step = served.service.engine._batcher.step
    monkeypatch.setattr(served.service.engine._batcher, "step", lambda tokens: time.sleep(seconds) or step(1))


def alone(served: Served, querier: str, tokens: int) -> str:
    return served.chat(ASKED, user=querier, max_tokens=tokens)[1]["choices"][0]["message"]["content"]


def test_the_newcomer_s_way_ends_with_a_reply(browser: Browser, served: Served) -> None:
    page = browser.new_page(viewport=newcomer.SIZE)
    newcomer.ask(page, served.base)
    assert any(page.locator("article .text").all_text_contents())
    found = newcomer.shown(page)
    assert list(found) == ["to tilda", "to harald", "to anselm", "to a stranger"]
    assert found["to tilda"] == alone(served, "tilda", 32)
    page.close()


def state(page: Page) -> dict[str, list[str]]:
    return parse_qs(page.url.split("#")[1])


def test_replies_stream_side_by_side(page: Page, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {who: alone(served, who, 12) for who in (*served.service.run.registry.queriers[:3], "stranger")}
    slowed(served, monkeypatch)
    expect(page.locator("h1")).to_have_text("maren")
    page.locator("#length").fill("12")
    page.keyboard.press("Tab")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    page.keyboard.type(ASKED)
    page.keyboard.press("Enter")
    cards = page.locator("article")
    expect(cards).to_have_count(4)
    # All of them are being written at one time.
    serving.wait(lambda: sum(map(bool, page.locator(".live .text").all_text_contents())) == 4, 30)
    expect(page.locator(".live")).to_have_count(0, timeout=15_000)
    for card in cards.all():
        who = card.locator("h2").inner_text().removeprefix("to ").removeprefix("a ")
        assert card.locator(".text").text_content() == expected[who]
        expect(card.locator(".status")).to_contain_text("tokens")
    found = state(page)
    assert found["q"] == [ASKED] and found["n"] == ["12"] and set(found["as"]) == set(expected)


def test_the_address_is_the_state(page: Page, browser: Browser, served: Served) -> None:
    page.locator("#query").fill("good day & <b>")
    page.locator("#temperature").fill("0.7")
    page.locator("#people input[value=tilda]").check(force=True)
    page.locator("#map g[data-name=agnes]").press("Enter")
    found = state(page)
    assert found["q"] == ["good day & <b>"] and found["t"] == ["0.7"]
    assert "tilda" in found["as"] and "agnes" not in found["as"]
    other = browser.new_page()
    other.goto(page.url)
    expect(other.locator("#query")).to_have_value("good day & <b>")
    expect(other.locator("#temperature")).to_have_value("0.7")
    expect(other.locator("#people input[value=tilda]")).to_be_checked()
    expect(other.locator("#people input[value=agnes]")).not_to_be_checked()
    expect(other.locator("#map g[data-name=tilda]")).to_have_attribute("aria-checked", "true")
    # An address that somebody made up is read as far as it makes sense.
    other.goto(served.base + "/#as=nobody&t=hot&n=99999&q=" + "x")
    other.reload()
    expect(other.locator("#length")).to_have_value("32")
    expect(other.locator("#people input:checked")).to_have_count(0)
    other.close()


def test_stopping(page: Page, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(served, monkeypatch, 0.2)
    before = served.metric("qaperso_cancelled_total")
    page.locator("#query").fill(ASKED)
    page.locator("#ask").click()
    serving.wait(lambda: sum(map(bool, page.locator(".live .text").all_text_contents())) == 4, 30)
    page.locator("article button").first.click()
    expect(page.locator("article .status").first).to_have_text("stopped")
    expect(page.locator(".live")).to_have_count(3)
    page.keyboard.press("Escape")
    expect(page.locator(".live")).to_have_count(0)
    expect(page.locator("#stop")).to_be_disabled()
    serving.wait(lambda: served.metric("qaperso_cancelled_total") == before + 4)
    assert all(len(text) > 0 for text in page.locator("article .text").all_text_contents())


def test_nothing_that_is_said_is_markup(page: Page, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    name, roster = "<img src=x onerror='window.evil = 1'>", served.service.roster
    vector = np.zeros(served.service.run.setting.model.embed, np.float32)
    roster.add(roster.person(name, roster.reserve(name), vector, ()))
    try:
        monkeypatch.setattr(reply, "decode", lambda run, tokens: EVIL[: 10 * len(tokens)])
        page.reload()
        page.locator(f"#people input[value={json.dumps(name)}]").check(force=True)
        page.locator("#query").fill(EVIL)
        page.locator("#query").press("Enter")
        expect(page.locator("article")).to_have_count(5)
        expect(page.locator(".live")).to_have_count(0, timeout=15_000)
        assert page.locator("article .text").all_text_contents() == [EVIL] * 5
        assert name in " ".join(page.locator("article h2").all_text_contents())
        assert page.locator("article img, article script, #map img, #people img").count() == 0
    finally:
        served.ask("DELETE", "/v1/queriers/" + "".join(f"%{b:02x}" for b in name.encode()))


def test_errors_are_shown(page: Page, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    page.locator("#ask").click()
    expect(page.locator("#notice")).to_have_text("Type a question first.")
    page.locator("#query").fill("bread " * 60)
    page.locator("#ask").click()
    expect(page.locator("article .status.bad").first).to_contain_text("a query is longer than")
    # A busy server is asked again.
    page.locator("#query").fill(ASKED)
    monkeypatch.setattr(served.service, "_admitted", 8)
    page.locator("#ask").click()
    expect(page.locator("article .status").first).to_contain_text(re.compile("busy; asks again in 1?[0-9] s"))
    monkeypatch.setattr(served.service, "_admitted", 0)
    expect(page.locator("article .status").first).to_contain_text("tokens", timeout=15_000)
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.locator("#ask").click()
    expect(page.locator("article .status.bad").first).to_have_text("the connection was lost")
    for _ in range(4):
        page.locator("#people input:checked").first.uncheck(force=True)
    page.locator("#ask").click()
    expect(page.locator("#notice")).to_have_text("Pick somebody who asks.")


def test_a_key_is_asked_for(browser: Browser, tmp_path: Path) -> None:
    key = "sk-limited-0123456789"
    with serving.serving(tmp_path / "town", keys={key: frozenset({"tilda"})}) as served:
        page = browser.new_page()
        page.goto(served.base)
        expect(page.locator("#unlock")).to_be_visible()
        page.locator("#key").fill("sk-wrong-0123456789")
        page.keyboard.press("Enter")
        expect(page.locator("#notice")).to_have_text("That key is not known.")
        page.locator("#key").fill(key)
        page.keyboard.press("Enter")
        expect(page.locator("#people label")).to_have_count(2)
        assert key not in page.url
        page.close()


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (360, "light")])
def test_it_fits_screens_and_schemes(browser: Browser, served: Served, width: int, scheme: Any) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(f"{served.base}/#q={ASKED}&as=tilda&as=agnes&as=stranger&n=8")
    page.locator("#ask").click()
    expect(page.locator("article")).to_have_count(3)
    expect(page.locator(".live")).to_have_count(0, timeout=15_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours]
    assert (light[0] > light[1]) == (scheme == "light")
    boxes = [page.locator(part).bounding_box() for part in ("#form", "#who", "#replies", "#map")]
    below = [boxes[i]["y"] + boxes[i]["height"] <= boxes[i + 1]["y"] for i in (0, 1, 2)]
    assert below == ([True] * 3 if width < 800 else [False, True, False])
    page.close()
