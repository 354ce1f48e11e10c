"""From a configuration to an engine that can step: weights, attention, memory plan, pool, runner, scheduler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pippin.backend import import_mlx_lm, prepare

prepare()  # before any import of MLX: it is what makes that work, and fast
import_mlx_lm()  # and this before any other import of mlx-lm

import mlx.nn as nn
import mlx_lm
import msgspec

import pippin
from pippin import kernels
from pippin.cache.canary import KVCanary
from pippin.cache.disk import BLOCK
from pippin.cache.layout import bytes_per_slot
from pippin.cache.radix import RadixCache
from pippin.cache.slots import SlotAllocator
from pippin.cache.snapshots import NONE, Snapshots
from pippin.cache.windows import WindowPages, WindowTable
from pippin.claims import claims_folder, share
from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.errors import ConfigError, ModelError, RequestError
from pippin.flight import ModelRunner
from pippin.grammar.compiler import compiler_of
from pippin.jit_ahead import JitAhead
from pippin.kvdisk import DiskTier, open_tier
from pippin.memory import (
    Limits,
    MemoryPlan,
    adapter_room,
    device_bytes,
    limit_buffers,
    limit_rows,
    limits,
    memory_key,
    on_gpu,
    plan_memory,
    set_wired_limit,
    use_device,
    watch_memory,
)
from pippin.messages import ModelInfo, Progress
from pippin.models.load import LoadedModel, load_mlx_model
from pippin.models.lora import Adapters
from pippin.models.turned import turn_weights
from pippin.models.vocabulary import Vocabulary, read_vocabulary
from pippin.probe import Choice, choose_attention, measure_activations
from pippin.replay import cuda_replays
from pippin.runner import MlxModelRunner
from pippin.scheduler import Scheduler
from pippin.torch import require_torch

log = logging.getLogger(__name__)

PAGE = 16
"""Slots of a page where none is asked for and kernels read by page: small tables, few changes, prefixes cut little."""


def load_core(config: EngineConfig, progress: Callable[[Progress], None] | None = None) -> EngineCore:
    """Loads a model and makes everything that serves it; ``progress`` hears of the stages on the way.

    Raises ModelError if the model can't be loaded or served exactly, ConfigError if an option can't be met.
    """
    return over_runner(*load_runner(config, progress), config)


def load_runner(
    config: EngineConfig, progress: Callable[[Progress], None] | None = None
) -> tuple[ModelRunner, ModelInfo]:
    """Loads a model and makes what runs its steps, pool included; raises as ``load_core`` does."""
    if config.device.startswith("torch"):
        require_torch("--device")
        if config.kv_cache_dtype != "auto":
            raise ConfigError("K and V are quantized on MLX's devices alone; leave it out", "--kv-cache-dtype")
        if config.kv_disk is not None:
            raise ConfigError("goes with MLX's devices alone; leave it out with --device torch", "--kv-disk")
        from pippin.torch.load import load_torch_runner

        return load_torch_runner(config, progress or (lambda _: None))
    use_device(config.device)
    return build_runner(load_mlx_model(config.model_path, config, progress), config, progress or (lambda _: None))


def build_core(loaded: LoadedModel, config: EngineConfig, tell: Callable[[Progress], None]) -> EngineCore:
    """Makes everything that serves a loaded model; raises as ``load_core`` does."""
    return over_runner(*build_runner(loaded, config, tell), config)


def build_runner(
    loaded: LoadedModel, config: EngineConfig, tell: Callable[[Progress], None]
) -> tuple[MlxModelRunner, ModelInfo]:
    """Makes what runs a loaded model's steps; raises as ``load_core`` does."""
    tell(Progress("probe", 0, 2))
    vocabulary = read_vocabulary(Path(config.tokenizer_path or loaded.path), loaded.vocab_size)
    if not on_gpu():
        turn_weights(loaded.model)
    choice = choose_attention(loaded.model, config.attention_backend, loaded.vocab_size)
    choice = choice.with_kv_cache_dtype(config.kv_cache_dtype)
    # A recurrent state can be reused where a page ends: with pages of one slot, that is wherever it was kept.
    config = config.with_pages(PAGE if kernels.backend() and not choice.layout.states else 1)
    log.info("attention backend %s: %s", choice.backend.name, choice.reason)
    tell(Progress("probe", 1, 2))
    compiled = not (config.skip_server_warmup or config.disable_graph or choice.layout.states)
    with JitAhead(vocabulary.size, loaded.vocab_size, loaded.dtype, compiled) as ahead:
        return _build_runner(loaded, config, choice, vocabulary, ahead, tell)


def _build_runner(
    loaded: LoadedModel,
    config: EngineConfig,
    choice: Choice,
    vocabulary: Vocabulary,
    ahead: JitAhead,
    tell: Callable[[Progress], None],
) -> tuple[MlxModelRunner, ModelInfo]:
    """``build_runner`` once attention is chosen."""
    sizes = limit_rows(config, choice, limits(config), loaded.weight_bytes)
    activations = measure_activations(
        loaded.model,
        choice,
        chunk=min(sizes.chunk, loaded.context_length - 1),
        max_running=sizes.max_running,
        vocab_size=loaded.vocab_size,
        context_length=loaded.context_length,
    )
    with share(claims_folder(memory_key())) as shared:
        others = 0 if config.disable_memory_sharing else shared.others
        if others:
            log.info("other engines on this machine have claimed %.2f GB, which is left to them", others / 1e9)
        plan = plan_memory(
            config,
            choice,
            weight_bytes=loaded.weight_bytes,
            activation_bytes=activations,
            context_length=loaded.context_length,
            max_running=sizes.max_running,
            adapter_bytes=measure_adapters(loaded.model, config),
            device=max(0, device_bytes() - others),
        )
        if not config.disable_memory_sharing:
            shared.claim(plan.total_bytes, loaded.model)
    limit_buffers(plan)
    set_wired_limit(config)
    tell(Progress("probe", 2, 2))
    ahead.wait()  # its processes give their memory back
    pool = choice.pool(plan.slots + config.page_size, config.page_size, _window_table(plan, config.page_size))
    runner = MlxModelRunner(
        loaded.model,
        choice.backend,
        pool,
        max_running=sizes.max_running,
        vocab_size=vocabulary.size,
        graph_rows=0 if config.disable_graph else config.graph_max_rows,
        extend_rows=config.graph_max_tokens,
        fusions=choice.fusions,
        open_replays=_no_replays if config.disable_graph_replay else partial(cuda_replays, plan.left_bytes),
    )
    if not config.skip_server_warmup:
        runner.warm_up(loaded.context_length, lambda done, whole: tell(Progress("compile", done, whole)))
        ahead.note()
    return runner, _info(config, loaded, choice, plan, sizes, vocabulary)


def _no_replays() -> None:
    return None


def _window_table(plan: MemoryPlan, page: int) -> WindowTable | None:
    if not plan.window_slots:
        return None
    return WindowTable.empty(plan.reach, plan.window_slots + page, plan.slots // page + 1, page)


def load_adapters(model: nn.Module, info: ModelInfo, config: EngineConfig) -> Adapters:
    """The model's LoRA adapters, those of ``--lora-paths`` loaded. Raises ConfigError that names the one at fault."""
    adapters = Adapters(model)
    for given in config.lora_paths or []:
        with _at_fault(given):
            adapters.load(*_named(given))
    adapters.room = adapter_room(info)
    return adapters


def measure_adapters(model: nn.Module, config: EngineConfig) -> int:
    """Bytes that the adapters of ``--lora-paths`` will take; raises as ``load_adapters``."""
    adapters, total = Adapters(model), 0
    for given in config.lora_paths or []:
        with _at_fault(given):
            total += adapters.measure(_named(given)[1])
    return total


def _named(given: str) -> tuple[str, str]:
    """Name and path of ``NAME=PATH`` or PATH."""
    name, _, path = given.partition("=")
    return name, path or name


@contextmanager
def _at_fault(given: str) -> Iterator[None]:
    try:
        yield
    except (RequestError, ModelError) as error:
        raise ConfigError(f"{given}: {error}", "--lora-paths") from error


def over_runner(runner: ModelRunner, info: ModelInfo, config: EngineConfig) -> EngineCore:
    """An engine over a runner that holds what ``info`` says."""
    table = runner.pool.windows if isinstance(runner, MlxModelRunner) else None
    windows = WindowPages(table, BLOCK if config.kv_disk is not None else 1) if table is not None else None
    allocator = SlotAllocator(info.max_total_tokens // info.page_size + 1, info.page_size, windows)
    states = runner.pool.states if isinstance(runner, MlxModelRunner) else None
    snapshots = NONE if states is None else Snapshots(states, info.max_mamba_cache_size)
    scheduler = Scheduler(
        allocator,
        RadixCache(allocator, not config.disable_radix_cache, snapshots, windows),
        max_running=info.max_running_requests,
        chunk=info.chunked_prefill_size,
        policy=config.schedule_policy,
        context_length=info.context_length,
    )
    # torch computes a step as it is launched: there is nothing to overlap it with, only tokens to hold back.
    overlap = not config.disable_overlap_schedule and not config.device.startswith("torch")
    counts = (runner.traces, runner.replayed) if isinstance(runner, MlxModelRunner) else (lambda: 0, lambda: 0)
    adapters = load_adapters(runner.model, info, config) if isinstance(runner, MlxModelRunner) else None
    if adapters is not None:
        info = msgspec.structs.replace(info, lora_paths=dict(adapters.paths))
    canary = KVCanary(allocator.num_pages * info.page_size, table) if config.kv_canary != "none" else None
    return EngineCore(
        scheduler,
        runner,
        info,
        overlap=overlap,
        grammars=compiler_of(config, info),
        traces=counts[0],
        replays=counts[1],
        canary=canary,
        adapters=adapters,
        memory=watch_memory(info) if info.budget_bytes else None,
        disk=_disk(runner, info, config, scheduler, canary, windows),
    )


def _disk(
    runner: ModelRunner,
    info: ModelInfo,
    config: EngineConfig,
    scheduler: Scheduler,
    canary: KVCanary | None,
    windows: WindowPages | None,
) -> DiskTier | None:
    """The prefix cache on disk, if it is asked for. Raises ConfigError where it can't be had."""
    if config.kv_disk is None or not isinstance(runner, MlxModelRunner):
        return None
    if runner.pool.states is not None:
        raise ConfigError(
            f"{info.model_type} keeps recurrent state, and a prefix on disk has K and V alone; leave it out",
            "--kv-disk",
        )
    if any(shape and shape.packing for shape in runner.pool.shapes):
        raise ConfigError(
            "what it keeps would be quantized a second time; leave it out with --kv-cache-dtype", "--kv-disk"
        )
    versions = (pippin.__version__, mlx_lm.__version__)
    return open_tier(
        config,
        info,
        [*versions, str(info.dtype), str(info.quantization), *map(str, runner.pool.shapes)],
        scheduler,
        runner,
        slot_bytes=bytes_per_slot(runner.pool.shapes),
        chunk=limits(config).chunk,
        canary=canary,
        windows=windows,
    )


def _info(
    config: EngineConfig,
    loaded: LoadedModel,
    choice: Choice,
    plan: MemoryPlan,
    sizes: Limits,
    vocabulary: Vocabulary,
) -> ModelInfo:
    return ModelInfo(
        model_path=config.model_path or loaded.path.name,
        weights_path=str(loaded.path),
        tokenizer_path=config.tokenizer_path or str(loaded.path),
        model_type=loaded.model_type,
        dtype=str(loaded.dtype).removeprefix("mlx.core."),
        quantization=loaded.quantization,
        vocab_size=vocabulary.size,
        context_length=loaded.context_length,
        eos_token_ids=list(dict.fromkeys([*loaded.eos_token_ids, *vocabulary.eos_ids])),
        attention_backend=choice.backend.name,
        attention_reason=choice.reason,
        max_total_tokens=plan.slots,
        max_running_requests=sizes.max_running,
        chunked_prefill_size=sizes.chunk,
        page_size=config.page_size,
        weight_bytes=plan.weight_bytes,
        activation_bytes=plan.activation_bytes,
        copy_bytes=plan.copy_bytes,
        budget_bytes=plan.budget_bytes,
        device_bytes=plan.device_bytes,
        adapter_bytes=plan.adapter_bytes,
        pool_bytes=plan.pool_bytes,
        max_mamba_cache_size=plan.snapshots,
        state_bytes=plan.state_bytes + plan.snapshot_bytes,
        is_embedding=loaded.vectors.only,
        pooling=loaded.vectors.pooling,
        normalizes=loaded.vectors.normalizes,
        device="gpu" if on_gpu() else "cpu",
        window_slots=plan.window_slots,
        window=plan.reach,
    )
