"""One model in place of another in an ``Engine``: tokens are those of what is served, and nobody is lost meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pippin.engine
from pippin import Engine
from pippin.client import EngineClient
from pippin.config import EngineConfig
from pippin.errors import ConfigError, EngineError, ModelError, RequestError
from pippin.exchange import Door
from pippin.messages import Progress
from pippin.worker import Load
from tests.fake_core import FakeCore, Gate, expected
from tests.server.conftest import byte_tokenizer
from tests.server.test_weights_real import PROMPT, fresh, model
from tests.tokenizers_for_tests import byte_ids
from tests.waiting import until

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}


def tokens_of(engine: Engine) -> list[int]:
    found: list[int] = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]
    return found


def test_tokens_are_those_of_the_weights_that_are_served(tmp_path: Path) -> None:
    one, two = model(tmp_path / "one", 0), model(tmp_path / "two", 50, "llama", tokenizer=False)
    expected = {one: fresh(one), two: fresh(two, one)}
    assert expected[one] != expected[two]
    with Engine(str(one), device="cpu", max_total_tokens=2000) as engine:
        assert tokens_of(engine) == expected[one]
        assert engine.update_weights_from_disk(str(two)) == (True, f"{two} is served now", 0)
        assert engine.info.model_type == "llama"
        assert engine.config.model_path == engine.get_server_info()["model_path"] == str(two)
        assert [tokens_of(engine) for _ in range(2)] == [expected[two]] * 2
        assert engine.generate("hello", GREEDY)["text"], "the tokenizer has stayed"
        ok, message, _ = engine.update_weights_from_disk(str(tmp_path / "three"))
        assert not ok
        assert message.endswith(f"{two} is served on")
        assert tokens_of(engine) == expected[two]
        model(one, 7)  # other weights at the same path
        assert engine.update_weights_from_disk(str(one))[0]
        assert tokens_of(engine) == fresh(one) != expected[one]


# --- over an engine without a model ---


def no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(config: EngineConfig) -> None:
        if config.model_path == "refused":
            raise ModelError("it is refused.")

    monkeypatch.setattr(pippin.engine, "check", check)
    monkeypatch.setattr(pippin.engine, "load_tokenizer", lambda *_, **__: byte_tokenizer())


class Models:
    """Loads FakeCores, and fails for what ``broken`` names."""

    def __init__(self, gate: Gate | None = None) -> None:
        self.gate = gate
        self.broken: set[str | None] = set()
        self.loaded: list[str | None] = []
        self.threads: list[threading.Thread] = []

    def __call__(self, config: EngineConfig) -> Load:
        def load(tell: Callable[[Progress], None]) -> FakeCore:
            self.loaded.append(config.model_path)
            self.threads.append(threading.current_thread())
            if config.model_path in self.broken:
                raise ConfigError("there is no memory for it", "--max-total-tokens")
            core = FakeCore(0.0, config.model_path or "fake")
            core.gate = self.gate if config.model_path == "one" else None
            return core

        return load


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(Gate(tmp_path / "gate"))


@pytest.fixture
def engine(models: Models, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    no_checks(monkeypatch)
    config = EngineConfig(model_path="one")
    client = EngineClient.in_thread(models(config), 0, models)
    with Engine.over(client, byte_ids(), config) as made:
        yield made


def test_what_runs_is_finished_and_what_comes_waits(engine: Engine, models: Models) -> None:
    prompt, answers = [5, 6, 7], list[dict[str, Any]]()

    def ask() -> None:
        answers.append(engine.generate(input_ids=prompt, sampling_params=GREEDY))

    assert models.gate is not None
    with models.gate.held():
        first = threading.Thread(target=ask)
        first.start()
        until(lambda: len(engine._client.live) == 1)
        told = list[tuple[bool, str, int]]()
        updating = threading.Thread(target=lambda: told.append(engine.update_weights_from_disk("two")))
        updating.start()
        until(lambda: not engine._door.is_open)
        second = threading.Thread(target=ask)
        second.start()
        until(lambda: engine._door.waited == 1)
        assert models.loaded == ["one"]
        with pytest.raises(RequestError, match="being replaced already"):
            engine.update_weights_from_disk("three")
    for thread in (first, updating, second):
        thread.join()
    assert told == [(True, "two is served now", 1)]
    assert models.loaded == ["one", "two"]
    assert [a["output_ids"] for a in answers] == [expected(prompt, 12)] * 2
    assert engine.get_server_info()["model_path"] == "two"
    assert not models.threads[0].is_alive(), "its memory is free"


def test_a_model_that_can_not_be_loaded_leaves_the_one_before(engine: Engine, models: Models) -> None:
    models.broken.add("two")
    ok, message, _ = engine.update_weights_from_disk("two")
    assert not ok
    assert message == "--max-total-tokens: there is no memory for it; one is served on"
    assert models.loaded == ["one", "two", "one"]
    assert engine.generate(input_ids=[5], sampling_params=GREEDY)["output_ids"] == expected([5], 12)
    assert engine.update_weights_from_disk("refused")[1] == "it is refused; one is served on"
    assert len(models.loaded) == 3, "what is refused beforehand ends nothing"


def test_if_neither_can_be_loaded_all_is_told_so(engine: Engine, models: Models) -> None:
    models.broken |= {"one", "two"}
    with pytest.raises(ConfigError, match="no memory"):
        engine.update_weights_from_disk("two")
    with pytest.raises(ConfigError, match="no memory"):
        engine.generate(input_ids=[5], sampling_params=GREEDY)


def test_what_can_not_be_asked_is_named(engine: Engine) -> None:
    with pytest.raises(RequestError, match="safetensors") as raised:
        engine.update_weights_from_disk("two", load_format="dummy")
    assert raised.value.field == "load_format"
    with pytest.raises(RequestError) as raised:
        engine.update_weights_from_disk("")
    assert raised.value.field == "model_path"


def test_what_was_prepared_for_a_model_that_is_gone_is_not_let_in() -> None:
    async def main() -> None:
        door = Door()
        async with door.inside(0):
            pass
        async with door.alone():
            with pytest.raises(EngineError, match="ask again"):
                async with door.inside(0):
                    pass
            door.model += 1
        with pytest.raises(EngineError, match="ask again"):
            async with door.inside(0):
                pass
        async with door.inside(1):
            pass

    asyncio.run(main())
