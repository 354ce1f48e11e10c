"""A checkpoint's tokens as llguidance knows them: bytes, and which are special, so never text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

from llguidance import LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer as FastTokenizer

from pippin.errors import PippinError, RequestError
from pippin.text.tokenizer import Tokenizer, load_tokenizer

SLOW_FILES = ("tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")

_TEXT = r'[^"\\\x00-\x1F\x7F]'  # what stands in a JSON string as it is
SLICES = [
    r"[\x20\x0A\x0D\x09]+",
    *(f"{_TEXT}{{1,{most}}}" for most in (1, 2, 3, 4, 5, 6, 7, 8, 10, 14, 20, 30)),
    f"{_TEXT}+",
]
"""Sets of tokens that are allowed or not together, so that a mask needn't look at each: more than llguidance's own
four, with which a mask takes 1 to 2 ms where a string may only have a few more of 150 000 tokens' characters."""


def load_vocabulary(
    directory: Path, vocab_size: int, eos_ids: Sequence[int], trust_remote_code: bool = False
) -> LLTokenizer:
    """The vocabulary of a directory's tokenizer, with at least ``vocab_size`` ids; any of ``eos_ids`` ends a text.

    Raises RequestError if there is no tokenizer to be had.
    """
    file = directory / "tokenizer.json"
    ends = [id for id in eos_ids if id < vocab_size]
    if file.exists():
        return _from_json(file.read_text(encoding="utf-8"), vocab_size, ends)
    if not any((directory / name).exists() for name in SLOW_FILES):
        raise RequestError("this model comes without a tokenizer, which grammars need")
    tokenizer = load_tokenizer(str(directory), trust_remote_code=trust_remote_code)
    return vocabulary_of(tokenizer, vocab_size, ends)


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> LLTokenizer:
    """The vocabulary of a tokenizer. Raises RequestError where text does not follow from each token."""
    if not tokenizer.hf.is_fast:
        pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        return _from_pieces(pieces, tokenizer.special_ids, vocab_size, eos_ids)
    return _from_json(tokenizer.hf.backend_tokenizer.to_str(), vocab_size, eos_ids)


def _from_json(text: str, vocab_size: int, eos_ids: Sequence[int]) -> LLTokenizer:
    decoder = (json.loads(text).get("decoder") or {}).get("type")
    if decoder == "Metaspace":  # SentencePiece's Unigram, which llguidance does not read
        fast = FastTokenizer.from_str(text)
        count = max(fast.get_vocab(with_added_tokens=True).values()) + 1
        pieces = [(fast.id_to_token(i) or "").replace("\u2581", " ").encode() for i in range(count)]
        special = [i for i, token in fast.get_added_tokens_decoder().items() if token.special]
        return _from_pieces(pieces, special, vocab_size, eos_ids)
    if decoder == "WordPiece":
        raise RequestError("its tokenizer puts spaces between tokens, so that text does not follow from each of them")
    found = LLTokenizer(text, eos_token=list(eos_ids) or None, slices=SLICES)
    if found.vocab_size >= vocab_size:
        return found
    return LLTokenizer(text, vocab_size, list(eos_ids) or None, slices=SLICES)


def _from_pieces(
    pieces: Sequence[bytes], special: Iterable[int], vocab_size: int, eos_ids: Sequence[int]
) -> LLTokenizer:
    tokens = GreedyTokens(pieces, special, eos_ids[0] if eos_ids else 0)
    count = max(vocab_size, len(pieces))
    return LLTokenizer(TokenizerWrapper(tokens), count, list(eos_ids) or None, slices=SLICES)


class GreedyTokens:
    """A tokenizer as llguidance asks for one, where it can't read the real one: the longest token comes first.

    So forced text may be spelled in other tokens than the tokenizer's own, all of them valid.
    """

    def __init__(self, pieces: Sequence[bytes], special: Iterable[int], eos_id: int) -> None:
        self.tokens = list(pieces)
        self.special_token_ids = sorted(special)
        self.eos_token_id = eos_id
        self.bos_token_id = None
        hidden = set(self.special_token_ids)
        self._ids = {piece: i for i, piece in reversed([*enumerate(pieces)]) if piece and i not in hidden}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: bytes) -> list[int]:
        found, at = [], 0
        while at < len(text):
            ends = range(min(len(text), at + self._longest), at, -1)
            end = next((end for end in ends if text[at:end] in self._ids), None)
            if end is None:  # no token has this byte; what comes after can't be said either
                break
            found.append(self._ids[text[at:end]])
            at = end
        return found


def in_background(load: Callable[[], LLTokenizer]) -> Future[LLTokenizer]:
    """What ``load`` gives, or raises as a RequestError, made in a thread of its own."""
    future: Future[LLTokenizer] = Future()

    def work() -> None:
        try:
            future.set_result(load())
        except PippinError as error:
            future.set_exception(RequestError(f"this model can't follow grammars: {error}"))
        except Exception as error:  # a file that llguidance does not understand: a ValueError, or anything
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            future.set_exception(RequestError(f"this model's tokenizer can't follow grammars ({first})"))

    Thread(target=work, name="vocabulary", daemon=True).start()
    return future
