"""A checkpoint's tokenizer: text to token ids and back.

Whatever transformers can read is loaded by transformers, without torch; what it returns is untyped and wide, so
the rest of Pippin sees this small class only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pippin.errors import ModelError, RequestError
from pippin.gguf_files import describe, gguf_of

# Reading a tokenizer's files needs no torch, so its absence is no news to the user.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one prompt at a time; its thread pool only costs start-up

CHARACTERS = 4
"""About how many a token has: where ``check_length`` begins to look."""

LONG_TEXT = 20_000
"""Characters of a text that is encoded without a look at its length; that many take some milliseconds."""

MANY_TOKENS = 5_000
"""Of a sequence that is decoded without others' leave; that many take a millisecond or two."""

_BYTE_TOKEN = re.compile(r"<0x([0-9a-fA-F]{2})>")


class Tokenizer:
    """Encodes and decodes for one checkpoint. Make one with ``load_tokenizer``.

    ``vocab_size``: ids from 0 up to here (exclusive) may decode to something; a model's logits may be wider.
    ``eos_ids``, ``bos_id``, ``special_ids``: what the tokenizer itself declares; a model's generation config may
    add ends (see ``ModelInfo.eos_token_ids``).
    ``scheme``: how the text of a sequence follows from its tokens, see ``Scheme``.
    ``hf``: the transformers tokenizer, for chat templates.
    """

    def __init__(self, hf: Any, path: str = "") -> None:
        self.hf = hf
        self.path = path
        # Python tokenizers (rare, from checkpoints with code) have no `tokenizers` object behind them.
        self._fast: Any = hf.backend_tokenizer if hf.is_fast else None
        added: dict[int, Any] = hf.added_tokens_decoder
        if self._fast is not None:
            # A saved tokenizer.json may truncate or pad; prompts must not be.
            self._fast.no_truncation()
            self._fast.no_padding()
        self.vocab_size: int = max([len(hf), *(i + 1 for i in added)])
        self.eos_ids: tuple[int, ...] = () if hf.eos_token_id is None else (int(hf.eos_token_id),)
        self.bos_id: int | None = hf.bos_token_id
        self.special_ids = frozenset(
            {i for i, token in added.items() if token.special} | set(map(int, hf.all_special_ids))
        )
        self._special_names = {self.piece(i): i for i in self.special_ids}
        self.scheme = Scheme.of(self._fast)
        self._whole: dict[int, str | None] = {}  # of tokens that were asked for, at most the vocabulary

    @property
    def has_chat_template(self) -> bool:
        return bool(self.hf.chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens written out in it become those tokens, as everywhere.

        ``add_special_tokens`` puts the tokenizer's BOS and the like round it. Raises RequestError for text that is not
        valid Unicode (half of a surrogate pair, which JSON can spell).
        """
        try:
            if self._fast is not None:  # `encode` counts characters too, and holds up all of the process' threads
                return list(self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)
            return list(self.hf.encode(text, add_special_tokens=add_special_tokens))
        except (TypeError, UnicodeError) as error:
            raise RequestError(f"the text is not valid Unicode: {_surrogate(text)}") from error

    def check_length(self, text: str, most: int, field: str = "prompt") -> None:
        """Raises RequestError for a long text that has more than ``most`` tokens by far, and looks at no more of it
        than it takes to know: a token takes some 200 bytes while a text is encoded.
        """
        size = max(most * CHARACTERS, LONG_TEXT)
        while size < len(text):
            if len(self.encode(text[:size], False)) > most + most // 16 + 16:
                raise RequestError(
                    f"the text has {len(text)} characters, of which the first {size} are more than the {most} tokens "
                    "that there is room for; shorten it",
                    field,
                )
            size *= 2

    def decode(
        self,
        ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Text of a whole sequence. Ids that no token has decode to nothing; negative ones raise RequestError.

        ``spaces_between_special_tokens`` matters only to tokenizers written in Python. Old checkpoints ask to remove
        spaces before punctuation; that is not done, since it would change what the model wrote.
        """
        if any(not 0 <= i < 2**32 for i in ids):
            raise RequestError("token ids must be 0 or above", "tokens")
        if self._fast is not None and len(ids) > MANY_TOKENS:  # `decode` would hold up all of the process' threads
            return str(self._fast.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0])
        if self._fast is not None:
            return str(self._fast.decode(list(ids), skip_special_tokens=skip_special_tokens))
        options = {"clean_up_tokenization_spaces": False, "skip_special_tokens": skip_special_tokens}
        known = [i for i in ids if i < self.vocab_size]
        return str(self.hf.decode(known, spaces_between_special_tokens=spaces_between_special_tokens, **options))

    def piece(self, token: int) -> str | None:
        """The token as the vocabulary spells it (``Ġthe``, ``▁the``, ``<0x0A>``), None if there is none."""
        if self._fast is not None:
            spelled = self._fast.id_to_token(token) if token >= 0 else None
        else:
            spelled = self.hf.convert_ids_to_tokens(token) if 0 <= token < self.vocab_size else None
        return None if spelled is None else str(spelled)

    def special_id(self, name: str) -> int | None:
        """The special token of that name, None if there is none."""
        return self._special_names.get(name)

    def specials_in(self, texts: Iterable[str]) -> dict[str, int]:
        """The special tokens whose names appear in any of the texts, with their ids."""
        whole = "\n".join(texts)
        return {name: token for name, token in self._special_names.items() if name and name in whole}

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to a text, in UTF-8; it may be part of a character. Special tokens give their names."""
        spelled = self.piece(token)
        if spelled is None:
            return b""
        if self.scheme.kind == "other":
            return self.decode([token], skip_special_tokens=False).encode()
        return self.scheme.bytes_of(spelled)

    def whole_text(self, token: int) -> str | None:
        """The text that one token is, if it is whole characters; None if it is not. Found out once."""
        if token not in self._whole and token < self.vocab_size:
            try:
                self._whole[token] = self.token_bytes(token).decode()
            except UnicodeDecodeError:
                self._whole[token] = None
        return self._whole.get(token)

    def token_text(self, token: int) -> str:
        """One token as text, for logprobs; U+FFFD where it is only part of a character."""
        return self.token_bytes(token).decode("utf-8", "replace")


class Scheme:
    """How a `tokenizers` decoder makes text out of tokens, as far as streaming needs to know.

    - ``bytes``: each token stands for bytes (GPT-2's byte-level BPE). Text is their UTF-8, errors replaced.
    - ``fallback``: each token stands for text, ``<0xNN>`` for a byte (SentencePiece with byte fallback). A run of bytes
      is text if all of it is UTF-8, and one U+FFFD a byte if not. ``strip`` such ``strip_char`` are cut off the front.
    - ``other``: only the decoder knows.
    """

    def __init__(
        self, kind: str, replaces: Iterable[tuple[str, str]] = (), strip_char: str = "", strip: int = 0
    ) -> None:
        self.kind = kind
        self.replaces = tuple(replaces)
        self.strip_char = strip_char
        self.strip = strip

    @classmethod
    def of(cls, fast: Any) -> Scheme:
        if fast is None or fast.decoder is None:
            return cls("other")
        decoder = json.loads(fast.decoder.__getstate__())
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        if [step["type"] for step in steps] == ["ByteLevel"]:
            return cls("bytes")
        replaces = []
        while steps and steps[0]["type"] == "Replace" and "String" in steps[0]["pattern"]:
            replaces.append((steps[0]["pattern"]["String"], steps[0]["content"]))
            steps = steps[1:]
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteFallback", "Fuse"]:
            return cls("fallback", replaces)
        if kinds == ["ByteFallback", "Fuse", "Strip"] and steps[2]["stop"] == 0:
            return cls("fallback", replaces, steps[2]["content"], steps[2]["start"])
        return cls("other")

    def bytes_of(self, spelled: str) -> bytes:
        """A token's bytes; for ``bytes`` and ``fallback`` only."""
        if self.kind == "bytes":
            try:
                return bytes(BYTE_OF[c] for c in spelled)
            except KeyError:  # an added token with characters outside of the byte alphabet stands for itself
                return spelled.encode()
        byte = self.fallback_byte(spelled)
        return self.text_of(spelled).encode() if byte is None else bytes([byte])

    def text_of(self, spelled: str) -> str:
        for old, new in self.replaces:
            spelled = spelled.replace(old, new)
        return spelled

    def fallback_byte(self, spelled: str) -> int | None:
        """The byte that a token ``<0xNN>`` stands for, None for any other token."""
        match = _BYTE_TOKEN.fullmatch(spelled)
        return None if match is None else int(match[1], 16)


def load_tokenizer(path: str | None, *, revision: str | None = None, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a local directory, GGUF file or hub id; the shipped model's if ``path`` is None.

    Code in a checkpoint runs only with ``trust_remote_code``; without it, a tokenizer that needs its own code is
    refused before any of it is read. Raises ModelError.
    """
    from transformers import AutoTokenizer

    path = demo_path() if path is None else path
    if (file := gguf_of(Path(path).expanduser())) is not None:
        path = str(describe(file))
    try:
        hf = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises nearly every type there is for a bad file
        raise ModelError(_load_failure(path, error, trust_remote_code)) from error
    if len(hf) <= len(hf.added_tokens_decoder):  # transformers makes an empty one where the files are missing
        raise ModelError(f"{path} has no tokenizer; --tokenizer-path takes another directory or hub id")
    return Tokenizer(hf, path)


def demo_path() -> str:
    """Where the shipped model lies."""
    from pippin.demo import demo_model_path

    return str(demo_model_path())


def _load_failure(path: str, error: Exception, trusted: bool) -> str:
    text = str(error)
    if path.startswith((".", "/", "~")) and not Path(path).exists():
        return f"--tokenizer-path: there is no directory {path}; a hub id looks like `Qwen/Qwen3-0.6B`"
    if "trust_remote_code" in text and not trusted:
        return f"{path}: its tokenizer comes with code of its own; --trust-remote-code would run it"
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return f"{path}: no tokenizer could be loaded ({first}); --tokenizer-path takes another directory or hub id"


def _surrogate(text: str) -> str:
    lone = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
    return "it can't be encoded" if lone is None else f"a lone surrogate U+{ord(text[lone]):04X} at index {lone}"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: a byte that prints as Latin-1 is itself, the others count up from U+0100."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in itself]
    return {chr(b): b for b in itself} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_alphabet()
