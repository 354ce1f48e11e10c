"""Options of ``pippin bench``, under SGLang's names where it has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pippin.config import flag_of, option
from pippin.errors import ConfigError
from pippin.torch import require_torch

PEERS = ("mlx-lm", "torch")


@dataclass(frozen=True, slots=True)
class OneBatchOptions:
    """What ``pippin bench one-batch`` measures."""

    batch_size: list[int] | None = option(None, "Prompts in the batch, one or several numbers (1).", "--batch")  # noqa: RUF009 - the default is None
    input_len: list[int] | None = option(None, "Tokens of each prompt, one or several numbers (1024).")  # noqa: RUF009
    output_len: list[int] | None = option(None, "Tokens of each answer, one or several numbers (16).")  # noqa: RUF009
    vs: list[str] | None = option(None, "Measure these too, in turn with ours: mlx-lm, torch.")  # noqa: RUF009
    correctness_test: bool = option(
        False,
        "Compare greedy answers to real prompts, in float32 unless --dtype says otherwise, with each of --vs; torch if "
        "it is installed or else mlx-lm if that is left out. Exit status 1 if any differs.",
        "--correct",
    )
    prompt_filename: str | None = option(None, "File with a prompt a line for --correctness-test.")
    cut_len: int = option(
        4, "Tokens of each prompt that --correctness-test computes in a step before the rest, by ours; 0 for none."
    )
    rounds: int = option(3, "Measured runs of each; medians are reported. One more run warms up.")
    log_decode_step: int = option(0, "Print the latency of every so many decode steps of the last round; 0 for none.")
    profile: bool = option(False, "Record one more run of each shape: timelines of prefill and decode, in files apart.")
    profile_filename_prefix: str = option(
        "profile",
        "Beginning of the timelines' names; SGLANG_TORCH_PROFILER_DIR is where they go.",
        "--profile-prefix",
    )
    profile_stage: str = option("all", "What --profile records.", choices=("all", "prefill", "decode"))
    profile_start_step: int | None = option(
        None, "Record decode steps from this one on, counted from 0; the middle one if only --profile-steps is given."
    )
    profile_steps: int | None = option(None, "Record so many decode steps; all that follow if left out.")
    profile_activities: list[str] | None = option(  # noqa: RUF009
        None,
        "CPU: the timeline, which is always there; GPU: the device's own profiler too. Left out: GPU if it can.",
    )
    seed: int = option(1, "Seed of the prompts' tokens.")
    run_name: str = option("default", "Name of the run in its results.")
    result_filename: str | None = option(
        None, "File that the results' JSON lines are added to, beside standard output."
    )

    def __post_init__(self) -> None:
        for name, values in (
            ("batch_size", self.batch_size),
            ("input_len", self.input_len),
            ("output_len", self.output_len),
            ("rounds", [self.rounds]),
            ("profile_steps", [] if self.profile_steps is None else [self.profile_steps]),
        ):
            if wrong := [v for v in values or () if v < 1]:
                raise ConfigError(f"must be at least 1, not {wrong[0]}", flag_of(name))
        for name, value in (
            ("cut_len", self.cut_len),
            ("log_decode_step", self.log_decode_step),
            ("profile_start_step", self.profile_start_step),
        ):
            if value is not None and value < 0:
                raise ConfigError(f"must be at least 0, not {value}", flag_of(name))
        check_peers(self.vs or ())
        if wrong_kinds := [a for a in self.profile_activities or () if a not in ("CPU", "GPU")]:
            raise ConfigError(f"must be CPU or GPU, not {wrong_kinds[0]!r}", "--profile-activities")
        for name, given in (
            ("profile_activities", self.profile_activities),
            ("profile_stage", self.profile_stage != "all"),
            ("profile_start_step", self.profile_start_step is not None),
            ("profile_steps", self.profile_steps),
        ):
            if given and not self.profile:
                raise ConfigError("records nothing without --profile", flag_of(name))

    @property
    def peers(self) -> list[str]:
        """Who is measured beside ours, each once."""
        return list(dict.fromkeys(self.vs or ()))

    @property
    def batch_sizes(self) -> list[int]:
        return self.batch_size or [1]

    @property
    def input_lens(self) -> list[int]:
        return self.input_len or [1024]

    @property
    def output_lens(self) -> list[int]:
        return self.output_len or [16]


@dataclass(frozen=True, slots=True)
class OfflineOptions:
    """How ``pippin bench offline`` measures; what is asked are ``DatasetOptions``."""

    num_prompts: int = option(1000, "Requests, where the dataset does not say its own number.")
    vs: list[str] | None = option(None, "Measure these too, in turn with ours: mlx-lm, torch.")  # noqa: RUF009
    rounds: int = option(1, "Measured runs of each; medians are reported.")
    profile: bool = option(
        False, "Record one more run: a timeline, in SGLANG_TORCH_PROFILER_DIR or the temporary directory."
    )
    skip_warmup: bool = option(False, "Do not run a few of the requests before.")
    seed: int = option(1, "Seed of the dataset.")
    run_name: str = option("default", "Name of the run in its results.")
    result_filename: str | None = option(
        None, "File that the results' JSON lines are added to, beside standard output."
    )

    def __post_init__(self) -> None:
        for name, value in (("num_prompts", self.num_prompts), ("rounds", self.rounds)):
            if value < 1:
                raise ConfigError(f"must be at least 1, not {value}", flag_of(name))
        check_peers(self.vs or ())

    @property
    def peers(self) -> list[str]:
        """Who is measured beside ours, each once."""
        return list(dict.fromkeys(self.vs or ()))


def check_ours(names: Sequence[str], device: str) -> None:
    """Raises ConfigError for a peer that is what ``--device`` asks for."""
    if device.startswith("torch") and "torch" in names:
        raise ConfigError(f"torch is what --device {device} runs already", "--vs")


@dataclass(frozen=True, slots=True)
class KernelOptions:
    """What ``pippin bench kernels`` measures."""

    quick: bool = option(False, "Fewer and smaller shapes.")
    kernel: list[str] | None = option(None, "Only kernels whose name has this in it; may be given several times.")  # noqa: RUF009
    rounds: int = option(4, "Measured runs of each; the median is reported. One more run warms up.")
    run_name: str = option("default", "Name of the run in its results.")
    result_filename: str | None = option(
        None, "File that the results' JSON lines are added to, beside standard output."
    )

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"must be at least 1, not {self.rounds}", "--rounds")


def check_peers(names: Sequence[str]) -> None:
    """Raises ConfigError for a peer that is not known, or not installed."""
    for name in names:
        if name not in PEERS:
            raise ConfigError(f"{name!r} is not known; there are {', '.join(PEERS)}", "--vs")
        if name == "torch":
            require_torch("--vs")
