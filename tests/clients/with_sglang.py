"""SGLang's frontend language: generation, a regex, a choice, a stream, several at once."""

from __future__ import annotations

import re
from typing import Any

import sglang as sgl

from tests.clients.ask import URL

sgl.set_default_backend(sgl.RuntimeEndpoint(URL))


@sgl.function
def asked(s: Any, question: str) -> None:
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=24, temperature=0))


@sgl.function
def shaped(s: Any) -> None:
    s += "A number of three digits: " + sgl.gen("number", regex=r"\d{3}", max_tokens=8)
    s += ". It is " + sgl.select("size", ["large", "small"])


whole = asked.run(question="What is 12 + 30?")["answer"]
assert whole, "nothing was said"
stream = asked.run(question="What is 12 + 30?", stream=True)
assert "".join(stream.text_iter(var_name="answer")) == whole
many = asked.run_batch([{"question": f"What is {n} + 1?"} for n in range(6)])
assert all(state["answer"] for state in many)
state = shaped.run()
assert re.fullmatch(r"\d{3}", state["number"]), state["number"]
assert state["size"] in ("large", "small")
