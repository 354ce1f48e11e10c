"""A real server over loopback: uvicorn in a thread, a FakeCore behind it, byte tokens between."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from opentelemetry.sdk.trace import TracerProvider
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pippin.client import EngineClient
from pippin.config import EngineConfig, ServerConfig
from pippin.server import create_app
from pippin.server.launch import HttpServer, http_config, listen
from pippin.text.chat import ChatTemplate
from pippin.text.tokenizer import Tokenizer, load_tokenizer
from tests.fake_core import EOS, FakeCore
from tests.waiting import SECONDS

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}{{ suffix }}"
)


def byte_tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    """Every token is the byte of its number; after them come the special ones."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    spelled = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    fast = FastTokenizer(models.BPE(vocab={spelled[b]: b for b in range(256)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<|end|>"])
    hf = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|end|>", chat_template=template)
    tokenizer = Tokenizer(hf)
    assert tokenizer.eos_ids == (EOS,)
    return tokenizer


@dataclass(frozen=True)
class Running:
    """A server that answers at ``url``, with its parts for tests to look into."""

    url: str
    client: EngineClient
    core: FakeCore
    loop: asyncio.AbstractEventLoop

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def http(self) -> httpx.Client:
        return httpx.Client(
            base_url=self.url, timeout=SECONDS, verify=False
        )  # reading certificates takes longer than a test

    def openai(self, key: str = "none") -> openai.OpenAI:
        options: Any = {"base_url": f"{self.url}/v1", "api_key": key, "max_retries": 0}
        return openai.OpenAI(**options, http_client=httpx.Client(timeout=SECONDS, verify=False))


@contextmanager
def serving(
    config: ServerConfig | None = None,
    seconds: float = 0.001,
    make_client: Callable[[FakeCore], EngineClient] | None = None,
    tokenizer: Tokenizer | None = None,
    provider: TracerProvider | None = None,
) -> Iterator[Running]:
    """A server in a thread until the block ends."""
    core = FakeCore(seconds)
    make = make_client or (lambda core: EngineClient.in_thread(lambda progress: core, seed=0))
    started, parts = threading.Event(), list[tuple[EngineClient, HttpServer, asyncio.AbstractEventLoop]]()
    listener = listen(ServerConfig(host="127.0.0.1", port=0))

    async def main() -> None:
        client = make(core)
        await client.start()
        text = tokenizer or byte_tokenizer()
        app = create_app(client, text, ChatTemplate(text), config or ServerConfig(), provider)
        http = HttpServer(http_config(app, config or ServerConfig()))
        parts.append((client, http, asyncio.get_running_loop()))
        started.set()
        await http.serve([listener])
        await client.close()

    thread = threading.Thread(target=asyncio.run, args=(main(),), name="server")
    thread.start()
    assert started.wait(SECONDS)
    client, http, loop = parts[0]
    try:
        host, port = listener.getsockname()
        yield Running(f"http://{host}:{port}", client, core, loop)
    finally:
        http.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


@pytest.fixture(scope="session")
def http(server: Running) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


@pytest.fixture(scope="session")
def ai(server: Running) -> Iterator[openai.OpenAI]:
    with server.openai() as client:
        yield client


@pytest.fixture(scope="session")
def demo() -> Iterator[Running]:
    """The shipped model, in a child process, behind a server."""
    config = EngineConfig(device="cpu", max_total_tokens=6000, random_seed=1)
    with serving(make_client=lambda core: EngineClient.spawn(config), tokenizer=load_tokenizer(None)) as running:
        yield running


Serve = Callable[..., AbstractContextManager[Running]]


@pytest.fixture
def serve() -> Serve:
    return serving
