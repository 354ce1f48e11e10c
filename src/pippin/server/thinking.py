"""A limit to reasoning: when it is spent, the end of reasoning is written for the model, and it goes on from there.

Nothing in the engine knows of it: the request is ended and sent again with the words that close its reasoning, and
what was computed is found in the prefix cache.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec

from pippin.client import EngineClient
from pippin.messages import ModelInfo, Output
from pippin.profile.timeline import Timeline
from pippin.text.detokenizer import detokenizer
from pippin.text.parts import Reasoning
from pippin.text.reply import Reply, Speech
from pippin.text.tokenizer import Tokenizer
from pippin.types import SamplingParams


class Budgeted:
    """An EngineClient whose answers reason for ``budget`` tokens at most. ``prompt`` is the text before them."""

    def __init__(self, client: EngineClient, tokenizer: Tokenizer, speech: Speech, prompt: str, budget: int) -> None:
        assert speech.reasoning is not None
        self._client = client
        self._tokenizer = tokenizer
        self._speech = speech
        self._format = speech.reasoning
        self._prompt = prompt
        self._budget = budget

    @property
    def info(self) -> ModelInfo:
        return self._client.info

    @property
    def timeline(self) -> Timeline | None:
        return self._client.timeline

    def abort(self, id: str) -> None:
        self._client.abort(id)

    async def submit(
        self, tokens: Sequence[int], params: SamplingParams, priority: int = 0, id: str | None = None
    ) -> AsyncGenerator[Output, None]:
        """``EngineClient.submit``; the tokens that close the reasoning come as if the model had drawn them."""
        watch = Watch(self._tokenizer, self._speech, self._prompt)
        drawn: list[int] = []
        outputs = self._client.submit(tokens, params, priority, id)
        async with aclosing(outputs):
            async for output in outputs:
                taken = output.tokens[: max(1, self._budget - len(drawn))] if watch.reasons else output.tokens
                drawn += taken
                watch.see(taken)
                closing = self._closing(params, len(drawn)) if watch.reasons and len(drawn) >= self._budget else []
                if not closing or (output.finish is not None and taken == output.tokens):
                    yield output
                    continue
                yield msgspec.structs.replace(output, tokens=[*taken, *closing], finish=None)
                break
            else:
                return
        rest = self._client.submit([*tokens, *drawn, *closing], params, priority, id, len(tokens))
        async with aclosing(rest):
            async for more in rest:
                yield msgspec.structs.replace(more, num_cached=output.num_cached)

    def _closing(self, params: SamplingParams, drawn: int) -> list[int]:
        """The tokens that end the reasoning; none if there would be no room for an answer behind them."""
        closing = self._tokenizer.encode(self._format.closing, add_special_tokens=False)
        return closing if drawn + len(closing) < params.max_new_tokens else []


class Watch:
    """Whether an answer is reasoning at the moment."""

    def __init__(self, tokenizer: Tokenizer, speech: Speech, prompt: str) -> None:
        assert speech.reasoning is not None
        self._text = detokenizer(tokenizer, shown=speech.shown)
        self._reply = Reply(speech, prompt, None)
        self._begin = speech.reasoning.begin
        self._begun = speech.reasoning.thinks(prompt)
        self._answers = False
        self._seen = ""

    @property
    def reasons(self) -> bool:
        return self._begun and not self._answers

    def see(self, tokens: Sequence[int]) -> None:
        if self._answers:
            return
        text = "".join(self._text.push(token) for token in tokens)
        if not self._begun:
            self._seen += text
            self._begun = self._begin in self._seen
        self._answers = any(not isinstance(part, Reasoning) for part in self._reply.push(text))
