"""Options of ``pippin bench serving``: SGLang's names where it has them, vLLM's for what only it has."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from pippin.bench.serving_api import BACKENDS
from pippin.config import flag_of, option
from pippin.errors import ConfigError

DATASETS = ("random", "random-ids", "generated-shared-prefix", "multi-turn", "long-document", "sharegpt")
GOALS = ("ttft", "tpot", "itl", "e2el")


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """Which server is asked, and how."""

    backend: str = option("sglang", "What the server speaks; `sglang` is /generate.", choices=tuple(BACKENDS))
    base_url: str | None = option(None, "The server's address, up to where /v1 or /generate begins.")
    host: str = option("127.0.0.1", "The server's host, if there is no --base-url.")
    port: int | None = option(None, "Its port, if there is no --base-url; the backend's usual one if left out.")
    model: str | None = option(None, "Model's name in requests; the first of /v1/models if left out.")
    tokenizer: str | None = option(
        None, "Directory or hub id of the server's tokenizer, for exact prompt lengths. Needed by nothing."
    )
    extra_request_body: str | None = option(None, 'JSON object that is added to each request, `{"temperature": 0}`.')
    disable_stream: bool = option(False, "Ask for whole answers: the time to the first token is then the whole time.")
    disable_ignore_eos: bool = option(False, "Let answers end before their length.")
    request_timeout: float = option(21600.0, "Seconds after which a request is given up and counts as an error.")
    warmup_requests: int = option(1, "Requests sent before, that no figure counts.", "--num-warmups")
    flush_cache: bool = option(False, "Empty the server's prefix cache after warming up (/flush_cache).")
    profile: bool = option(False, "Let the server profile the run (/start_profile, /stop_profile).")

    def __post_init__(self) -> None:
        at_least(0, warmup_requests=self.warmup_requests)
        if not self.request_timeout > 0:
            raise ConfigError(f"must be above 0, not {self.request_timeout}", "--request-timeout")
        if self.base_url and not self.base_url.startswith(("http://", "https://")):
            raise ConfigError(f"must begin with http:// or https://, not {self.base_url!r}", "--base-url")
        _ = self.extra_body

    @property
    def url(self) -> str:
        """Where the server is, without a slash or ``/v1`` at the end."""
        port = self.port or BACKENDS[self.backend].port
        return (self.base_url or f"http://{self.host}:{port}").rstrip("/").removesuffix("/v1")

    @property
    def extra_body(self) -> dict[str, Any]:
        """Raises ConfigError if it is no JSON object."""
        try:
            return msgspec.json.decode(self.extra_request_body or "{}", type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise ConfigError(f"must be a JSON object: {error}", "--extra-request-body") from error


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How much is sent when, and what counts as good."""

    num_prompts: int = option(
        1000, "Requests; conversations with multi-turn. Other datasets say their own.", "--num-prompt"
    )
    request_rate: list[float] | None = option(  # noqa: RUF009 - the default is None
        None, "Requests a second, at random intervals; one or several runs. All at once if left out (inf)."
    )
    burstiness: float = option(1.0, "Shape of the intervals: 1 is Poisson, less comes in bursts, more is steadier.")
    max_concurrency: list[int] | None = option(  # noqa: RUF009
        None, "Most requests (conversations, with multi-turn) at once; one or several runs. No bound if left out."
    )
    goodput: list[str] | None = option(  # noqa: RUF009
        None, f"What a good request keeps, in milliseconds: `ttft:500 tpot:50`; of {', '.join(GOALS)}."
    )
    seed: int = option(1, "Seed of prompts, lengths and arrivals.")
    tag: str | None = option(None, "Name of the server in results; what it says it is if left out.")
    run_name: str = option("default", "Name of the run in results.")
    output_file: str | None = option(None, "File that the results' JSON lines are added to, beside standard output.")
    output_details: bool = option(False, "Each request's lengths and times in the results too.")
    disable_tqdm: bool = option(False, "No progress bar.")

    def __post_init__(self) -> None:
        at_least(1, num_prompts=self.num_prompts)
        for value in self.max_concurrency or ():
            at_least(1, max_concurrency=value)
        for name, given in (("request_rate", self.request_rate or [1.0]), ("burstiness", [self.burstiness])):
            if wrong := [v for v in given if not v > 0]:
                raise ConfigError(f"must be above 0, not {wrong[0]}", flag_of(name))
        _ = self.goals

    @property
    def rates(self) -> list[float]:
        return self.request_rate or [math.inf]

    @property
    def bounds(self) -> list[int | None]:
        return [*self.max_concurrency] if self.max_concurrency else [None]

    @property
    def goals(self) -> dict[str, float]:
        """Bounds in seconds by name. Raises ConfigError for one that can't be read."""
        return dict(_goal(text) for text in self.goodput or ())


@dataclass(frozen=True, slots=True)
class DatasetOptions:
    """What is asked. Lengths are tokens."""

    dataset_name: str = option("random", "What prompts look like.", choices=DATASETS)
    dataset_path: str | None = option(None, "File in ShareGPT's form, JSON or JSON lines, for sharegpt and multi-turn.")
    random_input_len: int = option(1024, "Longest prompt; with multi-turn, longest message.", "--random-input")
    random_output_len: int = option(1024, "Longest answer.", "--random-output")
    random_range_ratio: float = option(0.0, "Shortest length as a share of the longest; lengths are uniform between.")
    tokenize_prompt: bool = option(False, "Send random token ids in place of text: prompts have their exact lengths.")
    gsp_num_groups: int = option(64, "generated-shared-prefix: groups of prompts that begin alike.")
    gsp_prompts_per_group: int = option(16, "generated-shared-prefix: prompts of each group.")
    gsp_system_prompt_len: int = option(2048, "generated-shared-prefix: what a group shares.")
    gsp_question_len: int = option(128, "generated-shared-prefix: what follows.")
    gsp_output_len: int = option(256, "generated-shared-prefix: answers.")
    num_turns: int = option(4, "multi-turn: messages of the user.")
    think_time: float = option(1.0, "multi-turn: mean seconds between an answer and the next message.")
    num_documents: int = option(8, "long-document: documents.")
    document_len: int = option(4096, "long-document: length of each.")
    questions_per_document: int = option(4, "long-document: questions to each; the first finds it new.")
    question_len: int = option(32, "long-document: length of each question.")
    sharegpt_output_len: int | None = option(None, "sharegpt: length of all answers, instead of the file's.")
    sharegpt_context_len: int | None = option(None, "sharegpt: leave out what is longer, prompt and answer together.")

    def __post_init__(self) -> None:
        at_least(1, **{name: value for name, value in asdict(self).items() if type(value) is int})
        if not 0 <= self.random_range_ratio <= 1:
            raise ConfigError(f"must be between 0 and 1, not {self.random_range_ratio}", "--random-range-ratio")
        if not 0 <= self.think_time < math.inf:
            raise ConfigError(f"must be 0 or more, not {self.think_time}", "--think-time")
        if self.dataset_name == "sharegpt" and not self.dataset_path:
            raise ConfigError("sharegpt needs a file in ShareGPT's form", "--dataset-path")

    @property
    def sends_tokens(self) -> bool:
        return self.tokenize_prompt or self.dataset_name == "random-ids"


def at_least(least: int, **given: int) -> None:
    """Raises ConfigError for the first that is less."""
    for name, value in given.items():
        if value < least:
            raise ConfigError(f"must be at least {least}, not {value}", flag_of(name))


def _goal(text: str) -> tuple[str, float]:
    name, _, bound = text.partition(":")
    name = {"e2e": "e2el"}.get(name, name)
    try:
        milliseconds = float(bound)
    except ValueError:
        milliseconds = math.nan
    if name not in GOALS or not milliseconds > 0:
        raise ConfigError(f"must be like ttft:500 (milliseconds; of {', '.join(GOALS)}), not {text!r}", "--goodput")
    return name, milliseconds / 1000
