"""When a request ends, and which can't be served at all. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass

from pippin.errors import RequestError
from pippin.types import Finish, Request


@dataclass(frozen=True, slots=True)
class Limits:
    """What a model and its pool allow: ``context_length`` tokens, of which ``capacity`` have slots at a time."""

    context_length: int
    capacity: int

    def check(self, request: Request) -> None:
        """Raises RequestError if its prompt can't be served."""
        if not 1 <= request.num_prompt <= len(request.tokens):
            raise RequestError("the prompt is empty; it needs at least one token", "prompt")
        if request.num_prompt >= self.context_length + (request.pooling is not None):
            raise RequestError(
                f"the prompt has {request.num_prompt} tokens, and the context length is {self.context_length}, "
                "with at least one for the answer; shorten the prompt",
                "prompt",
            )
        if request.num_prompt > self.capacity:
            raise RequestError(
                f"the prompt has {request.num_prompt} tokens, and the KV cache has room for "
                f"{self.capacity}; shorten the prompt, or start with a larger --max-total-tokens",
                "prompt",
            )

    def of(self, request: Request) -> int:
        """A request's ``limit``. The last token needs no slot: nothing is drawn from it."""
        if request.pooling is not None:
            return request.num_prompt + 1
        asked = request.num_prompt + request.params.max_new_tokens
        return min(asked, self.context_length, self.capacity + 1)


def end_with(request: Request, token: int, ended: Finish | None) -> Finish | None:
    """How a request ends with ``token``, its newest, if it does. ``ended``: how it does by its grammar."""
    params, length = request.params, len(request.tokens)
    stops = token in params.stop_token_ids or (token in request.eos and not params.ignore_eos)
    if stops and length - request.num_prompt >= params.min_new_tokens:
        return Finish("stop", token)
    if ended is not None:
        return ended
    return Finish("length") if length >= request.limit else None
