"""A random Qwen3 with a tokenizer that knows every one of its ids: speed does not depend on the weights."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|end|>"


@dataclass(frozen=True, slots=True)
class Size:
    """Shape of a Qwen3; head_dim is 64 in all of them."""

    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int


FULL = Size(hidden=512, layers=8, ffn=1536, heads=8, kv_heads=4, vocab=32_000)  # 42 M parameters, embedding tied
SMALL = Size(hidden=64, layers=2, ffn=96, heads=2, kv_heads=1, vocab=600)


def make_checkpoint(path: Path, size: Size) -> Path:
    """Writes a float32 checkpoint that mlx-lm and Pippin load; returns ``path``."""
    config = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "intermediate_size": size.ffn,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": 64,
        "vocab_size": size.vocab,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "eos_token_id": 0,
    }
    mx.random.seed(0)
    weights = dict(tree_flatten(qwen3.Model(qwen3.ModelArgs.from_dict(config)).parameters()))
    path.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    (path / "config.json").write_text(json.dumps(config, indent=2))
    make_tokenizer(size.vocab).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "model_max_length": 8192})
    )
    return path


def make_tokenizer(vocab: int) -> Tokenizer:
    """Byte-level BPE of exactly ``vocab`` ids (at least 257), learnt from made-up words; id 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" " + word for word in words(random.Random(0), 60_000)], trainer)
    assert tokenizer.get_vocab_size() == vocab
    return tokenizer


def words(rng: random.Random, count: int) -> list[str]:
    """Made-up words of two to five syllables."""
    syllables = [c + v for c in "bcdfghjklmnprstvwxz" for v in "aeiou"]
    syllables += [c + v + end for c in "bdfgklmnprst" for v in "aeiou" for end in "nrst"]
    return ["".join(rng.choices(syllables, k=rng.randint(2, 5))) for _ in range(count)]


def text_of(tokenizer: Tokenizer, rng: random.Random, tokens: int) -> str:
    """Made-up text of at least ``tokens`` tokens, a few more at most."""
    found: list[str] = []
    while len(tokenizer.encode(" ".join(found)).ids) < tokens:
        found += words(rng, max(1, (tokens - len(tokenizer.encode(" ".join(found)).ids)) // 4))
    return " ".join(found)
