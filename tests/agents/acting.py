"""An engine that acts a coding agent's model: it calls the tool that it is told to, and answers from the result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from pippin.client import EngineClient
from pippin.config import ServerConfig
from pippin.messages import Submit
from tests.fake_core import EOS, FakeCore
from tests.server.conftest import Running, byte_tokenizer, serving
from tests.server.speaker import TEMPLATE

ROOM = 2_000_000  # bytes: an agent's prompt has up to 200 thousand
ASIDE = "A note about apples"  # what agents ask for beside, such as a title


@dataclass(frozen=True, slots=True)
class Part:
    """``line`` where there are tools, or to every prompt if ``anywhere``; ``ending`` once the prompt has ``found``."""

    line: str
    found: str
    ending: str
    anywhere: bool = False

    def says(self, prompt: str) -> str:
        if self.found in prompt:
            return self.ending
        return self.line if self.anywhere or prompt.startswith("tools:") else ASIDE


class Actor(FakeCore):
    """Plays a part, a byte a step."""

    def __init__(self, part: Part) -> None:
        super().__init__(0.0)
        self.info = msgspec.structs.replace(self.info, context_length=ROOM, max_total_tokens=2 * ROOM)
        self._part = part
        self._said: dict[str, bytes] = {}

    def draw(self, submit: Submit, tokens: list[int]) -> int:
        if submit.id not in self._said:
            self._said[submit.id] = self._part.says(bytes(t for t in submit.tokens if t < EOS).decode()).encode()
        answer, said = self._said[submit.id], len(tokens) - submit.num_prompt
        return answer[said] if said < len(answer) else EOS


@contextmanager
def acting(part: Part) -> Iterator[Running]:
    def make(core: FakeCore) -> EngineClient:
        return EngineClient.in_thread(lambda progress: Actor(part), seed=0)

    config = ServerConfig(tool_call_parser="qwen", reasoning_parser="qwen3")
    with serving(config, make_client=make, tokenizer=byte_tokenizer(TEMPLATE)) as running:
        yield running
