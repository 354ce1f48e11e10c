"""How the page is used: keys, names of controls, scrolling, widths, light and dark."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.server.conftest import Running
from tests.server.ui.page import Open
from tests.waiting import until


def test_keys(slow: Running, open_page: Open) -> None:
    here = open_page(slow)
    press = here.page.keyboard.press
    expect(here.page.locator("#prompt")).to_be_focused()
    here.page.keyboard.type("one")
    press("Shift+Enter")
    here.page.keyboard.type("think")
    press("Enter")
    expect(here.page.locator(".user .text")).to_have_text("one\nthink")
    press("Escape")
    here.ended()
    here.page.locator("nav a").last.focus()
    press("Enter")
    expect(here.page.locator("#dashboard")).to_be_visible()
    press("/")
    expect(here.page.locator("#prompt")).to_be_focused()
    assert here.page.input_value("#prompt") == ""
    press("Alt+s")
    expect(here.page.locator("#settings")).to_be_visible()
    press("Escape")
    expect(here.page.locator("#settings")).to_be_hidden()
    press("Alt+n")
    expect(here.page.locator(".message")).to_have_count(0)
    expect(here.page.locator("#empty")).to_be_visible()


def test_every_control_has_a_name(speaker: Running, open_page: Open) -> None:
    here = open_page(speaker)
    here.sent("rich")
    here.page.click("#settings-open")
    nameless = here.page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, a, [role=img]")].filter(e =>
        !(e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim())).map(e => e.outerHTML)"""
    )
    assert nameless == []


def test_who_has_scrolled_up_is_left_there(slow: Running, open_page: Open) -> None:
    here = open_page(slow, viewport={"width": 420, "height": 400})
    here.send("long")
    until(lambda: here.page.evaluate("document.querySelector('#scroll').scrollTop") > 80)
    here.page.evaluate("document.querySelector('#scroll').scrollTop = 0")
    before = here.answer.inner_text()
    until(lambda: len(here.answer.inner_text()) > len(before) + 40)
    assert here.page.evaluate("document.querySelector('#scroll').scrollTop") == 0
    here.page.click("#stop")
    here.ended()


def brightness(color: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", color)[:3])) / 3


def colors(page: Page) -> tuple[float, float]:
    found = page.evaluate("(({backgroundColor, color}) => [backgroundColor, color])(getComputedStyle(document.body))")
    return brightness(found[0]), brightness(found[1])


@pytest.mark.parametrize(("scheme", "other"), [("light", "dark"), ("dark", "light")])
def test_light_and_dark(speaker: Running, open_page: Open, scheme: Any, other: str) -> None:
    here = open_page(speaker, color_scheme=scheme)

    def is_now(name: str) -> bool:
        page, text = colors(here.page)
        return page > 200 > 100 > text if name == "light" else page < 60 < 180 < text

    assert is_now(scheme)
    here.page.click("#theme")
    assert is_now(other)
    here.page.reload()
    assert is_now(other)


def test_nothing_is_wider_than_the_window(speaker: Running, open_page: Open) -> None:
    here = open_page(speaker)
    here.sent("rich")
    here.sent("x" * 200)
    for width in (1100, 390, 320):
        here.page.set_viewport_size({"width": width, "height": 700})
        here.page.goto(f"{speaker.url}/#chat")
        assert too_wide(here.page) == []
        assert here.page.locator("#send").evaluate("e => e.getBoundingClientRect().bottom <= innerHeight")
        here.page.click("#settings-open")
        assert too_wide(here.page) == []
        here.page.click("#settings-close")
        here.page.goto(f"{speaker.url}/#dashboard")
        expect(here.page.locator("#requests tbody tr").first).to_be_visible()
        assert too_wide(here.page) == []


def too_wide(page: Page) -> Any:
    return page.evaluate(
        """() => [document.documentElement, ...document.querySelectorAll("#scroll, #dashboard, dialog[open]")]
        .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.id || e.tagName)"""
    )
