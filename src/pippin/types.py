"""The nouns of a request's way: what is asked, what runs in a step, what comes back.

Imports nothing of ours but the errors. ``msgspec`` structs cross the process boundary; dataclasses stay
inside the engine.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

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
    ``row`` is its line in the device tables while it runs, -1 otherwise.
    ``seq`` numbers requests as they are added; ``retractions`` counts how often this one lost its slots;
    ``scored`` prompt tokens have had their rows' logprobs asked for (``prompt_logprobs``).
    ``matcher`` is its place in its grammar, if it has one: the steps that draw for it wait for their masks.
    ``restore`` is the snapshot of recurrent state that its next Work begins with, ``saved`` the latest made for it.
    ``miss`` says why no more of the prompt came from the cache. ``arrival`` and ``entered`` are seconds of
    time.monotonic: when it came, and when it first left the queue (None before).
    ``pooling`` asks for a vector and no tokens; ``pooled`` float32 [n] is the sum of what the steps read so far gave,
    and ``scored`` counts the tokens that are in it (``mean``). ``adapter`` changes the model for it.
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
    adapter: LoraAdapter | None = None

    @property
    def waited(self) -> float:
        """Seconds in the queue before it first ran; 0 if it hasn't yet."""
        return 0.0 if self.entered is None else self.entered - self.arrival

    def __post_init__(self) -> None:
        self.length = len(self.tokens)


@dataclass(frozen=True, slots=True)
class Work:
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


# --- between the HTTP process and the engine process ---


class Submit(msgspec.Struct, frozen=True, tag=True):
    """A request. ``tokens`` may already hold generated ones (a resumed stream): ``num_prompt`` says which.

    With ``pooling``, ``params`` mean nothing: the answer is one Output with a vector.
    """

    id: str
    tokens: list[int]
    num_prompt: int
    params: SamplingParams
    priority: int = 0
    pooling: Pooling | None = None


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Ends a request; the answer is an Output with finish reason ``abort``. Unknown ids are ignored."""

    id: str


class Flush(msgspec.Struct, frozen=True, tag=True):
    """Empties the prefix cache; the answer is a Flushed. Refused while requests run."""

    id: str


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Reads a LoRA adapter from a directory; the answer is AdaptersChanged."""

    id: str
    name: str
    path: str


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Forgets a LoRA adapter; the answer is AdaptersChanged. Requests that have it end with it."""

    id: str
    name: str


class StartProfile(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Records the engine's steps; the answer is a ProfileStarted, then Marks come until one that has ``ended``.

    ``num_steps`` steps from step ``start_step`` of the engine on, or until stopped; with ``by_stage``, so many that
    compute prompts and so many that only decode. ``gpu``: also what the device's own profiler takes (None: if it can);
    its files are ``stem`` with a suffix (see ``profile.files``).
    """

    id: str
    stem: str
    num_steps: int | None = None
    start_step: int | None = None
    by_stage: bool = False
    gpu: bool | None = None


class StopProfile(msgspec.Struct, frozen=True, tag=True):
    """Ends the profile of this id, if it still runs, after the step in flight."""

    id: str


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Asks for a Pong, which comes between two steps: the engine's loop turns."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Ends the engine process after the step in flight."""


Command = Submit | Abort | Flush | LoadAdapter | UnloadAdapter | StartProfile | StopProfile | Ping | Shutdown


class Span(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Something that took from ``start`` to ``end``, nanoseconds of ``time.perf_counter_ns``, shown in a lane.

    ``step`` is the number of the engine's step that it belongs to, ``group`` keeps spans of one thing in one row.
    """

    lane: str
    name: str
    start: int
    end: int
    step: int | None = None
    group: str = ""
    args: dict[str, str | int | float | bool] | None = None


class Output(msgspec.Struct, frozen=True):
    """What a step added to one request. ``tokens`` are new ones only; the last Output has ``finish``.

    ``waited`` is how many seconds the request was queued in the engine before it first ran.
    ``pooled`` is the vector that a request with ``pooling`` asked for: float32, little-endian.
    """

    id: str
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    prompt_logprobs: list[TokenLogprob] = []
    num_cached: int = 0
    finish: Finish | None = None
    miss: CacheMiss | None = None
    waited: float = 0.0
    pooled: bytes = b""


class Stats(msgspec.Struct, frozen=True):
    """Counts of the engine now (first four lines) and since its start (the rest).

    ``memory_bytes`` is what MLX's arrays hold now on its device, ``memory_peak_bytes`` the most they held.
    ``restarts`` of its process and ``resumed`` requests are the server's own counts.
    ``window_slots_total`` are those of layers with a sliding window, where they have their own: ``_free`` belong to no
    token, ``_cached`` to tokens that no running request's window reaches.
    ``memory_process_bytes`` is what the engine's process holds, ``memory_level`` how short memory is (``watermarks``).
    """

    num_running: int = 0
    num_waiting: int = 0
    slots_total: int = 0
    slots_free: int = 0
    slots_cached: int = 0
    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    cached_tokens: int = 0
    prompt_tokens: int = 0
    retractions: int = 0
    overlapped_steps: int = 0
    step_seconds: float = 0.0
    graph_traces: int = 0
    forced_tokens: int = 0
    snapshots: int = 0
    snapshots_evicted: int = 0
    misses: dict[str, int] = {}
    memory_bytes: int = 0
    memory_peak_bytes: int = 0
    memory_process_bytes: int = 0
    memory_level: Literal["ok", "soft", "hard"] = "ok"
    kv_canary_mismatches: int = 0
    restarts: int = 0
    resumed: int = 0
    kv_disk_restoring: int = 0
    kv_disk_hit_tokens: int = 0
    kv_disk_bytes: int = 0
    kv_disk_read_bytes: int = 0
    kv_disk_written_bytes: int = 0
    kv_disk_drops: dict[str, int] = {}
    window_slots_total: int = 0
    window_slots_free: int = 0
    window_slots_cached: int = 0


class StepOutput(msgspec.Struct, frozen=True, tag=True):
    """One message a step, for all requests that it touched."""

    outputs: list[Output]
    stats: Stats


class Flushed(msgspec.Struct, frozen=True, tag=True):
    id: str
    ok: bool
    message: str = ""


class Pong(msgspec.Struct, frozen=True, tag=True):
    """The answer to a Ping."""


class AdaptersChanged(msgspec.Struct, frozen=True, tag=True):
    """The LoRA adapters that are loaded now, name to path; ``error`` says why nothing changed, ``field`` at what."""

    id: str
    adapters: dict[str, str]
    error: str = ""
    field: str | None = None
    status: int = 400


class ProfileStarted(msgspec.Struct, frozen=True, tag=True):
    """A profile runs now, or not: ``error`` says why, ``field`` at what.

    ``clock`` is the engine's perf_counter_ns as it was sent, ``pid`` its process; 0 if there is none.
    """

    id: str
    clock: int
    pid: int
    error: str = ""
    field: str | None = None


class Marks(msgspec.Struct, frozen=True, tag=True):
    """What a profile noted since the last of these (see ``profile.marks``).

    The last brings captures that are complete, or why they failed.
    """

    id: str
    marks: list[int]
    ended: bool = False
    files: list[str] = []
    error: str = ""


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Loading goes on: ``stage`` is download, unpack, load, quantize, save, probe or warm-up; 0 <= done <= total."""

    stage: str
    done: int
    total: int


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is served, for /get_model_info, /get_server_info and the text layer.

    ``vocab_size`` counts ids that are tokens; the model's own may be padded beyond.
    ``is_embedding``: it is there for its vectors alone. ``pooling`` is how a text's vector is made (``Pooling.kind``;
    empty: not at all), ``normalizes`` whether it is then scaled to length 1.
    ``window_slots`` are those of layers whose sliding window is ``window`` tokens or less, where they have their own.
    ``budget_bytes`` is what all parts of memory fit in, of the ``device_bytes`` that other engines leave.
    """

    model_path: str
    tokenizer_path: str
    model_type: str
    dtype: str
    quantization: str | None
    vocab_size: int
    context_length: int
    eos_token_ids: list[int]
    attention_backend: str
    attention_reason: str
    max_total_tokens: int
    max_running_requests: int
    chunked_prefill_size: int
    page_size: int
    weight_bytes: int
    pool_bytes: int
    device: str
    weights_path: str = ""
    max_mamba_cache_size: int = 0
    state_bytes: int = 0
    is_embedding: bool = False
    pooling: str = ""
    normalizes: bool = True
    activation_bytes: int = 0
    copy_bytes: int = 0
    budget_bytes: int = 0
    device_bytes: int = 0
    adapter_bytes: int = 0
    lora_paths: dict[str, str] = {}
    window_slots: int = 0
    window: int = 0


class Ready(msgspec.Struct, frozen=True, tag=True):
    info: ModelInfo


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """The engine can't start or go on. ``kind`` is the error's class name (ModelError, ConfigError, …)."""

    kind: str
    message: str


Event = StepOutput | Flushed | AdaptersChanged | Pong | ProfileStarted | Marks | Progress | Ready | Fatal
