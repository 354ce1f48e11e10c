"""``pippin bench offline``: the engine alone, without HTTP, on as many requests as it is given at once."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from rich.table import Table

from pippin.bench.offline_profile import profile_run
from pippin.bench.offline_run import CoreSide, OfflineSide, Requests, Served, peer_side
from pippin.bench.options import OfflineOptions, check_ours
from pippin.bench.results import BenchResult, Value, make_result
from pippin.bench.screen import Tick, bar, stderr, writer
from pippin.bench.serving_data import TOKEN_DATASETS, Conversation, Ruler, make_dataset
from pippin.bench.serving_options import DatasetOptions
from pippin.bench.sides import in_turn, mlx_device, torch_device
from pippin.config import EngineConfig
from pippin.environment import device
from pippin.errors import ConfigError
from pippin.garbage import loaded_left_alone
from pippin.loading import load_core
from pippin.memory import on_gpu, use_device
from pippin.messages import ModelInfo
from pippin.terminal import LoadingBar
from pippin.text.tokenizer import Tokenizer, load_tokenizer

WARM_UP = 16
_SHARE_BESIDE_A_PEER = 0.4


def run(config: EngineConfig, options: OfflineOptions, dataset: DatasetOptions) -> int:
    """Measures, prints a table to standard error and JSON lines to standard output; the exit status.

    Raises ConfigError naming the option that can't be met.
    """
    if dataset.dataset_name == "multi-turn":
        raise ConfigError("multi-turn waits for answers, which only `pippin bench serving` does", "--dataset-name")
    check_ours(options.peers, config.device)
    console = stderr()
    write = writer(options.result_filename)
    with ExitStack() as stack:
        with LoadingBar() as loading:
            core = load_core(beside(config, options.peers), loading)
        info = core.info
        requests = make_requests(dataset, options, info, config)
        torch = config.device.startswith("torch")
        ours = CoreSide("torch" if torch else "pippin", core, counted=not torch)
        sides: list[OfflineSide] = [ours]
        sides += [stack.enter_context(peer_side(name, as_ours(name, config, info))) for name in options.peers]
        rounds = options.rounds * len(sides) * len(requests)
        with bar(console, rounds) as tick, loaded_left_alone():
            found = measure(sides, requests, options, tick)
        files = profile_run(core, ours, requests, options.run_name) if options.profile else []
    results = [to_result(side.name, found, requests, options, dataset, info) for side in sides]
    if files:
        results[0].figures["profiles"] = [str(path) for path in files]
    console.print(table(results, info))
    for path in files:
        console.print(f"recorded {path}", soft_wrap=True)
    write(results)
    return 0


def beside(config: EngineConfig, peers: Sequence[str]) -> EngineConfig:
    """With less of a GPU's memory by default where somebody else needs some."""
    if not peers or config.device.startswith("torch"):
        return config
    use_device(config.device)
    if not on_gpu() or config.mem_fraction_static or config.max_total_tokens:
        return config
    return dataclasses.replace(config, mem_fraction_static=_SHARE_BESIDE_A_PEER)


def as_ours(name: str, config: EngineConfig, info: ModelInfo) -> EngineConfig:
    """What a peer is given: the same model in the same dtype on the same device, as many rows, and slots."""
    return dataclasses.replace(
        config,
        dtype=info.dtype,
        device=torch_device(info.device) if name == "torch" else mlx_device(info.device),
        max_running_requests=info.max_running_requests,
        max_total_tokens=info.max_total_tokens,
    )


def make_requests(
    dataset: DatasetOptions, options: OfflineOptions, info: ModelInfo, config: EngineConfig
) -> list[tuple[list[int], int]]:
    """The dataset as tokens; random ones where the dataset makes prompts, the tokenizer's where it reads texts.

    Texts too long for the context are left out. Raises ConfigError for made prompts that are.
    """
    made = dataset.dataset_name in TOKEN_DATASETS
    tokenizer = None if made else load_tokenizer(info.tokenizer_path, trust_remote_code=config.trust_remote_code)
    ruler = Ruler(vocab_size=info.vocab_size) if tokenizer is None else Ruler(codec=tokenizer)
    limit = min(info.context_length, info.max_total_tokens)
    if not made:
        wanted = dataset.sharegpt_context_len or limit
        dataset = dataclasses.replace(dataset, sharegpt_context_len=min(wanted, limit - 8))
    asked = [tokens_of(c, tokenizer) for c in make_dataset(dataset, options.num_prompts, options.seed, ruler)]
    if longest := [len(p) + n for p, n in asked if len(p) + n > limit]:
        raise ConfigError(
            f"{len(longest)} prompts with their answers take up to {max(longest)} tokens, there is room for {limit}",
            "--random-input-len" if dataset.dataset_name.startswith("random") else "--dataset-name",
        )
    return asked


def tokens_of(conversation: Conversation, tokenizer: Tokenizer | None) -> tuple[list[int], int]:
    """The first message, encoded if it is text, and the length of its answer."""
    turn = conversation.turns[0]
    if isinstance(turn.prompt, str):
        assert tokenizer is not None
        return tokenizer.encode(turn.prompt), turn.output_len
    return turn.prompt, turn.output_len


def measure(
    sides: Sequence[OfflineSide], requests: Requests, options: OfflineOptions, tick: Tick
) -> dict[str, list[Served]]:
    """Each side's rounds, behind a few requests that warm it up; they take turns, also in who begins."""
    found: dict[str, list[Served]] = {side.name: [] for side in sides}
    for side in sides:
        if not options.skip_warmup:
            side.serve(requests[:WARM_UP], lambda: None)
    for turn in range(options.rounds):
        for side in in_turn(sides, turn):
            found[side.name].append(side.serve(requests, counting(tick, side.name)))
    return found


def counting(tick: Tick, name: str) -> Callable[[], None]:
    return lambda: tick(f"requests, {name}")


def to_result(
    name: str,
    found: dict[str, list[Served]],
    requests: Requests,
    options: OfflineOptions,
    dataset: DatasetOptions,
    info: ModelInfo,
) -> BenchResult:
    """One side, by SGLang's names: seconds, tokens a second; medians of the rounds."""
    served, prompts = found[name], sum(len(prompt) for prompt, _ in requests)
    seconds = statistics.median(s.seconds for s in served)
    outputs = served[0].output_tokens
    figures: dict[str, Value] = {
        "successful_requests": len(requests),
        "total_latency": seconds,
        "total_input_tokens": prompts,
        "total_output_tokens": outputs,
        "request_throughput": len(requests) / seconds,
        "input_throughput": prompts / seconds,
        "output_throughput": outputs / seconds,
        "total_throughput": (prompts + outputs) / seconds,
        "cached_tokens": served[0].cached_tokens,
        "peak_memory_bytes": max((s.device_peak_bytes for s in served if s.device_peak_bytes), default=None),
        "process_peak_bytes": max(s.process_peak_bytes for s in served),
    }
    first = next(iter(found))
    for other in found:
        if name == first and other != first:
            pairs = zip(found[other], served, strict=True)
            figures[f"throughput_vs_{other}"] = statistics.median(a.seconds / b.seconds for a, b in pairs)
    return make_result(
        "offline",
        run_name=options.run_name,
        side=name,
        model=info.model_path,
        device=device()["device"],
        settings={
            "dataset_name": dataset.dataset_name,
            "num_prompts": len(requests),
            "rounds": options.rounds,
            "seed": options.seed,
            "dtype": info.dtype,
            "quantization": info.quantization,
            "max_running_requests": info.max_running_requests,
            "chunked_prefill_size": info.chunked_prefill_size,
            "max_total_tokens": info.max_total_tokens,
        },
        figures=figures,
    )


COLUMNS = ("side", "seconds", "in tok/s", "out tok/s", "total tok/s", "cached", "memory", "process", "ours is")


def table(results: Sequence[BenchResult], info: ModelInfo) -> Table:
    """A row for each side."""
    ours = results[0]
    figures = ours.figures
    title = (
        f"{info.model_path}, {info.dtype}, {info.device}: {figures['successful_requests']} requests, "
        f"{figures['total_input_tokens']} tokens in, {figures['total_output_tokens']} out"
    )
    shown = Table(*COLUMNS, title=title)
    for result in results:
        f = result.figures
        ratio = figures.get(f"throughput_vs_{result.side}")
        shown.add_row(
            result.side,
            f"{f['total_latency']:.2f}",
            f"{f['input_throughput']:.0f}",
            f"{f['output_throughput']:.0f}",
            f"{f['total_throughput']:.0f}",
            "-" if f["cached_tokens"] is None else str(f["cached_tokens"]),
            gigabytes(f["peak_memory_bytes"]),
            gigabytes(f["process_peak_bytes"]),
            "" if ratio is None else f"{ratio:.2f}x as fast",
        )
    return shown


def gigabytes(count: Value) -> str:
    return f"{count / 1e9:.2f} GB" if isinstance(count, int) else "-"
