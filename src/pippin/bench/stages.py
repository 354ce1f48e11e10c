"""``pippin bench one-batch --profile``: one more run of each shape, prefill and decode recorded apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pippin.bench.options import OneBatchOptions
from pippin.bench.runner import Prompts
from pippin.bench.sides import Ours
from pippin.errors import ConfigError, RequestError
from pippin.messages import ModelInfo
from pippin.profile.engine import tracer_for
from pippin.profile.stage import profiled
from pippin.profile.steps import Window


def profile_stages(ours: Ours, prompts: Prompts, output_len: int, options: OneBatchOptions) -> list[Path]:
    """Runs a batch and returns the files, PREFIX_batchB_inputN_outputM_prefill.trace.json.gz and …_decode….

    A decode of one token has no steps, and no file. Raises ConfigError for a capture that can't be made, or files that
    can't be written.
    """
    stem = f"{options.profile_filename_prefix}_batch{len(prompts)}_input{len(prompts[0])}_output{output_len}"
    with recorded(ours, f"{stem}_prefill", options, "prefill") as found:
        ours.engine.prefill(prompts, output_len)
    if output_len > 1:
        with recorded(ours, f"{stem}_decode", options, "decode", decode_window(options, output_len - 1)) as decoded:
            for _ in ours.engine.decode():
                pass
        found += decoded
    ours.engine.clear()
    return found


def decode_window(options: OneBatchOptions, steps: int) -> Window:
    """Which of ``steps`` decode steps are recorded. Raises ConfigError if that is none."""
    first, number = options.profile_start_step, options.profile_steps
    if first is None:
        first = 0 if number is None else steps // 2
    if first >= steps:
        raise ConfigError(f"an answer has decode steps 0 to {steps - 1}, and no step {first}", "--profile-start-step")
    return Window(number, first + 1, False)


def check_profile(info: ModelInfo, options: OneBatchOptions, output_lens: Sequence[int]) -> None:
    """Raises ConfigError for what can't be recorded here."""
    for length in output_lens:
        if length > 1:
            decode_window(options, length - 1)
    with naming_flags():
        tracer_for(wants_gpu(options), "", False, device_of(info))


def wants_gpu(options: OneBatchOptions) -> bool | None:
    """None: if it can be had."""
    return None if options.profile_activities is None else "GPU" in options.profile_activities


def device_of(info: ModelInfo) -> str:
    return "gpu" if info.device == "gpu" else "cpu"


@contextmanager
def recorded(
    ours: Ours, name: str, options: OneBatchOptions, stage: str, window: Window | None = None
) -> Iterator[list[Path]]:
    """Records the steps of a block, if its stage is wanted; the list holds the files afterwards."""
    found: list[Path] = []
    if options.profile_stage not in ("all", stage):
        yield found
        return
    with (
        naming_flags(),
        profiled(ours.runner, name, gpu=wants_gpu(options), device=device_of(ours.info), window=window) as profile,
        ours.engine.over(profile.runner),
    ):
        yield found
    if profile.error:
        raise ConfigError(profile.error, "--profile")
    found += profile.files


@contextmanager
def naming_flags() -> Iterator[None]:
    """What a request for a profile would be told, by the flag that it came from."""
    flags = {"activities": "--profile-activities", "profile_id": "--profile-filename-prefix"}
    try:
        yield
    except RequestError as error:
        raise ConfigError(error.message, flags.get(error.field or "", "--profile")) from error
