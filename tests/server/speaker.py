"""An engine that says what a test wants it to say, token by token, behind a real server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import msgspec

from pippin.client import EngineClient
from pippin.config import ServerConfig
from pippin.messages import Submit
from tests.fake_core import EOS, FakeCore
from tests.server.conftest import Running, byte_tokenizer, serving

TEMPLATE = (
    "{% if tools %}tools:{{ tools | length }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ROOM = 60_000


class Speaker(FakeCore):
    """Answers with the text whose name is the last line of the prompt's last message, else with ``otherwise``.

    ``before`` is told how many tokens of an answer have been said, before each; until it returns nothing is said.
    """

    def __init__(
        self, answers: Mapping[str, str], otherwise: str, seconds: float, before: Callable[[int], object]
    ) -> None:
        super().__init__(seconds)
        self._before = before
        self.info = msgspec.structs.replace(self.info, context_length=ROOM)
        self._answers = answers
        self._otherwise = otherwise

    def draw(self, submit: Submit, tokens: list[int]) -> int:
        last = bytes(t for t in submit.tokens if t < 256).decode().rsplit("\n", 2)[-2].partition(":")[2]
        answer = self._answers.get(last, self._otherwise).encode()
        said = len(tokens) - submit.num_prompt
        self._before(said)
        return answer[said] if said < len(answer) else EOS


@contextmanager
def speaking(
    answers: Mapping[str, str],
    otherwise: str = "Hello.",
    seconds: float = 0.001,
    config: ServerConfig | None = None,
    before: Callable[[int], object] = lambda said: None,
) -> Iterator[Running]:
    def make(core: FakeCore) -> EngineClient:
        return EngineClient.in_thread(lambda progress: Speaker(answers, otherwise, seconds, before), seed=0)

    config = config or ServerConfig(tool_call_parser="qwen", reasoning_parser="qwen3")
    with serving(config, make_client=make, tokenizer=byte_tokenizer(TEMPLATE)) as running:
        yield running
