"""What a model says is not trusted: nothing of it runs, is fetched, or leads into the server."""

from __future__ import annotations

import json
import random
from pathlib import Path

from playwright.sync_api import expect

from tests.server.conftest import Running
from tests.server.speaker import speaking
from tests.server.ui.page import TOOLS, Open, setting

HOSTILE: list[str] = json.loads((Path(__file__).parents[2] / "data" / "hostile.json").read_text())
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
          return [window.ran, refused, [...document.images].filter(x => !x.src.endsWith("/ui/icon.svg")).length];
        }"""
    )
    assert ran == [None, "TypeError", 0]
    here.said.clear()
