"""``--log-requests``: what was asked and answered, as far as ``--log-requests-level`` says. Nothing of it otherwise."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from pippin.completion import Delta
from pippin.logs import fields
from pippin.text.tokenizer import Tokenizer
from pippin.types import SamplingParams

log = logging.getLogger("pippin.requests")

SHORT = 2048
"""Characters of a text that level 2 logs."""


class RequestLog:
    """One line when a request begins and one when it ends. Level 0: counts; 1: sampling parameters too; 2: the first
    2048 characters of prompt and answers; 3: all of them. Levels and names are SGLang's.
    """

    def __init__(self, tokenizer: Tokenizer, level: int) -> None:
        self._tokenizer, self._level = tokenizer, level

    def _shown(self, text: str) -> str:
        return text if self._level > 2 else text[:SHORT]

    @contextmanager
    def track(self, rid: str, tokens: list[int], params: SamplingParams) -> Iterator[Callable[[Delta], None]]:
        """Gives what takes the deltas of one prompt's answers; the request is logged."""
        said = {"rid": rid, "prompt_tokens": len(tokens)}
        asked = dict(said)
        if self._level > 0:
            asked["sampling_params"] = msgspec.to_builtins(params, str_keys=True)
        if self._level > 1:
            asked["prompt"] = self._shown(self._tokenizer.decode(tokens, False))
        log.info("request %s begins: %s", rid, asked, extra=fields(event="begin", **asked))
        began, counts, finishes, texts = time.monotonic(), dict[int, int](), dict[int, str](), dict[int, str]()

        def note(delta: Delta) -> None:
            counts[delta.index] = counts.get(delta.index, 0) + len(delta.tokens)
            if self._level > 1:
                texts[delta.index] = texts.get(delta.index, "") + delta.text
            if delta.finish is not None:
                finishes[delta.index] = delta.finish.reason

        try:
            yield note
        finally:
            ended = {
                **said,
                "completion_tokens": sum(counts.values()),
                "seconds": round(time.monotonic() - began, 4),
                "finish_reasons": [finishes.get(i, "disconnect or error") for i in range(params.n)],
            }
            if self._level > 1:
                ended["answers"] = [self._shown(texts.get(i, "")) for i in range(params.n)]
            log.info("request %s ends: %s", rid, ended, extra=fields(event="end", **ended))
