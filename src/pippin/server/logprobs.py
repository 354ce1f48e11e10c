"""Logprobs in OpenAI's two shapes; ``sglang`` has SGLang's."""

from __future__ import annotations

from collections.abc import Sequence

from pippin.server.protocol import Json
from pippin.text.tokenizer import Tokenizer
from pippin.types import TokenLogprob


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob]) -> Json:
    """/v1/chat/completions' ``logprobs``."""

    def one(token: int, logprob: float | None) -> Json:
        return {
            "token": tokenizer.token_text(token),
            "bytes": list(tokenizer.token_bytes(token)),
            "logprob": logprob,
        }

    content = [{**one(e.token, e.logprob), "top_logprobs": [one(*top) for top in e.top]} for e in entries]
    return {"content": content, "refusal": None}


class TextLogprobs:
    """/v1/completions' ``logprobs`` of one choice, in as many parts as it is streamed in.

    ``text_offset`` counts characters from the start of the choice's text. A token that is hidden from the text, or
    that continues a character, adds none.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._offset = 0

    def part(self, entries: Sequence[TokenLogprob]) -> Json:
        """The next tokens' lists."""
        offsets, tops = [], list[dict[str, float] | None]()
        for entry in entries:
            offsets.append(self._offset)
            self._offset += self._length(entry.token)
            tops.append(None if entry.logprob is None else self._top(entry))
        return {
            "tokens": [self._tokenizer.token_text(e.token) for e in entries],
            "token_logprobs": [e.logprob for e in entries],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _length(self, token: int) -> int:
        if token in self._hidden:
            return 0
        return sum(byte & 0xC0 != 0x80 for byte in self._tokenizer.token_bytes(token))

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """By text, likeliest first; of tokens that spell alike (parts of characters), the likeliest."""
        found: dict[str, float] = {}
        for token, logprob in entry.top:
            found.setdefault(self._tokenizer.token_text(token), logprob)
        return found
