"""GGUF files, written by llama.cpp's own library: logits are those of the numbers that it says were packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from typer.testing import CliRunner

from pippin import gguf_files
from pippin.cli import app
from pippin.config import EngineConfig
from pippin.errors import ModelError
from pippin.exchange import config_for
from pippin.gguf_files import READ, describe
from pippin.models.load import load_mlx_model, load_model
from pippin.models.quantize import Form
from pippin.text.tokenizer import load_tokenizer
from tests.checkpoints import make_checkpoint
from tests.gguf_files import write_gguf
from tests.test_completion import INFO
from tests.tokenizers_for_tests import CHATML, chat_tokenizer

TOKENS = mx.array([[5, 9, 200, 41, 7, 3, 77, 130]])
CONFIG = EngineConfig(device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pippin" / "gguf"


def logits(path: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(load_mlx_model(str(path), CONFIG).model(TOKENS))


def written(path: Path, family: str = "llama", kind: str = "F32", **fields: Any) -> Path:
    rows = len(fields.get("tokenizer__ggml__tokens", ())) or 288
    settings: dict[str, Any] = {} if family == "qwen2" else {"head_dim": 32}
    make_checkpoint(path / "source", family, rope_scaling=None, vocab_size=rows, **settings)
    return write_gguf(path / "source", path / "tiny.gguf", kind, **fields)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_are_those_of_the_safetensors(family: str, kind: str, tmp_path: Path) -> None:
    file = written(tmp_path, family, kind)
    loaded = load_mlx_model(str(file), CONFIG)
    found, wanted = np.array(loaded.model(TOKENS)), logits(tmp_path / "source")
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    bits = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}.get(kind)
    assert (loaded.quantization is None) == (bits is None)
    assert loaded.eos_token_ids == (2,)
    assert (loaded.vocab_size, loaded.context_length) == (288, 256)


@pytest.mark.parametrize("kind", sorted(READ - {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"}))
def test_wide_types_are_the_numbers_that_their_makers_read(kind: str, tmp_path: Path) -> None:
    """Nobody writes these but llama.cpp itself, so their bits are random, their scales small."""
    used = gguf.GGMLQuantizationType[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (8, gguf.GGML_QUANT_SIZES[used][1])).astype(np.uint8)
    small = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    blocks[:, -2:] = small
    if kind == "Q2_K":
        blocks[:, -4:-2] = small
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("one.weight", blocks, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    arrays = mx.load(str(tmp_path / "one.gguf"))
    assert isinstance(arrays, dict)
    wanted = gguf.quants.dequantize(blocks, used)
    assert np.abs(np.array(arrays["one.weight"].astype(mx.float32)) - wanted).max() <= 1e-3 * np.abs(wanted).max()


def test_weights_of_mixed_types_are_computed_in_one(tmp_path: Path) -> None:
    """As on a GPU, where the checkpoint's type is kept."""
    model, _, _ = load_model(str(written(tmp_path, kind="Q8_0")), Form())
    assert {a.dtype for _, a in tree_flatten(model.parameters())} == {mx.float16, mx.uint32}


@pytest.mark.parametrize(("scaling", "way"), [("linear", "linear"), ("yarn", "yarn")])
def test_scaled_rotation(scaling: str, way: str, tmp_path: Path) -> None:
    settings = {"rope_type": way, "factor": 4.0, "original_max_position_embeddings": 64}
    make_checkpoint(tmp_path / "source", "qwen3", rope_scaling=settings)
    fields = {"type": scaling, "factor": 4.0, "original_context_length": 64}
    named: dict[str, Any] = {f"qwen3__rope__scaling__{name}": value for name, value in fields.items()}
    file = write_gguf(tmp_path / "source", tmp_path / "tiny.gguf", **named)
    assert np.allclose(logits(file), logits(tmp_path / "source"), atol=1e-4)


def llama_3_factors(size: int = 32, theta: float = 20000.0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """As llama.cpp's converter computes them, one by one."""
    factors = []
    for turn in (theta ** (i / size) for i in range(0, size, 2)):
        length = 2 * np.pi * turn
        if length < 8192 / 4:
            factors.append(1.0)
        elif length > 8192:
            factors.append(8.0)
        else:
            smooth = (8192 / length - 1) / 3
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    return np.array(factors, np.float32)


def test_llama_3s_factors_are_found_again(tmp_path: Path) -> None:
    settings = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    make_checkpoint(tmp_path / "source", "llama", rope_scaling=settings, head_dim=32)
    tensors = {"rope_freqs.weight": llama_3_factors()}
    file = write_gguf(tmp_path / "source", tmp_path / "tiny.gguf", tensors=tensors)
    assert load_mlx_model(str(file), CONFIG).config["rope_scaling"] == settings
    assert np.allclose(logits(file), logits(tmp_path / "source"), atol=1e-4)


def test_other_factors_are_refused(tmp_path: Path) -> None:
    factors = llama_3_factors() * np.linspace(1, 1.2, 16, dtype=np.float32)
    with pytest.raises(ModelError, match=r"rope_freqs\.weight holds other factors"):
        logits(written(tmp_path, tensors={"rope_freqs.weight": factors}))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"architecture": "gemma3"}, "architecture 'gemma3'.*llama, qwen2, qwen3.*safetensors.*--quantization"),
        ({"kind": "Q5_0"}, "token_embd.weight is of type Q5_0|type Q5_0.*safetensors"),
        ({"split__count": 3}, "one of 3 files"),
        ({"llama__expert_count": 8}, "llama.expert_count is 8"),
        ({"llama__attention__sliding_window": 64}, "sliding_window is 64"),
        ({"llama__rope__scaling__type": "longrope"}, "rope.scaling.*longrope"),
        ({"llama__attention__head_count_kv": [2, 2, 1]}, "head_count_kv is .*not one number"),
        ({"llama__rope__dimension_count": 16}, "16 turn"),
        ({"llama__block_count": None}, "block_count is None"),
        ({"tensors": {"blk.0.ssm_a.weight": np.ones(4, np.float32)}}, "tensor blk.0.ssm_a.weight"),
    ],
)
def test_what_isnt_understood_is_refused_by_name(fields: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=why):
        logits(written(tmp_path, **fields))


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(9))
    with pytest.raises(ModelError, match="can't be read as a GGUF file"):
        logits(tmp_path / "broken.gguf")
    whole = written(tmp_path).read_bytes()
    (tmp_path / "broken.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="can't be read as a GGUF file"):
        logits(tmp_path / "broken.gguf")


def test_a_directory_holds_one(tmp_path: Path, cache: Path) -> None:
    file = written(tmp_path)
    found = load_mlx_model(str(tmp_path), CONFIG)
    assert found.path == describe(file)
    assert len(list(cache.iterdir())) == 1
    (tmp_path / "other.gguf").write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="holds 2 GGUF files"):
        logits(tmp_path)


def test_a_link_to_a_file_is_that_file(tmp_path: Path, cache: Path) -> None:
    """As the hub's client keeps them, here by a name that says nothing."""
    file = written(tmp_path)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.gguf").symlink_to(file)
    assert load_mlx_model(str(tmp_path / "snapshot"), CONFIG).path == describe(file)
    chat_tokenizer().save_pretrained(tmp_path / "snapshot")
    assert load_tokenizer(str(tmp_path / "snapshot")).encode("Hello") == chat_tokenizer().encode("Hello")


def test_another_process_may_be_faster(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write = written(tmp_path), gguf_files._write

    def write_behind_another(of: Path, beside: list[Path], to: Path) -> None:
        monkeypatch.setattr(gguf_files, "_write", write)
        describe(of)
        write(of, beside, to)

    monkeypatch.setattr(gguf_files, "_write", write_behind_another)
    assert [describe(file)] == list(cache.iterdir())


def test_a_file_that_is_refused_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ModelError):
        logits(written(tmp_path, architecture="gemma3"))
    assert list(cache.iterdir()) == []


def tokenizer_fields(**others: Any) -> dict[str, Any]:
    hf = chat_tokenizer()
    tokens = hf.convert_ids_to_tokens(list(range(len(hf))))
    special = set(hf.added_tokens_decoder)
    merges = [" ".join(pair) for pair in json.loads(hf.backend_tokenizer.to_str())["model"]["merges"]]
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "merges": merges,
        "token_type": [3 if i in special and i < 3 else 4 if i in special else 1 for i in range(len(tokens))],
        "eos_token_id": 2,
    }
    return {f"tokenizer__ggml__{name}": value for name, value in (fields | others).items()}


def test_the_tokenizer_is_the_one_in_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "qwen3", **tokenizer_fields(), tokenizer__chat_template=CHATML)
    original = chat_tokenizer()
    for path in (file, tmp_path):
        found = load_tokenizer(str(path))
        for text in ("Hello world, naïve café 日本 🙂\n\n\tEND", "<|im_start|>user\nthe apples<|im_end|>", "<think> a"):
            assert found.encode(text) == original.encode(text)
            assert found.decode(found.encode(text), skip_special_tokens=False) == text
        assert (found.eos_ids, found.hf.chat_template) == ((2,), CHATML)


def sentencepiece_fields() -> dict[str, Any]:
    """A vocabulary of Llama 2's kind, whose merges follow from its scores."""
    words = ["▁Hello", "▁world", "▁wor", "ld", "▁H", "el", "lo", "▁w", "or", *"▁abcdefghijklmnopqrstuvwxyzHW.,!"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(i) for i in range(len(words))],
        "token_type": [2, 3, 3, *[6] * 256, *[1] * len(words)],
        "bos_token_id": 1,
        "unknown_token_id": 0,
    }
    return {f"tokenizer__ggml__{name}": value for name, value in fields.items()}


def test_sentencepiece_falls_back_to_bytes(tmp_path: Path) -> None:
    found = load_tokenizer(str(written(tmp_path, **sentencepiece_fields())))
    ids = found.encode("Hello world, é日")
    assert [found.piece(i) for i in ids[:6]] == ["<s>", "▁H", "el", "lo", "▁world", ","]
    assert ids[0] == found.bos_id
    assert found.decode(ids) == "Hello world, é日"


def test_a_beginning_is_put_before_texts_where_the_file_says_so(tmp_path: Path) -> None:
    fields = tokenizer_fields(bos_token_id=0, add_bos_token=True)
    assert load_tokenizer(str(written(tmp_path, "qwen3", **fields))).encode("Hello")[0] == 0


def test_an_unknown_way_to_cut_texts_is_refused_until_a_tokenizer_lies_beside(tmp_path: Path) -> None:
    file = written(tmp_path, "qwen3", **tokenizer_fields(pre="of-its-own"))
    with pytest.raises(ModelError, match=r"pre is 'of-its-own'.*put the model's tokenizer\.json beside it"):
        load_tokenizer(str(file))
    chat_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(file)).encode("Hello world") == chat_tokenizer().encode("Hello world")


def test_check_takes_a_file(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["check", str(written(tmp_path, kind="Q8_0"))])
    assert done.exit_code == 0, done.output
    assert "llama" in done.output


def test_other_weights_that_are_a_gguf_file_bring_their_tokenizer(tmp_path: Path) -> None:
    file = written(tmp_path)
    for path in (tmp_path, file):
        assert config_for(EngineConfig(), INFO, {}, str(path)).tokenizer_path is None
    assert config_for(EngineConfig(), INFO, {}, str(tmp_path / "source")).tokenizer_path == INFO.tokenizer_path
