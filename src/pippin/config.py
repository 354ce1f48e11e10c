"""Start-up options, resolved once and then frozen.

Field names are SGLang's flag names with underscores; ``help`` is what the command line prints. The command
line is made from these classes, so an option exists exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from pippin.errors import ConfigError

DTYPES = ("auto", "float32", "float16", "bfloat16")
KV_CACHE_DTYPES = ("auto", "int8", "fp8", "fp8_e4m3", "int4")
QUANTIZATIONS = ("mlx_q4", "mlx_q8", "mlx_4bit", "mlx_8bit")
KV_CANARIES = ("none", "raise")
POOLINGS = ("auto", "last", "mean")
DEVICES = ("auto", "cpu", "gpu", "torch", "torch:cpu", "torch:cuda", "torch:mps")


def option(default: Any, help: str, flag: str | None = None, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field that is also a command-line option; ``flag`` adds a second spelling."""
    return field(default=default, metadata={"help": help, "flag": flag, "choices": choices})


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How the model is loaded and run."""

    model_path: str | None = option(
        None, "Local directory, .gguf file or hub id; the shipped demo model if left out.", "--model"
    )
    tokenizer_path: str | None = option(None, "Tokenizer's directory or hub id, if it is not the model's.")
    revision: str | None = option(None, "Branch, tag or commit on the hub.")
    trust_remote_code: bool = option(
        False, "Run code that comes with the checkpoint. Off: such a checkpoint is refused."
    )
    dtype: str = option(
        "auto",
        "Weights and activations; auto keeps the checkpoint's on a GPU and takes float32 on a CPU.",
        choices=DTYPES,
    )
    quantization: str | None = option(None, "Quantize while loading.", choices=QUANTIZATIONS)
    kv_cache_dtype: str = option(
        "auto",
        "How K and V are stored: auto: as they are computed; int8 and fp8 (e4m3) take half of 16 bits, int4 a third.",
        choices=KV_CACHE_DTYPES,
    )
    context_length: int | None = option(None, "Most tokens a request may have; the model's own maximum if left out.")
    attention_backend: str = option("mlx", "mlx chooses at load what is exact for the model; or a backend's name.")
    device: str = option(
        "auto",
        "Where the model runs; torch: on PyTorch's own CPU, CUDA or MPS, by transformers, as a reference.",
        choices=DEVICES,
    )
    mem_fraction_static: float | None = option(
        None, "Share of the device's memory for weights and KV slots together (0.8 on a GPU)."
    )
    max_total_tokens: int | None = option(None, "KV slots, instead of sizing them from memory.")
    max_running_requests: int | None = option(None, "Most requests in one step (256 on a GPU, 32 on a CPU).")
    chunked_prefill_size: int | None = option(
        None, "Most prompt tokens in one step (2048 on a GPU, 512 on a CPU); longer prompts go in chunks."
    )
    page_size: int = option(
        0,
        "Slots allocated, shared and evicted together; 0: 16 where kernels read the KV pool by page, 1 elsewhere "
        "and for models with recurrent state.",
    )
    schedule_policy: str = option(
        "fcfs", "Who waits first: first come, or the longest cached prefix.", choices=("fcfs", "lpm")
    )
    disable_radix_cache: bool = option(False, "Do not reuse the K and V of earlier requests.")
    swa_full_tokens_ratio: float | None = option(
        None,
        "Slots of layers with a sliding window, as a share of those of all others. If left out a sixth, but "
        "enough for eight requests and a long prompt's chunk; where memory is left, for --max-running-requests.",
    )
    disable_hybrid_swa_memory: bool = option(
        False, "Keep as many slots in layers with a sliding window as in all others."
    )
    kv_canary: str = option(
        "none",
        "raise: check before each step that every slot it reads holds its own prefix, and end a request where not.",
        choices=KV_CANARIES,
    )
    kv_disk: str | None = option(
        None, "Directory that keeps the K and V of prefixes beyond memory and restarts; servers may share one."
    )
    kv_disk_gb: float = option(20.0, "Most that --kv-disk may take, in GiB; the longest unused goes first.")
    kv_disk_restore: str = option(
        "auto",
        "auto: a prefix on disk is computed where the engine has seen that this is faster. always: it is read.",
        choices=("auto", "always"),
    )
    max_mamba_cache_size: int | None = option(
        None, "Most snapshots of recurrent state kept for reuse (hybrid models); 0 keeps none. From memory if left out."
    )
    disable_overlap_schedule: bool = option(False, "Finish each step before the next is built.")
    disable_graph: bool = option(
        False, "Build every step anew instead of compiling the small ones.", "--disable-cuda-graph"
    )
    disable_graph_replay: bool = option(
        False, "On CUDA, let MLX queue compiled steps each time instead of launching them as they were recorded."
    )
    graph_max_rows: int = option(
        256, "On a GPU, steps of at most so many single tokens are compiled.", "--cuda-graph-max-bs"
    )
    graph_max_tokens: int = option(
        256, "So are those with short prompts or chunks, of at most so many tokens in all; 0: none of them."
    )
    skip_server_warmup: bool = option(False, "Compile steps as they come up, not at start.")
    grammar_backend: str = option(
        "llguidance", "What enforces structured output; none refuses such requests.", choices=("llguidance", "none")
    )
    constrained_json_whitespace_pattern: str | None = option(
        None, "Regex of the gaps between JSON's tokens in structured output; up to 32 of any whitespace if left out."
    )
    constrained_json_disable_any_whitespace: bool = option(
        False, "Structured output has JSON on one line, with one space after each comma and colon."
    )
    is_embedding: bool = option(
        False, "Serve vectors of texts only; so do checkpoints of sentence-transformers and without a head, unasked."
    )
    pooling: str = option(
        "auto",
        "What a text's vector is made of: the hidden state of its last token, or the mean of all; auto: as the "
        "checkpoint says, or else the last.",
        choices=POOLINGS,
    )
    lora_paths: list[str] | None = option(  # noqa: RUF009 - the default is None
        None, "A LoRA adapter to load, as NAME=DIRECTORY, of PEFT or mlx-lm; may be given several times."
    )
    random_seed: int | None = option(None, "Seed for requests that bring none.")
    disable_memory_sharing: bool = option(
        False, "Plan as if no other Pippin ran on this machine, and let others plan as if this one did not."
    )
    wired_limit_gb: float | None = option(
        None,
        "macOS: keep so many GB resident (MLX's wired limit). Left alone otherwise: see docs/reliability.md.",
    )

    def with_pages(self, size: int) -> EngineConfig:
        """This, with pages of ``size`` slots if none are asked for."""
        return self if self.page_size else replace(self, page_size=size)

    def __post_init__(self) -> None:
        for name, ok, need in (
            (
                "mem_fraction_static",
                self.mem_fraction_static is None or 0 < self.mem_fraction_static < 1,
                "between 0 and 1",
            ),
            ("max_total_tokens", self.max_total_tokens is None or self.max_total_tokens >= 16, "at least 16"),
            (
                "max_running_requests",
                self.max_running_requests is None or self.max_running_requests >= 1,
                "at least 1",
            ),
            (
                "chunked_prefill_size",
                self.chunked_prefill_size is None or self.chunked_prefill_size >= 1,
                "at least 1",
            ),
            (
                "max_mamba_cache_size",
                self.max_mamba_cache_size is None or self.max_mamba_cache_size >= 0,
                "at least 0",
            ),
            ("context_length", self.context_length is None or self.context_length >= 2, "at least 2"),
            (
                "swa_full_tokens_ratio",
                self.swa_full_tokens_ratio is None or 0 < self.swa_full_tokens_ratio <= 1,
                "above 0 and at most 1",
            ),
            ("page_size", self.page_size >= 0, "at least 0"),
            ("kv_disk_gb", self.kv_disk_gb > 0, "above 0"),
            ("graph_max_rows", self.graph_max_rows >= 1, "at least 1"),
            ("graph_max_tokens", self.graph_max_tokens >= 0, "at least 0"),
            ("wired_limit_gb", self.wired_limit_gb is None or self.wired_limit_gb > 0, "above 0"),
        ):
            if not ok:
                raise ConfigError(f"must be {need}, not {getattr(self, name)!r}", flag_of(name))
        if self.kv_disk is not None and self.disable_radix_cache:
            raise ConfigError("needs the prefix cache; leave out --disable-radix-cache", "--kv-disk")
        for name, options in (
            ("dtype", DTYPES),
            ("quantization", (None, *QUANTIZATIONS)),
            ("kv_cache_dtype", KV_CACHE_DTYPES),
            ("schedule_policy", ("fcfs", "lpm")),
            ("device", DEVICES),
            ("kv_canary", KV_CANARIES),
            ("pooling", POOLINGS),
            ("grammar_backend", ("llguidance", "none")),
        ):
            if getattr(self, name) not in options:
                raise ConfigError(
                    f"must be one of {', '.join(map(str, options))}, not {getattr(self, name)!r}",
                    flag_of(name),
                )


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Where and how the server listens."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(30000, "Port to listen on.")
    api_key: str | None = option(None, "Required as `Authorization: Bearer KEY`, if set.")
    served_model_name: str | None = option(None, "Name in answers and /v1/models; the model's path if left out.")
    weight_version: str = option(
        "default",
        "Version of the weights, shown in /get_model_info and /generate's meta_info until an update sets another.",
    )
    strict_model_name: bool = option(False, "Refuse requests whose `model` is another name.")
    max_queued_requests: int = option(
        1024, "Most answers that wait beside those that run; more requests get a 503 with Retry-After."
    )
    max_connections: int = option(1000, "Most connections; those that say nothing make room for new ones.")
    max_body_mb: int = option(16, "Largest body of a request, in MiB.")
    request_timeout: float | None = option(None, "Seconds that an answer may take, waiting included; a 504 then.")
    drain_timeout: float = option(
        30.0, "Seconds that requests may go on once the server was told to stop; a second signal ends them at once."
    )
    allowed_hosts: list[str] | None = option(  # noqa: RUF009 - the default is None
        None,
        "A name that requests may have in Host, beside this machine's own where the address is loopback; "
        "may be given several times, * is any.",
    )
    allowed_origins: list[str] | None = option(  # noqa: RUF009 - the default is None
        None, "An origin whose pages may use the server from a browser; may be given several times, * is any."
    )
    dry_run: bool = option(False, "Load the model, print the memory budget, and exit.")
    log_level: str = option("info", "Least severe messages to log.", choices=("debug", "info", "warning", "error"))
    no_ui: bool = option(False, "Serve no web page at /.")
    log_format: str = option("text", "Lines for people, or JSON objects.", choices=("text", "json"))
    log_requests: bool = option(False, "Log what is asked and answered; prompts are in no log otherwise.")
    log_requests_level: int = option(
        2, "How much: 0 counts, 1 sampling parameters too, 2 the first 2048 characters of texts, 3 all of them."
    )
    enable_trace: bool = option(False, "OpenTelemetry spans of requests, sent by OTLP; needs the extra otel.")
    otlp_traces_endpoint: str = option("localhost:4318", "Who takes OTLP over HTTP: host:port, or a URL.")
    chat_template: str | None = option(None, "File with a Jinja chat template, instead of the tokenizer's.")

    tool_call_parser: str = option(
        "auto", "How the model writes calls of tools: SGLang's name of a format, auto (by the chat template) or none."
    )
    reasoning_parser: str = option(
        "auto", "How the model tells its reasoning apart: SGLang's name of a format, auto (by the template) or none."
    )

    watchdog_timeout: float = option(
        300.0, "Seconds without a step while requests wait, after which the engine counts as hung and is restarted."
    )
    max_restarts: int = option(
        5, "Restarts of the engine within --restart-window; after more, requests get 503 until the window has passed."
    )
    restart_window: float = option(600.0, "Seconds for which a restart of the engine counts.")

    def __post_init__(self) -> None:
        for name, ok, need in (
            ("port", 0 <= self.port <= 65535, "between 0 and 65535"),
            ("max_queued_requests", self.max_queued_requests >= 0, "at least 0"),
            ("max_connections", self.max_connections >= 1, "at least 1"),
            ("max_body_mb", self.max_body_mb >= 1, "at least 1"),
            ("request_timeout", self.request_timeout is None or self.request_timeout > 0, "above 0"),
            ("drain_timeout", self.drain_timeout >= 0, "at least 0"),
            ("log_format", self.log_format in ("text", "json"), "text or json"),
            ("log_requests_level", 0 <= self.log_requests_level <= 3, "between 0 and 3"),
            ("watchdog_timeout", self.watchdog_timeout > 0, "above 0"),
            ("max_restarts", self.max_restarts >= 0, "at least 0"),
            ("restart_window", self.restart_window > 0, "above 0"),
        ):
            if not ok:
                raise ConfigError(f"must be {need}, not {getattr(self, name)!r}", flag_of(name))


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What ``convert`` reads and writes."""

    output: str = option("", "Directory to write; new, or empty. Nothing is there until all is.", "--mlx-path")
    model_path: str | None = option(
        None, "Local directory, .gguf file or hub id; the shipped demo model if left out.", "--model"
    )
    revision: str | None = option(None, "Branch, tag or commit on the hub.")
    trust_remote_code: bool = option(
        False, "Run code that comes with the checkpoint. Off: such a checkpoint is refused."
    )
    dtype: str = option("auto", "Weights; auto keeps the checkpoint's.", choices=DTYPES)
    quantization: str | None = option(None, "Quantize, as serve would while loading.", choices=QUANTIZATIONS)
    q_bits: int | None = option(None, "Quantize to so many bits: 2, 3, 4, 5, 6 or 8.")
    q_group_size: int | None = option(None, "Weights that share a scale: 32, 64 (if left out) or 128.")
    max_shard_gb: float = option(5.0, "Largest file of weights, in GiB.")

    def __post_init__(self) -> None:
        quantizes = bool(self.quantization or self.q_bits)
        for name, ok, need in (
            ("output", bool(self.output), "say where to write"),
            ("q_bits", self.q_bits in (None, 2, 3, 4, 5, 6, 8), "must be 2, 3, 4, 5, 6 or 8"),
            ("q_bits", not (self.quantization and self.q_bits), "leave it out beside --quantization, which says it"),
            ("q_group_size", self.q_group_size in (None, 32, 64, 128), "must be 32, 64 or 128"),
            ("q_group_size", quantizes or self.q_group_size is None, "needs --q-bits or --quantization beside it"),
            ("max_shard_gb", self.max_shard_gb > 0, "must be above 0"),
            ("dtype", self.dtype in DTYPES, f"must be one of {', '.join(DTYPES)}"),
            (
                "quantization",
                self.quantization in (None, *QUANTIZATIONS),
                f"must be one of {', '.join(QUANTIZATIONS)}",
            ),
        ):
            if not ok:
                raise ConfigError(need, flag_of(name))


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How ``chat`` and ``generate`` sample; the names are those of ``SamplingParams``."""

    max_new_tokens: int = option(1024, "Most tokens of an answer.", "--max-tokens")
    temperature: float = option(0.6, "0 always takes the likeliest token.")
    top_p: float = option(1.0, "Sample from the likeliest tokens that make up this share.")
    top_k: int = option(-1, "Sample from this many tokens; -1 from all.")
    min_p: float = option(0.0, "Leave out tokens less likely than this share of the likeliest.")
    repetition_penalty: float = option(1.0, "Above 1: tokens that were there before become less likely.")
    seed: int | None = option(None, "The same seed gives the same answer.")
    stop: list[str] | None = option(  # noqa: RUF009 - the default is None
        None, "End the answer at this text; may be given several times."
    )


def flag_of(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")
