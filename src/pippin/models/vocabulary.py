"""What the engine wants to know of a tokenizer's files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from pippin.errors import ModelError


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Ids from ``size`` on are none of the tokenizer's; ``eos_ids`` end an answer."""

    size: int
    eos_ids: tuple[int, ...] = ()


def read_vocabulary(directory: Path, vocab_size: int) -> Vocabulary:
    """The facts as far as the files tell; the model's ``vocab_size`` may be padded beyond the tokenizer's ids.

    Raises ModelError where a file can't be read.
    """
    file, settings = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if not file.exists():
        return Vocabulary(vocab_size)
    try:
        tokenizer = Tokenizer.from_file(str(file))
        eos = json.loads(settings.read_text(encoding="utf-8")).get("eos_token") if settings.exists() else None
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise ModelError(f"{directory}: tokenizer.json or tokenizer_config.json can't be read: {error}") from error
    # Not a count of its tokens: some tokenizers leave ids out.
    size = next((n for n in range(vocab_size, 0, -1) if tokenizer.id_to_token(n - 1) is not None), vocab_size)
    id = tokenizer.token_to_id(eos["content"] if isinstance(eos, dict) else eos) if eos else None
    return Vocabulary(size, () if id is None else (id,))
