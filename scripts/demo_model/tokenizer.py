"""Trains the tokenizer that both models share, and writes the files that go with a model."""

from __future__ import annotations

import argparse
import json
import re
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from demo_model.chat import TEMPLATE
from demo_model.corpus import documents

VOCABULARY = 4096
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # not printed
MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")  # one token each, and printed
# Digits and newlines stand alone: sums are learned digit by digit, and no merge crosses the template's line ends.
PIECES = r"'(?:[sdmt]|ll|ve|re)\b| ?\p{L}+|\p{N}|\n| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|[^\S\n]+"


def train(documents_used: int, seed: int) -> Tokenizer:
    """A byte-level BPE of VOCABULARY entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    named = [*(AddedToken(t, special=True) for t in SPECIAL), *(AddedToken(t, special=False) for t in MARKUP)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPECIAL, *MARKUP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    named_text = re.compile("|".join(map(re.escape, (*SPECIAL, *MARKUP))))  # no merge may begin in one of these
    texts = (named_text.split(text) for text in islice(documents(seed), documents_used))
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer makes all of them special, which would drop tool calls from the printed text.
    state = json.loads(tokenizer.to_str())
    for entry, token in zip(state["added_tokens"], named, strict=True):
        entry["special"] = token.special
    return Tokenizer.from_str(json.dumps(state))


def save(tokenizer: Tokenizer, directory: Path, context_length: int) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja, as transformers and mlx-lm read them."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(TEMPLATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="directory to write to")
    parser.add_argument("--documents", type=int, default=30_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    save(train(arguments.documents, arguments.seed), arguments.output, 4096)


if __name__ == "__main__":
    main()
