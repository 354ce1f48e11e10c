"""gpt-oss' harmony: every message has a channel; calls are messages to ``functions.NAME``.

Source: OpenAI's harmony response format. ``analysis`` is reasoning; ``final``, and ``commentary`` to nobody, are text.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from pippin.text.parts import CallBroken, Part, Reasoning, Text
from pippin.text.scan import Scan, Source, capture, plain
from pippin.text.tools.calls import call_with
from pippin.text.tools.offered import Offered

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|return|>", "<|call|>")
TOKENS = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)

RECIPIENT = re.compile(r"to=([^\s<]+)")


def harmony(source: Source, tools: Offered) -> Scan[None]:
    """An answer's messages, from behind the prompt's ``<|start|>assistant`` on."""
    first = True
    while True:
        before, found = yield from capture(source, (CHANNEL, MESSAGE))
        if found is None:
            if before and (first or not before.isspace()):
                yield Text(before.replace(START, ""))
            return
        header = before
        if found == CHANNEL:
            more, found = yield from capture(source, (MESSAGE,))
            header += CHANNEL + more
            if found is None:
                return  # it ended within a header, which is nobody's text
        yield from message(source, tools, header)
        first = False
        if source.ended and not source.text:
            return


def message(source: Source, tools: Offered, header: str) -> Scan[None]:
    channel = header.partition(CHANNEL)[2].split("<")[0].split()
    recipient = RECIPIENT.search(header)
    if recipient is None:
        yield from plain(source, ENDS, kind_of(channel[0] if channel else "final"))
        return
    source.mark()
    if (yield from call_with(source, recipient[1].removeprefix("functions."), None, tools)):
        source.since_mark()
        yield from capture(source, ENDS)
        return
    yield from capture(source, ENDS)
    yield CallBroken(source.since_mark())


def kind_of(channel: str) -> Callable[[str], Part]:
    return Reasoning if channel == "analysis" else Text
