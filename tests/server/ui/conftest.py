"""The web page in headless Chromium, where there is one: nothing is complained of, or fetched from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.server.conftest import Running
from tests.server.speaker import speaking
from tests.server.ui.page import ANSWERS, CHROMIUM, LONG, Open, Watched
from tests.waiting import SECONDS


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: scripts/setup.sh browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def speaker() -> Iterator[Running]:
    with speaking(ANSWERS) as running:
        yield running


@pytest.fixture(scope="package")
def slow() -> Iterator[Running]:
    """Sixty tokens a second: one can see them come."""
    with speaking(ANSWERS, LONG, seconds=0.015) as running:
        yield running


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[Open]:
    """Opens a server's page in a fresh profile. In the end nothing was complained of, or fetched from elsewhere."""
    opened: list[tuple[Running, Watched]] = []

    def opener(running: Running, path: str = "/", **options: Any) -> Watched:
        page = chromium.new_context(**{"viewport": {"width": 1100, "height": 760}} | options).new_page()
        page.set_default_timeout(1000 * SECONDS)
        watched = Watched(page)
        page.on("console", watched.hear)
        page.on("pageerror", lambda error: watched.said.append(str(error)))
        page.on("request", watched.note)
        page.goto(running.url + path)
        opened.append((running, watched))
        return watched

    yield opener
    for running, watched in opened:
        watched.page.context.close()
        assert [url for url in watched.asked if not url.startswith(running.url)] == []
        assert watched.said == []
