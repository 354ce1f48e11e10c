"""Weights of real models replaced while the server listens: every token is that of a server which never had others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pippin import Engine
from tests.checkpoints import make_checkpoint
from tests.fake_core import PYTHONPATH
from tests.server.conftest import byte_tokenizer
from tests.server.test_lifecycle import free_port, wait_for
from tests.test_lora import as_mlx, draw

PROGRAM = """
import sys
from pippin.config import EngineConfig, ServerConfig
from pippin.server.launch import run
model, port, disk = sys.argv[1:]
engine = EngineConfig(model_path=model, device="cpu", max_total_tokens=2000, kv_disk=disk, kv_disk_gb=0.1)
run(engine, ServerConfig(port=int(port)))
"""
PROMPT = [97 + i * i % 26 for i in range(200)]
ASKED: dict[str, Any] = {
    "input_ids": PROMPT,
    "sampling_params": {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True},
}


def model(path: Path, seed: int, family: str = "qwen3", tokenizer: bool = True) -> Path:
    make_checkpoint(path, family, seed=seed, max_position_embeddings=512)
    if tokenizer:
        byte_tokenizer().hf.save_pretrained(path)
    return path


def fresh(path: Path, tokenizer: Path | None = None) -> list[int]:
    """What an engine of its own answers."""
    options: dict[str, Any] = {
        "device": "cpu",
        "max_total_tokens": 2000,
        "tokenizer_path": tokenizer and str(tokenizer),
    }
    with Engine(str(path), **options) as engine:
        answer = engine.generate(input_ids=PROMPT, sampling_params=ASKED["sampling_params"])
    tokens: list[int] = answer["output_ids"]
    return tokens


@pytest.fixture
def served(tmp_path: Path) -> Iterator[httpx.Client]:
    port = free_port()
    arguments = [str(model(tmp_path / "one", 0)), str(port), str(tmp_path / "disk")]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], env={**os.environ, "PYTHONPATH": PYTHONPATH}
    )
    try:
        wait_for(port, "/ready", 200)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, verify=False) as http:
            yield http
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_tokens_are_those_of_the_weights_that_are_served(served: httpx.Client, tmp_path: Path) -> None:
    one, two = tmp_path / "one", model(tmp_path / "two", 50, "llama", tokenizer=False)
    expected = {one: fresh(one), two: fresh(two, one)}
    assert expected[one] != expected[two]

    def answer() -> tuple[list[int], int]:
        found = served.post("/generate", json=ASKED).json()
        return found["output_ids"], found["meta_info"]["cached_tokens"]

    def update(path: Path) -> httpx.Response:
        return served.post("/update_weights_from_disk", json={"model_path": str(path)})

    assert answer() == (expected[one], 0)
    assert answer() == (expected[one], len(PROMPT) - 1)

    assert update(two).status_code == 200, "another architecture, whose directory has no tokenizer"
    info = served.get("/get_model_info").json()
    assert (info["model_path"], info["model_type"], info["tokenizer_path"]) == (str(two), "llama", str(one))
    assert answer() == (expected[two], 0), "neither memory nor the disk has anything for it"
    asked = {"prompt": "a", "max_tokens": 8, "structured_outputs": {"regex": "[xy]{4}"}}
    text = served.post("/v1/completions", json=asked).json()["choices"][0]["text"]
    assert len(text) == 4
    assert set(text) <= {"x", "y"}

    for broken, said in ((tmp_path / "none", "no directory"), (cut_off(two, tmp_path / "half"), "incomplete")):
        refused = update(broken)
        assert (refused.status_code, refused.json()["success"]) == (400, False)
        assert said in refused.json()["message"]
        assert f"{two} is served on" in refused.json()["message"]
        assert answer()[0] == expected[two]

    adapter = as_mlx(tmp_path / "adapter", draw(two, 3))
    loaded = served.post("/load_lora_adapter", json={"lora_name": "a", "lora_path": str(adapter)})
    assert loaded.status_code == 200, loaded.text
    (adapter / "adapters.safetensors").unlink()  # so that no other engine can load it
    refused = update(one)
    assert refused.status_code == 400, refused.text
    assert f"--lora-paths: a={adapter}" in refused.json()["message"]
    assert answer()[0] == expected[two]
    assert served.get("/get_model_info").json()["model_path"] == str(two)
    served.post("/unload_lora_adapter", json={"lora_name": "a"})

    assert update(one).status_code == 200
    tokens, cached = answer()
    assert tokens == expected[one]
    assert cached >= 128, "what the disk kept of it"

    model(one, 90)  # other weights in files of the same names and sizes
    assert update(one).status_code == 200
    found, cached = answer()
    assert (found, cached) == (fresh(one), 0)
    assert found != expected[one]


def cut_off(path: Path, to: Path) -> Path:
    """A checkpoint that is still being copied."""
    to.mkdir()
    for file in path.iterdir():
        data = file.read_bytes()
        (to / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    return to
