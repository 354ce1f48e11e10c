"""The web page in headless Chromium: what a user does, what hostile output can't do, and how it looks."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, expect, sync_playwright

from pippin.config import ServerConfig
from tests.server.conftest import Running
from tests.server.speaker import speaking
from tests.waiting import SECONDS, until

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: scripts/setup.sh browser")

TOOLS = json.dumps([{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}])
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
RICH = """# Apples

| kind | sugar |
|:-----|------:|
| Pippin | 12 |

```python
def seed(n: int) -> str:
    return "pip" * n
```

- **bold**, `code` and [a link](https://example.com/a)"""
LONG = "Once upon a time there was an apple. " * 50
ANSWERS = {
    "rich": RICH,
    "think": "<think>\nTwo and two.\n</think>\n\nFour.",
    "weather": CALL,
    '{"sky": "rain"}': "It rains in Oslo.",
    "long": LONG,
}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def speaker() -> Iterator[Running]:
    with speaking(ANSWERS) as running:
        yield running


@pytest.fixture(scope="module")
def slow() -> Iterator[Running]:
    """Sixty tokens a second: one can see them come."""
    with speaking(ANSWERS, LONG, seconds=0.015) as running:
        yield running


@dataclass
class Watched:
    """A page, with what its console said and where it went."""

    page: Page
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def note(self, request: Request) -> None:
        self.asked.append(request.url)
        if request.url.endswith("/completions"):
            self.bodies.append(request.post_data_json or {})

    def hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.said.append(message.text)

    def send(self, text: str) -> None:
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")

    def sent(self, text: str) -> str:
        """Sends, waits for the end, and returns the answer's words."""
        before = self.page.locator(".assistant").count()
        self.send(text)
        expect(self.page.locator(".assistant")).to_have_count(before + 1)
        self.ended()
        return self.answer.locator(".content").inner_text()

    def ended(self) -> None:
        expect(self.page.locator(".streaming")).to_have_count(0, timeout=1000 * SECONDS)

    @property
    def answer(self) -> Locator:
        return self.page.locator(".assistant").last

    def tile(self, name: str) -> str:
        heading = self.page.get_by_role("heading", name=name, exact=True)
        return self.page.locator(".tile", has=heading).locator("b").inner_text()


expect.set_options(timeout=1000 * SECONDS)

Open = Callable[..., Watched]


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


# --- the chat ---


def test_send_and_stream(slow: Running, open_page: Open) -> None:
    here = open_page(slow)
    here.send("rich")
    heading = here.answer.get_by_role("heading", name="Apples")
    expect(heading).to_be_visible()
    assert here.page.locator(".streaming").count() == 1  # it is seen before it is whole
    assert here.page.locator(".assistant td").count() == 0
    here.ended()
    expect(here.answer.locator("td.align-right")).to_have_text("12")
    expect(here.answer.locator("pre .hljs-keyword").first).to_have_text("def")
    link = here.answer.get_by_role("link")
    assert (link.get_attribute("target"), link.get_attribute("rel")) == ("_blank", "noopener noreferrer nofollow")
    figures = here.answer.locator(".figures").inner_text()
    assert re.search(rf"{len(RICH) + 1} tokens · \d+ tokens/s · first after .* · prompt \d+, 0 cached", figures)


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


def setting(here: Watched, **values: str) -> None:
    here.page.click("#settings-open")
    for name, value in values.items():
        box = here.page.locator(f"#set-{name}")
        box.select_option(value) if box.evaluate("e => e.tagName") == "SELECT" else box.fill(value)
    here.page.click("#settings-close")


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


# --- hostile output ---

HOSTILE: list[str] = json.loads((Path(__file__).parent.parent / "data" / "hostile.json").read_text())
BITS = ["\n", "\n\n", "`", "```", "*", "|", "> ", "- ", "[", "](", ")", "<", ">", "\\", "&#106;avascript:", "\t"]

LOOK = r"""(box) => {
  const tags = "script,img,svg,iframe,object,embed,style,link,meta,base,form,input,details,template,math,video,audio";
  const attributes = /^on|^style$|^id$|^name$|^src|^action$/;
  const ours = /^(hljs|language-|align-|code$|bar$|table$|plain$|copy$|function_$|class_|built_in|inherited__)/;
  const outward = (e) => /^(https?:|mailto:)/.test(e.getAttribute("href")) && e.host !== location.host
    && e.rel === "noopener noreferrer nofollow" && e.target === "_blank";
  return [...box.querySelectorAll("*")].filter((e) => e.matches(tags)
    || [...e.attributes].some((a) => attributes.test(a.name))
    || (e.hasAttribute("href") && !outward(e))
    || [...e.classList].some((name) => !ours.test(name))).map((e) => e.outerHTML);
}"""
HACKED = "void (window.hacked = () => { window.wasHacked = true })"


def test_hostile_answers_stay_words(open_page: Open) -> None:
    """All that markdown and HTML offer, streamed: nothing runs, is fetched, or leads into the server."""
    with speaking({}, "\n\n".join(HOSTILE), seconds=0) as running:
        here = open_page(running)
        here.page.evaluate(HACKED)
        here.page.evaluate("document.addEventListener('securitypolicyviolation', () => { window.violated = true })")
        here.send("x")
        expect(here.page.locator(".assistant")).to_have_count(1)
        here.ended()
        box = here.answer.locator(".content")
        assert "hacked()" in box.inner_text()
        assert box.evaluate(LOOK) == []
        assert here.page.evaluate("[window.wasHacked, window.violated]") == [None, None]
        assert here.page.locator("#prompt").count() == 1
        here.page.close()


def test_no_mixture_of_hostile_pieces_gets_through(speaker: Running, open_page: Open) -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choices([*HOSTILE, *BITS], k=draw.randint(1, 7))) for _ in range(600)]
    here = open_page(speaker)
    here.page.evaluate(HACKED)
    found = here.page.evaluate(
        f"""async (texts) => {{
          const {{ render }} = await import("/ui/markdown.js");
          const look = {LOOK};
          const found = [];
          for (const text of texts) {{
            const box = document.createElement("div");
            box.append(render(text));
            document.body.append(box);
            const seen = look(box);
            if (seen.length) found.push([text, seen]);
            box.remove();
          }}
          return found;
        }}""",
        texts,
    )
    assert found == []
    assert here.page.evaluate("window.wasHacked") is None


def test_hostile_reasoning_and_calls_are_text(open_page: Open) -> None:
    evil = "<img src=x onerror=hacked()>"
    call = json.dumps({"name": "get_weather", "arguments": {"city": evil}})
    with speaking({}, f"<think>\n{evil}\n</think>\n\n<tool_call>\n{call}\n</tool_call>", seconds=0) as running:
        here = open_page(running)
        setting(here, tools=TOOLS)
        here.sent("x")
        assert here.answer.locator("img").count() == 0
        assert evil in (here.answer.locator(".reasoning .text").text_content() or "")
        assert evil in here.answer.locator(".call pre").inner_text()
        here.page.close()


def test_the_policy_stops_what_gets_past(speaker: Running, open_page: Open) -> None:
    """Even a script that is in the page can't be run, nor HTML be made of text."""
    here = open_page(speaker)
    ran = here.page.evaluate(
        """() => {
          const script = document.createElement("script");
          try { script.text = "window.ran = 1"; document.body.append(script); } catch {}
          let refused;
          try { document.body.insertAdjacentHTML("beforeend", "<img src=x>"); } catch (error) { refused = error.name; }
          return [window.ran, refused, document.images.length];
        }"""
    )
    assert ran == [None, "TypeError", 1]
    here.said.clear()


# --- the dashboard ---


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


# --- looks ---


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
