"""A page of the server in a browser: what is done there, and what came of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import ConsoleMessage, Locator, Page, Request, expect

from tests.waiting import SECONDS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
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


def setting(here: Watched, **values: str) -> None:
    here.page.click("#settings-open")
    for name, value in values.items():
        box = here.page.locator(f"#set-{name}")
        box.select_option(value) if box.evaluate("e => e.tagName") == "SELECT" else box.fill(value)
    here.page.click("#settings-close")
