"""Tiny tokenizers of each scheme, trained on a few lines, as transformers objects."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from pippin.text.tokenizer import BYTE_OF, Tokenizer

CORPUS = [
    "Hello world, this is a test of tokens that are merged.",
    "The apple falls; the apples fall. Pippins grow from seed!",
    "Ünïcödé für jede Zeile, naïve café, señor, 日本語 日本 🙂🙃",
    "def f(x):\n    return x + 1\n\n\tEND of it, STOP here. stop stopped",
] * 3

CHATML = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if quiet %}shh\n{% endif %}{% endif %}"
)


def wrap(fast: FastTokenizer, **options: Any) -> PreTrainedTokenizerFast:
    """As a checkpoint's files would load; ``save_pretrained`` makes them."""
    return PreTrainedTokenizerFast(tokenizer_object=fast, **options)


def chat_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML's special tokens, and two added tokens that are not special."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    # The second is spelled with characters that byte-level BPE has no use for, so it stands for itself.
    fast.add_tokens([AddedToken("<think>", normalized=False), AddedToken("a note ▁é", normalized=False)])
    return wrap(fast, eos_token="<|im_end|>", chat_template=template)


@cache
def byte_level() -> Tokenizer:
    return Tokenizer(chat_tokenizer())


@cache
def byte_ids() -> Tokenizer:
    """Each byte is the token of that number, 256 ends an answer: what ``fake_core`` speaks."""
    fast = FastTokenizer(models.BPE(vocab=dict(BYTE_OF), merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<|im_end|>", "<|im_start|>"])
    return Tokenizer(wrap(fast, eos_token="<|im_end|>", chat_template=CHATML))


@cache
def fallback(strip: bool = True) -> Tokenizer:
    """SentencePiece with byte fallback: Llama 2's decoder, or Gemma's, which keeps the first space."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in ("▁", "▁▁", *"etaohlwrdsin", "▁t", "he", "ll", "▁he", "o▁", "é", "日", "END", "ST", "OP", "▁S"):
        vocab.setdefault(piece, len(vocab))
    merges = [("▁", "t"), ("h", "e"), ("l", "l"), ("▁", "he"), ("o", "▁"), ("▁", "▁")]
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    prepend = [normalizers.Prepend("▁")] if strip else []
    fast.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return Tokenizer(wrap(fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>"))


@cache
def metaspace() -> Tokenizer:
    """Unigram with Metaspace, as T5 has it: only its decoder knows how text follows from tokens."""
    fast = FastTokenizer(models.Unigram())
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    fast.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=180, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
        ),
    )
    return Tokenizer(wrap(fast, eos_token="</s>", unk_token="<unk>"))


@cache
def wordpiece() -> Tokenizer:
    """WordPiece, as BERT has it: spaces go between tokens, not in them."""
    fast = FastTokenizer(models.WordPiece(unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.decoder = decoders.WordPiece()
    fast.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    )
    return Tokenizer(wrap(fast, eos_token="[SEP]", unk_token="[UNK]"))


@cache
def python_bytes() -> Tokenizer:
    """ByT5's, one of the few that are written in Python: bytes again, and what is incomplete is left out."""
    return Tokenizer(ByT5Tokenizer())


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "fallback": fallback,
    "fallback-no-strip": lambda: fallback(strip=False),
    "metaspace": metaspace,
    "wordpiece": wordpiece,
    "python-bytes": python_bytes,
}
