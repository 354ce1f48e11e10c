"""The dashboard moves with what the server does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import expect

from tests.server.conftest import Running
from tests.server.ui.page import Open
from tests.waiting import until


def test_the_dashboard_moves(slow: Running, open_page: Open) -> None:
    here = open_page(slow, "/#dashboard")
    until(lambda: here.tile("Running") == "0")
    with several(slow, 3):
        until(lambda: here.tile("Running") == "3")
        until(lambda: int(here.tile("Tokens/s").replace(",", "")) > 20)
        live = here.page.locator("#requests tr.live")
        expect(live).to_have_count(3)
        longer = here.page.evaluate("document.querySelector('#requests .live .decode').getBoundingClientRect().width")
        assert longer > 0
    until(lambda: here.tile("Running") == "0")
    row = here.page.locator("#requests tbody tr").first
    bar = row.locator(".phases")
    assert re.search(r"queue .*, prefill .*, decode ", bar.get_attribute("aria-label") or "")
    widths = bar.evaluate("e => [...e.children].map(x => x.offsetWidth / e.offsetWidth)")
    assert sum(widths) <= 1.01
    points = here.page.locator("polyline.line0").first.get_attribute("points") or ""
    heights = {y for _, y in (p.split(",") for p in points.split())}
    assert len(heights) > 2


@contextmanager
def several(running: Running, number: int) -> Iterator[None]:
    """Streams that run until the block ends."""
    with running.openai() as ai:
        streams = [
            ai.chat.completions.create(model="m", messages=[{"role": "user", "content": "long"}], stream=True)
            for _ in range(number)
        ]
        try:
            yield
        finally:
            for stream in streams:
                stream.close()
