"""The chat: what a user does, and what comes of it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from tests.server.conftest import Running
from tests.server.speaker import speaking
from tests.server.ui.page import ANSWERS, LONG, RICH, TOOLS, Open, setting
from tests.waiting import SECONDS, until


@pytest.fixture
def held() -> Iterator[tuple[Running, threading.Event]]:
    """A server that says no more than the first line of RICH until the event is set."""
    opened = threading.Event()
    line = RICH.index("|") + 1
    with speaking(ANSWERS, before=lambda said: said < line or opened.wait(SECONDS)) as running:
        yield running, opened
        opened.set()


def test_send_and_stream(held: tuple[Running, threading.Event], open_page: Open) -> None:
    running, opened = held
    here = open_page(running)
    here.send("rich")
    heading = here.answer.get_by_role("heading", name="Apples")
    expect(heading).to_be_visible()
    assert here.page.locator(".streaming").count() == 1  # it is seen before it is whole
    assert here.page.locator(".assistant td").count() == 0
    opened.set()
    here.ended()
    expect(here.answer.locator("td.align-right")).to_have_text("12")
    expect(here.answer.locator("pre .hljs-keyword").first).to_have_text("def")
    link = here.answer.get_by_role("link")
    assert (link.get_attribute("target"), link.get_attribute("rel")) == ("_blank", "noopener noreferrer nofollow")
    figures = here.answer.locator(".figures").inner_text()
    assert re.search(rf"{len(RICH) + 1} tokens · \d+ tokens/s · first after .* · prompt \d+, 0 cached", figures)


def test_a_beginning_is_offered(speaker: Running, open_page: Open) -> None:
    here = open_page(speaker)
    here.page.get_by_role("button", name="What can you do?").click()
    expect(here.answer.locator(".content")).to_have_text("Hello.")
    here.ended()
    assert here.bodies[0]["messages"] == [{"role": "user", "content": "What can you do?"}]
    expect(here.page.locator("#starters")).to_be_hidden()
    here.page.click("text=New chat")
    expect(here.page.locator("#starters")).to_be_visible()


def test_the_demo_model_answers_and_its_cache_is_shown(demo: Running, open_page: Open) -> None:
    here = open_page(demo)
    assert "42" in here.sent("What is 12 + 30?")
    here.sent("And 2 + 2?")
    cached = re.search(r"prompt (\d+), (\d+) cached", here.answer.locator(".figures").inner_text())
    assert cached
    assert 0 < int(cached[2]) < int(cached[1])
    expect(here.page.locator("#model")).to_have_text("pippin-demo")


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop(slow: Running, open_page: Open, how: str) -> None:
    here = open_page(slow)
    here.send("long")
    expect(here.answer.locator(".content")).to_contain_text("Once upon")
    assert slow.client.live
    here.page.keyboard.press("Escape") if how == "Escape" else here.page.click("#stop")
    here.ended()
    assert here.answer.locator(".figures").inner_text().endswith("stopped")
    words = here.answer.locator(".content").inner_text()
    assert "Once upon" in words
    assert len(words) < len(LONG) / 2
    expect(here.page.locator("#send")).to_be_visible()
    until(lambda: not slow.client.live)
    assert here.answer.locator(".content").inner_text() == words


def test_regenerate_asks_the_same_again(speaker: Running, open_page: Open) -> None:
    here = open_page(speaker)
    here.sent("rich")
    here.sent("think")
    assert here.page.get_by_role("button", name="Regenerate").count() == 1  # of the last answer
    here.page.get_by_role("button", name="Regenerate").click()
    until(lambda: len(here.bodies) == 3)
    here.ended()
    assert here.bodies[2] == here.bodies[1]
    assert here.page.locator(".assistant").count() == 2


def test_edit_a_message(speaker: Running, open_page: Open) -> None:
    here = open_page(speaker)
    here.sent("rich")
    here.sent("think")
    here.page.locator(".user").first.hover()
    here.page.locator(".user").first.get_by_role("button", name="Edit").click()
    assert here.page.input_value("#prompt") == "rich"
    assert here.sent("think") == "Four."
    assert [m["content"] for m in here.bodies[-1]["messages"]] == ["think"]


def test_reasoning_is_shown_apart(slow: Running, open_page: Open) -> None:
    here = open_page(slow)
    here.send("think")
    expect(here.answer.locator("summary")).to_have_text("Thinking…")
    expect(here.answer.locator(".reasoning .text")).to_be_visible()
    here.ended()
    assert here.answer.locator(".content").inner_text() == "Four."
    assert here.answer.locator("summary").inner_text().startswith("Thought for ")
    expect(here.answer.locator(".reasoning .text")).to_be_hidden()
    here.answer.locator("summary").click()
    expect(here.answer.locator(".reasoning .text")).to_have_text("Two and two.")


def test_a_call_and_its_result(speaker: Running, open_page: Open) -> None:
    here = open_page(speaker)
    setting(here, tools=TOOLS)
    assert here.sent("weather") == ""
    expect(here.answer.locator(".call b")).to_have_text("get_weather")
    assert json.loads(here.answer.locator(".call pre").inner_text()) == {"city": "Oslo"}
    here.page.fill(".results textarea", '{"sky": "rain"}')
    here.page.get_by_role("button", name="Send results").click()
    expect(here.answer.locator(".content")).to_have_text("It rains in Oslo.")
    here.ended()
    roles = [m["role"] for m in here.bodies[-1]["messages"]]
    assert roles == ["user", "assistant", "tool"]
    call = here.bodies[-1]["messages"][1]["tool_calls"][0]
    assert here.bodies[-1]["messages"][2]["tool_call_id"] == call["id"]


def test_settings_are_sent_and_kept(speaker: Running, open_page: Open) -> None:
    here = open_page(speaker)
    assert here.sent("x")
    streamed = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    assert here.bodies[0] == {"messages": [{"role": "user", "content": "x"}]} | streamed
    setting(
        here,
        system="Be brief.",
        temperature="0.3",
        top_k="20",
        max_tokens="9",
        stop="END\nFIN",
        thinking="off",
        seed="7",
    )
    here.page.reload()
    assert here.sent("y") == "Hello."
    asked = here.bodies[1]
    assert [m["content"] for m in asked["messages"]] == ["Be brief.", "x", "Hello.", "y"]
    expected = {"temperature": 0.3, "top_k": 20, "max_tokens": 9, "stop": ["END", "FIN"], "seed": 7}
    assert {name: asked[name] for name in expected} == expected
    assert asked["chat_template_kwargs"] == {"enable_thinking": False, "thinking": False}
    here.page.click("#settings-open")
    here.page.click("#settings-reset")
    here.page.click("#settings-close")
    here.sent("z")
    assert set(here.bodies[2]) == {"messages", *streamed}


def test_what_is_wrong_is_said(speaker: Running, open_page: Open) -> None:
    here = open_page(speaker)
    setting(here, temperature="9", tools="[1,")
    here.page.click("#settings-open")
    assert here.page.locator("#fields .wrong").all_inner_texts().count("") >= 10
    here.page.click("#settings-close")
    here.send("x")
    expect(here.page.locator(".error")).to_contain_text("Settings, tools")
    setting(here, tools="[]", stop="\n".join("abcdefgh"), top_p="0.5", top_k="0")
    here.page.click("text=New chat")
    here.send("x")
    expect(here.page.locator(".error")).to_contain_text("top_k")
    here.said.clear()  # the console tells of the 400 too
