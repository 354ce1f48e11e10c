"""Tokens of one stream to text, piece by piece.

``Detokenizer`` turns tokens into characters; ``TextStream`` also looks for stop strings. Both cost O(1) amortised per
token, and joined, their pieces are what decoding all tokens at once gives.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

import msgspec

from pippin.text.stops import StopAutomaton
from pippin.text.tokenizer import Tokenizer
from pippin.types import SamplingParams

NONE = frozenset[int]()


class Detokenizer(Protocol):
    """``push`` gives the text that a token makes certain (often none), ``flush`` what is left at the end."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


def detokenizer(
    tokenizer: Tokenizer,
    skip_special_tokens: bool = True,
    spaces_between_special_tokens: bool = True,
    shown: frozenset[int] = NONE,
) -> Detokenizer:
    """The detokenizer that suits the tokenizer's scheme. ``shown`` are special tokens that are never skipped."""
    if tokenizer.scheme.kind == "bytes":
        return ByteDetokenizer(tokenizer, skip_special_tokens, shown)
    if tokenizer.scheme.kind == "fallback":
        return FallbackDetokenizer(tokenizer, skip_special_tokens, shown)
    return WindowDetokenizer(tokenizer, skip_special_tokens, spaces_between_special_tokens, shown)


def skipped(tokenizer: Tokenizer, skip_special_tokens: bool, shown: frozenset[int]) -> frozenset[int]:
    return tokenizer.special_ids - shown if skip_special_tokens else NONE


class ByteDetokenizer:
    """Each token is bytes; a character comes out with its last byte."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, shown: frozenset[int] = NONE) -> None:
        self._tokenizer = tokenizer
        self._skip = skipped(tokenizer, skip_special_tokens, shown)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._half = False  # there are bytes of a character that more must come of

    def push(self, token: int) -> str:
        if token in self._skip:
            return ""
        if not self._half and (text := self._tokenizer.whole_text(token)) is not None:
            return text
        text = self._utf8.decode(self._tokenizer.token_bytes(token))
        self._half = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        return self._utf8.decode(b"", True)


class FallbackDetokenizer:
    """Each token is text or one byte; a run of bytes comes out when it ends.

    A later byte can spoil a whole run (see ``Scheme``), so none of it is certain before.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, shown: frozenset[int] = NONE) -> None:
        self._tokenizer = tokenizer
        self._skip = skipped(tokenizer, skip_special_tokens, shown)
        self._run = bytearray()
        self._strip = tokenizer.scheme.strip

    def push(self, token: int) -> str:
        spelled = None if token in self._skip else self._tokenizer.piece(token)
        if spelled is None:
            return ""
        byte = self._tokenizer.scheme.fallback_byte(spelled)
        if byte is not None:
            self._run.append(byte)
            return ""
        return self._stripped(self._end_run() + self._tokenizer.scheme.text_of(spelled))

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if not text.startswith(self._tokenizer.scheme.strip_char):
                self._strip = 0
                break
            text, self._strip = text[1:], self._strip - 1
        return text


class WindowDetokenizer:
    """For every other tokenizer: decode a short window with and without the newest tokens, and take the difference.

    The window starts with the tokens of the piece before, so that what a decoder does at the very beginning (drop a
    space, say) happens on both sides. Text that ends in U+FFFD, or that is not there yet (some decoders leave out what
    is incomplete), may be half a character and waits, but not for ever.
    """

    MOST_WAITING = 16  # tokens; a character has at most 4 bytes, and byte tokens carry at least one each

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
        shown: frozenset[int] = NONE,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skipped(tokenizer, skip_special_tokens, shown)
        self._spaces = spaces_between_special_tokens
        self._context: list[int] = []
        self._waiting: list[int] = []
        self._shown = ""  # the context's own text

    def push(self, token: int) -> str:
        if token in self._skip or token >= self._tokenizer.vocab_size:
            return ""
        self._waiting.append(token)
        text = self._decode(self._context + self._waiting)
        half = len(text) <= len(self._shown) or text.endswith("\ufffd")
        if half and len(self._waiting) < self.MOST_WAITING:
            return ""
        return self._release(text)

    def flush(self) -> str:
        return self._release(self._decode(self._context + self._waiting)) if self._waiting else ""

    def _release(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._context, self._waiting = self._waiting, []
        self._shown = self._decode(self._context)
        return new

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, False, self._spaces)


class Piece(msgspec.Struct, frozen=True):
    """Text to show, how many of the pushed tokens count, and the stop string that ended the stream, if one did."""

    text: str
    num_tokens: int
    matched: str | None = None


class TextStream:
    """One answer's text, as far as it may be shown.

    A stop string ends the stream at its last character, whichever tokens it spans; the one that ends first wins, and of
    those the longest. It is cut off the text unless ``params.no_stop_trim``. Text that could still become a stop string
    is held back. One that ends within the first ``min_new_tokens - 1`` tokens is ordinary text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        stops: StopAutomaton | None = None,
        shown: frozenset[int] = NONE,
    ) -> None:
        self._detokenizer = detokenizer(
            tokenizer, params.skip_special_tokens, params.spaces_between_special_tokens, shown
        )
        self._stops = stops or (StopAutomaton(params.stop) if params.stop else None)
        self._trim = not params.no_stop_trim
        self._need = params.min_new_tokens
        self._num_tokens = 0
        self._state = 0
        self._held = ""

    def push(self, tokens: Sequence[int]) -> Piece:
        """The next tokens of the stream. After a match, push nothing more."""
        if self._stops is None:
            push = self._detokenizer.push
            return Piece(push(tokens[0]) if len(tokens) == 1 else "".join(map(push, tokens)), len(tokens))
        shown: list[str] = []
        for count, token in enumerate(tokens, 1):
            self._num_tokens += 1
            text, matched = self._scan(self._detokenizer.push(token))
            shown.append(text)
            if matched is not None:
                return Piece("".join(shown), count, matched)
        return Piece("".join(shown), len(tokens))

    def finish(self) -> Piece:
        """What is left when the stream ends for another reason; even this may complete a stop string."""
        text, matched = self._scan(self._detokenizer.flush())
        if matched is None:
            text, self._held = text + self._held, ""
        return Piece(text, 0, matched)

    def _scan(self, text: str) -> tuple[str, str | None]:
        if self._stops is None or not text:
            return text, None
        stops, state = self._stops, self._state
        for i, char in enumerate(text):
            state = stops.step(state, char)
            matched = stops.match[state]
            if matched is not None and self._num_tokens >= self._need:
                upto = self._held + text[: i + 1]
                return upto[: -len(matched)] if self._trim else upto, matched
        self._state = state
        all_text = self._held + text
        cut = len(all_text) - stops.depth[state]
        self._held = all_text[cut:]
        return all_text[:cut], None
