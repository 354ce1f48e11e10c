"""Encoding, decoding and loading of checkpoints' tokenizers."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.errors import ModelError, RequestError
from pippin.text.tokenizer import load_tokenizer
from tests.tokenizers_for_tests import TOKENIZERS, byte_level, chat_tokenizer, fallback

names = st.sampled_from(sorted(TOKENIZERS))


@given(st.text(max_size=50))
def test_byte_level_round_trip(text: str) -> None:
    tokenizer = byte_level()
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=False) == text


@pytest.mark.parametrize("work", ["encode", "decode"])
def test_others_go_on_while_much_is_encoded_or_decoded(work: str) -> None:
    tokenizer = load_tokenizer(None)
    text = "".join(f"{i} once upon a time " for i in range(30_000))
    tokens = tokenizer.encode(text)
    thread = threading.Thread(target=lambda: tokenizer.encode(text) if work == "encode" else tokenizer.decode(tokens))
    count = 0
    thread.start()
    while thread.is_alive():
        count += 1
        time.sleep(0.0001)
    assert count > 20  # two, where the thread keeps the others from running


@given(st.text(max_size=50))
def test_token_bytes_join_to_the_text(text: str) -> None:
    tokenizer = byte_level()
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, False))) == text.encode()


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_every_id_below_vocab_size_decodes(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    assert all(tokenizer.piece(i) is not None for i in range(tokenizer.vocab_size))
    assert tokenizer.piece(tokenizer.vocab_size) is None
    assert tokenizer.piece(-1) is None
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.decode([tokenizer.vocab_size + 1]) == ""


def test_facts() -> None:
    tokenizer = byte_level()
    end = tokenizer.encode("<|im_end|>")
    assert list(tokenizer.eos_ids) == end
    assert tokenizer.bos_id is None
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.has_chat_template
    assert fallback().bos_id == 1
    assert not fallback().has_chat_template


def test_token_text_marks_half_characters() -> None:
    tokenizer = byte_level()
    emoji = tokenizer.encode("\U0001f34f", False)
    assert len(emoji) > 1
    assert "\ufffd" in tokenizer.token_text(emoji[0])
    assert fallback().token_bytes(3 + 0xE6) == b"\xe6"
    the = next(i for i in range(fallback().vocab_size) if fallback().piece(i) == "▁t")
    assert fallback().token_text(the) == " t"


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_lone_surrogates_are_the_clients_fault(name: str) -> None:
    with pytest.raises(RequestError, match=r"U\+D800 at index 1"):
        TOKENIZERS[name]().encode("a\ud800b")


def test_negative_ids_are_refused() -> None:
    with pytest.raises(RequestError):
        byte_level().decode([5, -1])


# --- loading ---


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    chat_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    return tmp_path


def test_loads_a_directory(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(str(checkpoint))
    text = "Hello <|im_start|> wörld"
    assert tokenizer.encode(text) == byte_level().encode(text)
    assert tokenizer.decode(tokenizer.encode(text), False) == text
    assert tokenizer.has_chat_template
    assert tokenizer.path == str(checkpoint)


def test_a_saved_truncation_does_not_cut_prompts(checkpoint: Path) -> None:
    file = checkpoint / "tokenizer.json"
    saved = json.loads(file.read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(saved))
    text = "Hello world, this is a test"
    tokenizer = load_tokenizer(str(checkpoint))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unknown_model_types_load(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "never_heard_of"}))
    assert load_tokenizer(str(checkpoint)).vocab_size == byte_level().vocab_size


def brings_code(checkpoint: Path, model_type: str = "never_heard_of") -> Path:
    """Makes the checkpoint's tokenizer need its own code; running that leaves the file that is returned."""
    (checkpoint / "config.json").write_text(json.dumps({"model_type": model_type}))
    trace = checkpoint / "ran"
    (checkpoint / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import PreTrainedTokenizerFast\n"
        f"Path({str(trace)!r}).write_text('')\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    file = checkpoint / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    file.write_text(json.dumps(settings))
    return trace


def test_code_is_refused_before_it_runs(checkpoint: Path) -> None:
    trace = brings_code(checkpoint)
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_tokenizer(str(checkpoint))
    assert not trace.exists()


def test_code_is_not_run_where_transformers_has_its_own(checkpoint: Path) -> None:
    trace = brings_code(checkpoint, "qwen3")
    load_tokenizer(str(checkpoint))
    assert not trace.exists()


def test_code_runs_when_trusted(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    trace = brings_code(checkpoint)
    assert load_tokenizer(str(checkpoint), trust_remote_code=True).vocab_size == byte_level().vocab_size
    assert trace.exists()


@pytest.mark.parametrize("broken", ["missing", "empty", "garbage"])
def test_failures_are_one_line(tmp_path: Path, broken: str) -> None:
    path = tmp_path / broken
    if broken != "missing":
        path.mkdir()
    if broken == "garbage":
        (path / "tokenizer.json").write_text("{]")
        (path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="--tokenizer-path") as caught:
        load_tokenizer(str(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_checkpoint_without_a_tokenizer_is_refused(checkpoint: Path) -> None:
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=f"{checkpoint} has no tokenizer; --tokenizer-path"):
        load_tokenizer(str(checkpoint))


def test_a_path_that_leads_nowhere_is_no_hub_id() -> None:
    with pytest.raises(ModelError, match="there is no directory /nowhere"):
        load_tokenizer("/nowhere")
