"""What the HTTP process tells the engine's, commands, and what it hears from there, events: ``msgspec`` structs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from pippin.types import CacheMiss, Finish, Pooling, Request, SamplingParams, TokenLogprob


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


class Output(msgspec.Struct, frozen=True, omit_defaults=True):
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


def output_of(
    request: Request,
    tokens: Sequence[int] = (),
    logprob: TokenLogprob | None = None,
    prompt_logprobs: Sequence[TokenLogprob] = (),
    pooled: bytes = b"",
) -> Output:
    """What is told of a request now, with what a step added to it."""
    return Output(
        request.id,
        [*tokens],
        [logprob] if logprob is not None else [],
        [*prompt_logprobs],
        request.num_cached,
        request.finish,
        request.miss,
        request.waited,
        pooled,
    )


class Stats(msgspec.Struct, frozen=True):
    """Counts of the engine now (first six lines) and since its start (the rest).

    Slots: some are free, some hold tokens that only the prefix cache wants (``slots_evictable``, a part of
    ``slots_cached``), and running requests hold the rest.
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
    slots_evictable: int = 0
    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    cached_tokens: int = 0
    prompt_tokens: int = 0
    retractions: int = 0
    overlapped_steps: int = 0
    step_seconds: float = 0.0
    graph_traces: int = 0
    graph_replays: int = 0
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
    kv_disk_computed_prefixes: int = 0
    kv_disk_computed_tokens: int = 0
    kv_disk_restore_rate: float = 0.0
    kv_disk_compute_rate: float = 0.0
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
