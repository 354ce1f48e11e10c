"""The nouns of a request's way: what is asked, what runs in a step, what comes of it.

Imports nothing of ours but the errors. ``msgspec`` structs go into ``messages`` and so cross the process boundary;
dataclasses stay inside the engine.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import msgspec

from pippin.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Token = int
Slot = int


GrammarKind = Literal["json_schema", "json_object", "regex", "grammar", "choice", "structural_tag"]


class Grammar(msgspec.Struct, frozen=True):
    """What an answer's text must be, as the request gave it.

    ``text``: by ``kind`` a JSON schema, nothing (any JSON object), a regex that the whole answer matches, GBNF or Lark,
    a JSON list of strings, or a JSON structural tag. ``field`` is the request's field, for errors.
    """

    kind: GrammarKind
    text: str = ""
    field: str = "grammar"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one answer is sampled. Names and defaults are SGLang's ``sampling_params``.

    ``temperature`` 0 is greedy. ``top_k`` -1 is off. ``seed`` None draws one when the request is made.
    ``n`` asks for that many answers; the engine itself sees ``n`` requests of one answer each.
    ``stop`` strings are found in the text, outside of the engine process; ``stop_token_ids`` in it.
    ``top_logprobs`` counts the alternatives reported beside each token when ``logprobs`` is set.
    ``prompt_logprobs`` reports each prompt token's logprob too, and so recomputes the whole prompt.
    ``lora_path`` is the name of a LoRA adapter that is loaded.
    ``grammar`` is what the answer's text must be; its end ends the answer, and nothing else but its limit does before.

    Raises RequestError naming the field that is out of range.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    no_stop_trim: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    grammar: Grammar | None = None
    lora_path: str | None = None

    def __post_init__(self) -> None:
        for name, ok, need in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            (
                "min_new_tokens",
                0 <= self.min_new_tokens <= self.max_new_tokens,
                "between 0 and max_new_tokens",
            ),
            ("temperature", 0.0 <= self.temperature <= 1e6, "between 0 (greedy) and 1000000"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("top_k", self.top_k == -1 or 1 <= self.top_k < 2**31, "-1 (off) or at least 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "between -2 and 2"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "between -2 and 2"),
            ("repetition_penalty", 0.0 < self.repetition_penalty <= 2.0, "above 0 and at most 2"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**64, "an integer of 64 bits"),
            ("n", 1 <= self.n <= 128, "between 1 and 128"),
            ("top_logprobs", 0 <= self.top_logprobs <= 100, "between 0 and 100"),
            ("stop", all(self.stop), "strings that are not empty"),
            ("stop_token_ids", all(t >= 0 for t in self.stop_token_ids), "token ids of 0 or above"),
            (
                "logit_bias",
                all(-100.0 <= b <= 100.0 for b in self.logit_bias.values()),
                "between -100 and 100",
            ),
        ):
            if not ok:
                raise RequestError(f"{name} must be {need}, not {getattr(self, name)!r}", name)


class Pooling(msgspec.Struct, frozen=True):
    """What is asked of a prompt in place of an answer: one vector.

    ``last``: the model's hidden state (before its head) at the last token; ``mean``: the mean over all tokens.
    ``labels``: the log probabilities of these tokens as the next one.
    """

    kind: Literal["last", "mean", "labels"]
    labels: tuple[int, ...] = ()


FinishReason = Literal["stop", "length", "abort", "error"]


class Finish(msgspec.Struct, frozen=True):
    """Why a request ended. ``matched`` is the token id or the string that stopped it, if one did.

    With ``error``: ``message`` says what went wrong, ``field`` names the request's field at fault (if one is),
    and ``status`` is the HTTP status, below 500 if another request would be fine.
    """

    reason: FinishReason
    matched: int | str | None = None
    message: str = ""
    field: str | None = None
    status: int = 500


def failed(error: RequestError) -> Finish:
    """How a request ends that can't be served."""
    return Finish("error", None, error.message, error.field, error.status)


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token's natural-log probability under the model itself, before penalties, bias, grammar and temperature.

    ``logprob`` is None for a prompt's first token. ``top`` lists the likeliest alternatives, best first.
    """

    token: int
    logprob: float | None
    top: list[tuple[int, float]] = []


class CacheMiss(msgspec.Struct, frozen=True):
    """Why the prefix cache had no more of a prompt than it gave.

    ``cold``: nothing is cached. ``diverged``: what is cached goes on otherwise, from ``token`` on. ``evicted``: it was
    cached from ``token`` on, and gave way. ``no_snapshot``: K and V are there up to ``token``, but no recurrent state.
    ``no_window``: they are, but not any more in layers with a sliding window.
    """

    reason: Literal["cold", "diverged", "evicted", "no_snapshot", "no_window"]
    token: int = 0


# --- inside the engine ---


class LoraAdapter(Protocol):
    """A loaded LoRA adapter; ``key`` is no other's, of the same name neither."""

    @property
    def key(self) -> str: ...


class Matcher(Protocol):
    """One answer's place in its grammar: it has taken the tokens that the host has seen, and no others."""

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""

    def take(self, token: Token) -> None:
        """Goes on by a token of the answer. Raises RequestError if it can't follow, or the grammar is too complex."""

    def forced(self) -> list[Token]:
        """The tokens that come next whatever the model says; often none."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Request:
    """One answer in the making. Only the scheduler writes it.

    Positions: ``tokens`` are those that the host has seen, prompt first. ``length`` counts tokens that exist,
    so ``length - len(tokens)`` are still on the device (0 or 1, in the row of the runner's ``last_token``).
    ``computed`` counts tokens whose K and V are in their slots once the steps queued so far have run.
    ``slots[i]`` is the slot of token i; there are always at least ``computed`` of them.
    ``shared`` counts leading slots that the radix tree owns; the rest are this request's own.
    ``row`` is its line in the device tables while it runs, -1 otherwise. ``limit`` is how many tokens it ends with.
    ``seq`` numbers requests as they are added; ``retractions`` counts how often this one lost its slots;
    ``scored`` prompt tokens have had their rows' logprobs asked for (``prompt_logprobs``).
    ``matcher`` is its place in its grammar, if it has one: the steps that draw for it wait for their masks.
    ``restore`` is the snapshot of recurrent state that its next Work begins with, ``saved`` the latest made for it.
    ``miss`` says why no more of the prompt came from the cache. ``arrival`` and ``entered`` are seconds of
    time.monotonic: when it came, and when it first left the queue (None before).
    ``pooling`` asks for a vector and no tokens; ``pooled`` float32 [n] is the sum of what the steps read so far gave.
    With ``pools_all`` ``summed`` tokens are in that, and ``scored`` will be. ``adapter`` changes the model for it.
    """

    id: str
    tokens: list[Token]
    num_prompt: int
    params: SamplingParams
    priority: int = 0
    arrival: float = 0.0
    eos: frozenset[int] = frozenset()
    length: int = 0
    computed: int = 0
    slots: array[int] = field(default_factory=lambda: array("i"))
    shared: int = 0
    row: int = -1
    limit: int = 0
    num_cached: int = 0
    pin: object | None = None
    finish: Finish | None = None
    seq: int = 0
    retractions: int = 0
    scored: int = 0
    matcher: Matcher | None = None
    restore: int | None = None
    saved: int = 0
    miss: CacheMiss | None = None
    entered: float | None = None
    pooling: Pooling | None = None
    pooled: npt.NDArray[np.float32] | None = None
    summed: int = 0
    adapter: LoraAdapter | None = None

    @property
    def pools_all(self) -> bool:
        """Whether its vector hangs on each of its tokens, and not on the last alone."""
        return self.pooling is not None and self.pooling.kind == "mean"

    @property
    def waited(self) -> float:
        """Seconds in the queue before it first ran; 0 if it hasn't yet."""
        return 0.0 if self.entered is None else self.entered - self.arrival

    def __post_init__(self) -> None:
        self.length = len(self.tokens)


class Work(NamedTuple):
    """Compute tokens[start:end] of a request in this step; if ``samples``, draw token ``end`` from the last.

    A whole prompt, a chunk of one, a resumed request and a decode differ only in their bounds.
    ``logprobs_from``: also report the logprobs of prompt tokens from this index (<= end) on; None for none.
    ``restore``: begin with this snapshot of recurrent state, which may be one that another work of the step makes; None
    goes on with the row's own. ``save``: keep the state after ``end`` under this id.
    ``pools_from``: tokens from this index on go into the request's vector (``Request.pooling``); None for none.
    """

    request: Request
    start: int
    end: int
    samples: bool
    logprobs_from: int | None = None
    restore: int | None = None
    save: int | None = None
    pools_from: int | None = None

    @property
    def decodes(self) -> bool:
        """Whether it computes one generated token, which no one else can read: prompt pages are shared at once."""
        return self.samples and self.end - self.start == 1 and self.start >= self.request.num_prompt


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work; decodes first, then prefills, no request twice."""

    works: tuple[Work, ...]

    @property
    def num_tokens(self) -> int:
        return sum(w.end - w.start for w in self.works)


@dataclass(slots=True)
class RowResult:
    """What a step computed for one Work: the token it drew, if it samples, and logprobs if asked for.

    ``finite`` is False where the logits held no finite maximum: the token means nothing then.
    ``finish`` is set where the request's grammar ended with this token, or can't go on.
    ``pooled`` float32 [n] is what the step adds to the request's vector.
    """

    token: Token | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: Sequence[TokenLogprob] = ()
    finite: bool = True
    finish: Finish | None = None
    pooled: npt.NDArray[np.float32] | None = None
