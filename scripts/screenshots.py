"""Takes the pictures of docs/web-page.md in headless Chromium: ``python scripts/screenshots.py`` (needs the extra dev).

The chats are with an engine that says what it is told to say (``tests/server/speaker.py``), and is called so in the
pictures: the shipped model writes no tables. The dashboards show the shipped model, under requests that this sends.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from playwright.sync_api import Browser, Page, sync_playwright  # noqa: E402

from pippin.client import EngineClient  # noqa: E402
from pippin.config import EngineConfig, ServerConfig  # noqa: E402
from pippin.text.tokenizer import load_tokenizer  # noqa: E402
from tests.server.conftest import Running, serving  # noqa: E402
from tests.server.speaker import speaking  # noqa: E402
from tests.server.ui.page import CHROMIUM, Watched, setting  # noqa: E402

DESK = {"width": 1100, "height": 780}
HELD: dict[str, Any] = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}

QUESTION = "What is a pippin, and when is one ripe?"
ANSWER = """<think>
The user asks about apples. A pippin is grown from seed. A small table of known ones would help, and a rule of thumb.
</think>

A pippin is an apple raised **from seed**, so every one is a new variety:

| apple | found | taste |
|:------|------:|:------|
| Ribston Pippin | 1708 | sharp |
| Cox's Orange Pippin | 1830 | aromatic |

It is ripe when its seeds are brown. As a rule of thumb:

```python
def ripe(apple: Apple) -> bool:
    return apple.sugar > 12 and not apple.green  # per cent
```

1. Sow the seed in autumn
2. Wait *eight* years"""
WEATHER = "Should I pick them today, in Oslo?"
CALL = 'I will look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 1}}\n</tool_call>'
RESULT = '{"temperature": 7, "sky": "rain"}'
TOOLS = '[{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]'
ANSWERS = {QUESTION: ANSWER, WEATHER: CALL, RESULT: "It rains and is 7 °C: **wait** for a dry day."}

LOAD = [
    ("Tell me a story about an apple.", 200), ("What is 12 + 30?", 20), ("What is 9 * 7?", 20),
    ("Tell me a story about a fox and a lantern.", 160), ("How do I open the server to other machines?", 60),
]  # fmt: skip


def picture(page: Page, name: str) -> None:
    page.mouse.move(0, 0)
    page.wait_for_timeout(200)
    page.screenshot(path=ROOT / "docs" / f"{name}.png")
    print(f"docs/{name}.png")


def opened(browser: Browser, running: Running, path: str = "", **options: Any) -> Watched:
    usual: dict[str, Any] = {"viewport": DESK, "device_scale_factor": 1.5, "locale": "en-GB"}
    page = browser.new_context(**usual | options).new_page()
    page.goto(f"{running.url}/{path}")
    return Watched(page)


def chats(browser: Browser, running: Running) -> None:
    here = opened(browser, running, color_scheme="light")
    here.sent(QUESTION)
    here.answer.locator("summary").click()
    picture(here.page, "chat-light")
    dark = opened(browser, running, color_scheme="dark")
    setting(dark, tools=TOOLS, system="You are a gardener.")
    dark.sent(WEATHER)
    dark.page.fill(".results textarea", RESULT)
    dark.page.get_by_role("button", name="Send results").click()
    dark.page.get_by_text("dry day").wait_for()
    dark.ended()
    picture(dark.page, "chat-dark")
    phone = opened(browser, running, color_scheme="light", **HELD)
    phone.sent(QUESTION)
    picture(phone.page, "chat-phone")


def dashboards(browser: Browser, running: Running) -> None:
    looks: dict[str, dict[str, Any]] = {
        "dashboard-light": {"color_scheme": "light"},
        "dashboard-dark": {"color_scheme": "dark"},
        "dashboard-phone": {"color_scheme": "dark"} | HELD,
    }
    pages = {name: opened(browser, running, "#dashboard", **options).page for name, options in looks.items()}
    with busy(running):
        for page in pages.values():
            page.bring_to_front()
            page.wait_for_timeout(15_000)
        for name, page in pages.items():
            page.bring_to_front()
            page.wait_for_timeout(2_500)
            picture(page, name)


@contextmanager
def busy(running: Running, clients: int = 5) -> Iterator[None]:
    """Clients that ask one question after the other, until the block ends."""
    over, turn = threading.Event(), itertools.count()

    def ask() -> None:
        with running.openai() as ai:
            while not over.wait(0.3):
                number = next(turn)
                text, limit = LOAD[number % len(LOAD)]
                ai.chat.completions.create(
                    model="any", messages=[{"role": "user", "content": text}], max_tokens=limit, seed=number
                )

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def main() -> None:
    spoken = ServerConfig(tool_call_parser="qwen", reasoning_parser="qwen3", served_model_name="a scripted answer")
    config = EngineConfig(device="cpu", max_total_tokens=6000, random_seed=1)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        with speaking(ANSWERS, seconds=0.004, config=spoken) as running:
            chats(browser, running)
        with serving(make_client=lambda core: EngineClient.spawn(config), tokenizer=load_tokenizer(None)) as running:
            dashboards(browser, running)
        browser.close()


if __name__ == "__main__":
    main()
