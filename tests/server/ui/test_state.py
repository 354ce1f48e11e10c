"""What the page says of a server that loads, dies, or wants a key."""

from __future__ import annotations

from playwright.sync_api import expect

from pippin.config import ServerConfig
from tests.server.conftest import Running
from tests.server.speaker import speaking
from tests.server.ui.page import ANSWERS, Open


def test_a_server_that_dies_is_told_of(open_page: Open) -> None:
    with speaking(ANSWERS, seconds=0.01) as running:
        here = open_page(running)
        here.send("long")
        expect(here.answer.locator(".content")).to_contain_text("Once")
        running.loop.call_soon_threadsafe(running.client._on_end, "the engine process died")
        expect(here.answer.locator(".error")).to_contain_text("the engine process died")
        expect(here.page.locator("#notice")).to_contain_text("engine process died")
        assert "Once" in here.answer.locator(".content").inner_text()
        here.page.close()
        here.said.clear()


def test_loading_is_shown(speaker: Running, open_page: Open) -> None:
    here = open_page(speaker)
    body = {"error": {"message": "the model is still loading (load, 40 %)"}}
    here.page.route("**/pippin/stats", lambda route: route.fulfill(status=503, json=body))
    here.page.reload()
    expect(here.page.locator("#notice")).to_have_text("The model is still loading (load, 40 %)")
    here.page.unroute("**/pippin/stats")
    expect(here.page.locator("#notice")).to_be_hidden()
    here.said.clear()


def test_a_key_is_asked_for(open_page: Open) -> None:
    with speaking({}, config=ServerConfig(api_key="sesame")) as running:
        here = open_page(running)
        expect(here.page.locator("#key")).to_be_visible()
        here.page.fill("#key-value", "sesame")
        here.page.press("#key-value", "Enter")
        expect(here.page.locator("#model")).to_have_text("fake")
        assert here.sent("x") == "Hello."
        here.page.close()
        here.said.clear()
