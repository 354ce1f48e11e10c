"""Token ids to measure with: a model's own, but no special ones."""

from __future__ import annotations

from pathlib import Path
from random import Random

from tokenizers import Tokenizer

from pippin.messages import ModelInfo
from pippin.types import Token


def plain_ids(info: ModelInfo) -> list[Token]:
    """Ids that the tokenizer has a token for, none of them special; without a tokenizer, all but the ends."""
    file = Path(info.tokenizer_path) / "tokenizer.json"
    ends = set(info.eos_token_ids)
    if not file.exists():
        return [i for i in range(info.vocab_size) if i not in ends]
    tokenizer = Tokenizer.from_file(str(file))
    special = ends | {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    known = tokenizer.get_vocab(with_added_tokens=True).values()
    return sorted({i for i in known if i < info.vocab_size} - special)


def random_prompts(ids: list[Token], count: int, length: int, rng: Random) -> list[list[Token]]:
    """``count`` prompts of ``length`` tokens each."""
    return [rng.choices(ids, k=length) for _ in range(count)]
