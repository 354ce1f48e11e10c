"""The memory budget: what the device may use, and how many slots that leaves."""

from __future__ import annotations

import os
import re
import sys
from bisect import bisect_right
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from pippin.cache.layout import CacheLayout, bytes_per_slot, is_within
from pippin.cache.windows import least_pages
from pippin.config import EngineConfig
from pippin.errors import ConfigError, ModelError
from pippin.footprint import free_bytes, process_bytes, trim
from pippin.kvdisk import copy_bytes
from pippin.messages import ModelInfo
from pippin.probe import Choice
from pippin.watermarks import MemoryWatch, Reading, Watermarks

_GPU_FRACTION = 0.8
_CPU_FRACTION = 0.5
# On a CPU the pool competes with everything else in the machine's memory, so by default it is only this long, even
# where the context is longer: --max-total-tokens asks for more.
_CPU_SLOTS = 32768
_LEAST_SLOTS = 16
# Slots where a token's take no memory, since the model keeps nothing but recurrent states.
_FREE_SLOTS = 1 << 20
# Of what weights leave, the share that running requests' states may take; of what is left then, that of snapshots.
_STATE_SHARE = 1 / 3
_SNAPSHOT_SHARE = 1 / 4
# A step's states are new arrays, while those of the step before and of the one in flight are still there.
_STATE_COPIES = 3
_MOST_SNAPSHOTS = 4096
_CPU_SNAPSHOTS = 128
# Slots of windowed layers, as a share of all others', where none is asked for; but whole windows of so many requests.
_WINDOW_SHARE = 1 / 6
_WINDOW_STREAMS = 8
# Where memory is left that nobody else has use for, windowed layers may have so large a share of it, until all that may
# run find their windows; but not so many slots that the pool of all others isn't at least twice as large.
_WINDOW_SPARE = 1 / 2
_WINDOW_MOST = 1 / 2
_SPARE_BYTES = 256 << 20
_CGROUP_FILES = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True, slots=True)
class Limits:
    """The sizes of a step, defaults filled in for the device."""

    chunk: int
    max_running: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by part; ``slots`` is what the pool holds beside its scratch page.

    ``state_bytes`` are recurrent states of the requests in a step in flight (those of the step that is measured are
    activations), ``snapshots`` how many more may be kept for reuse, of ``snapshot_bytes`` in all. ``copy_bytes`` are on
    their way between the pool and the disk, ``adapter_bytes`` LoRA adapters that are there from the start.
    ``window_slots`` are what the pool of windowed layers holds beside its scratch page, ``reach`` is how far back they
    look; 0 if they have no pool of their own.
    """

    device_bytes: int
    budget_bytes: int
    weight_bytes: int
    activation_bytes: int
    pool_bytes: int
    slots: int
    state_bytes: int = 0
    snapshot_bytes: int = 0
    snapshots: int = 0
    copy_bytes: int = 0
    adapter_bytes: int = 0
    window_slots: int = 0
    reach: int = 0

    @property
    def left_bytes(self) -> int:
        """What the plan gives to nobody."""
        return self.device_bytes - self.budget_bytes

    @property
    def total_bytes(self) -> int:
        states = self.state_bytes + self.snapshot_bytes
        weights = self.weight_bytes + self.adapter_bytes
        return weights + self.activation_bytes + self.pool_bytes + states + self.copy_bytes


def on_gpu() -> bool:
    return bool(mx.default_device() == mx.gpu)


def use_device(name: str) -> None:
    """Makes ``auto``, ``cpu`` or ``gpu`` MLX's default device; ConfigError if there is none."""
    if name == "cpu":
        mx.set_default_device(mx.cpu)
    elif name == "gpu" and not on_gpu():
        raise ConfigError("MLX sees no GPU here; install mlx[cuda13] or mlx[cuda12], or use cpu", "--device")


def limits(config: EngineConfig, gpu: bool | None = None) -> Limits:
    """``--chunked-prefill-size`` and ``--max-running-requests``, with the defaults of ``gpu`` (None: MLX's device)."""
    gpu = on_gpu() if gpu is None else gpu
    return Limits(
        chunk=config.chunked_prefill_size or (2048 if gpu else 512),
        max_running=config.max_running_requests or (256 if gpu else 32),
    )


def device_bytes() -> int:
    """What the device may use: Metal's recommended working set, a GPU's memory, else the machine's or container's."""
    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if on_gpu() and isinstance(info.get(key), int):
            return int(info[key])
    return machine_bytes()


def _container_limits() -> list[int]:
    """What a Linux container is held to, in bytes, by either version of cgroups; nothing outside of one."""
    found = [file.read_text().strip() for file in _CGROUP_FILES if file.exists()]
    return [int(limit) for limit in found if limit.isdigit()]


def limit_rows(config: EngineConfig, choice: Choice, sizes: Limits, weight_bytes: int) -> Limits:
    """``sizes`` with as many rows as recurrent states find room. Raises ConfigError or ModelError if too few."""
    each = choice.layout.state_bytes * _STATE_COPIES
    if not each:
        return sizes
    budget = _budget(config, device_bytes(), on_gpu())
    room = budget - weight_bytes
    fit = max(0, int(room * _STATE_SHARE)) // each
    if config.max_running_requests is not None and config.max_running_requests * each > room * 2 * _STATE_SHARE:
        raise ConfigError(
            f"the recurrent states of {sizes.max_running} requests take {_gb(sizes.max_running * each)}, and weights "
            f"({_gb(weight_bytes)}) leave {_gb(room)}, partly for these; lower it, or raise --mem-fraction-static",
            "--max-running-requests",
        )
    if not fit:
        raise ModelError(
            f"weights ({_gb(weight_bytes)}) leave no room for a request's recurrent state ({_gb(each)}) in "
            f"{_gb(budget)}; use --quantization or a larger --mem-fraction-static"
        )
    return replace(sizes, max_running=config.max_running_requests or min(sizes.max_running, fit))


def _budget(config: EngineConfig, device: int, gpu: bool) -> int:
    return int(device * (config.mem_fraction_static or (_GPU_FRACTION if gpu else _CPU_FRACTION)))


def _snapshots(config: EngineConfig, each: int, left: int, gpu: bool) -> int:
    """How many snapshots of ``each`` bytes to keep, of ``left`` bytes that they share with the pool."""
    if not each or config.disable_radix_cache:
        return 0
    fit = max(0, left) // each
    asked = config.max_mamba_cache_size
    if asked is None:
        return min(int(fit * _SNAPSHOT_SHARE), _MOST_SNAPSHOTS if gpu else _CPU_SNAPSHOTS)
    if asked > fit:
        raise ConfigError(
            f"{asked} snapshots take {_gb(asked * each)}, and there is room for {fit}; lower it, or raise "
            "--mem-fraction-static",
            "--max-mamba-cache-size",
        )
    return asked


def plan_memory(
    config: EngineConfig,
    choice: Choice,
    *,
    weight_bytes: int,
    activation_bytes: int,
    context_length: int,
    max_running: int,
    adapter_bytes: int = 0,
    gpu: bool | None = None,
    device: int | None = None,
) -> MemoryPlan:
    """Divides the budget of ``device`` bytes, of a GPU or not (None: of MLX's device).

    Raises ModelError or ConfigError, with the sizes, if too little is left to serve.
    """
    device, gpu = device_bytes() if device is None else device, on_gpu() if gpu is None else gpu
    budget = _budget(config, device, gpu)
    slot, page = bytes_per_slot(choice.shapes), config.page_size
    each = choice.layout.state_bytes
    copies = copy_bytes(slot) if config.kv_disk is not None and slot else 0
    left = budget - weight_bytes - activation_bytes - max_running * each - copies - adapter_bytes
    others = f"weights ({_gb(weight_bytes)}) and activations ({_gb(activation_bytes)})"
    others += f", and copies for --kv-disk ({_gb(copies)})," if copies else ""
    others += f", and LoRA adapters ({_gb(adapter_bytes)})," if adapter_bytes else ""
    snapshots = _snapshots(config, each, left, gpu)
    left -= snapshots * each
    sizes = _PoolSizes.of(config, choice.layout, context_length, max_running, limits(config, gpu).chunk)
    fit = sizes.fit(left)
    least = -(-_LEAST_SLOTS // page) * page
    want = min(fit, max(least, -(-max_running * context_length // page) * page))
    modest = not gpu and config.mem_fraction_static is None
    if modest:
        want = min(want, max(_CPU_SLOTS, least))
    if config.max_total_tokens is not None:
        want, least = config.max_total_tokens, page
        if want < page:
            raise ConfigError(
                f"{want} slots are less than a page, which has {page} (--page-size)", "--max-total-tokens"
            )
        if want > fit:
            raise ConfigError(
                f"{want} slots take {_gb(sizes.nbytes(want))}, but {others} leave room for {fit} of the {_gb(budget)} "
                "allowed; lower it, or raise --mem-fraction-static",
                "--max-total-tokens",
            )
    slots = want // page * page
    if slots < least:
        raise ModelError(
            f"{others} leave no room for KV slots in {_gb(budget)}; use --quantization, a smaller "
            "--chunked-prefill-size or --context-length, or a larger --mem-fraction-static"
        )
    if not modest or config.max_total_tokens is not None:
        sizes = sizes.eased(slots, left)
    return MemoryPlan(
        device,
        budget,
        weight_bytes,
        activation_bytes,
        sizes.nbytes(slots),
        slots,
        state_bytes=max_running * each,
        snapshot_bytes=snapshots * each,
        snapshots=snapshots,
        copy_bytes=copies,
        adapter_bytes=adapter_bytes,
        window_slots=sizes.window_slots(slots),
        reach=sizes.reach if sizes.window_slots(slots) else 0,
    )


@dataclass(frozen=True, slots=True)
class _PoolSizes:
    """Bytes of a slot: ``full`` in layers that see everything, ``part`` in windowed ones that have slots of their own.

    Of these there are a ``ratio`` of the others, but at least ``least`` and at most ``most``. ``whole`` are what
    all that may run find their windows in, if there is memory for it.
    """

    page: int
    full: int
    part: int = 0
    reach: int = 0
    ratio: float = 1.0
    least: int = 0
    most: int = 0
    whole: int = 0

    @classmethod
    def of(cls, config: EngineConfig, layout: CacheLayout, context: int, running: int, chunk: int) -> _PoolSizes:
        page, every = config.page_size, bytes_per_slot(layout.shapes)
        reach = None if config.disable_hybrid_swa_memory else layout.reach(context)
        if reach is None:
            return cls(page, every)
        part = bytes_per_slot([s for s in layout.shapes if is_within(s, reach)])
        asked = config.swa_full_tokens_ratio
        if asked is not None:
            return cls(page, every - part, part, reach, asked, least_pages(reach, page, 1) * page, sys.maxsize)
        few = least_pages(reach, page, chunk, min(running, _WINDOW_STREAMS)) * page
        # Nobody ever needs more: each running request's window, as much of ends that are kept, and a step.
        most = least_pages(reach, page, chunk, 2 * running) * page
        whole = least_pages(reach, page, chunk // 2, running) * page
        return cls(page, every - part, part, reach, _WINDOW_SHARE, few, most, whole)

    def eased(self, slots: int, left: int) -> _PoolSizes:
        """With more for windowed layers beside so many ``slots``, where ``left`` bytes have room for it."""
        wanted = min(self.whole, int(slots * _WINDOW_MOST) // self.page * self.page)
        found = replace(self, least=max(self.least, wanted))
        spare = left - self.nbytes(slots)
        return found if found.nbytes(slots) - self.nbytes(slots) <= spare * _WINDOW_SPARE else self

    def window_slots(self, slots: int) -> int:
        """Slots of windowed layers beside so many of all others, without scratch pages; 0: they share the others'."""
        pages = int(slots * self.ratio) // self.page
        found = max(self.least, min(self.most, pages * self.page)) if self.reach else slots
        return found if found < slots else 0

    def nbytes(self, slots: int) -> int:
        """Of both pools, scratch pages included."""
        return (slots + self.page) * self.full + ((self.window_slots(slots) or slots) + self.page) * self.part

    def fit(self, left: int) -> int:
        """The most slots that ``left`` bytes have room for."""
        most = left // self.full if self.full else _FREE_SLOTS - self.page
        return max(0, bisect_right(range(most + 1), left, key=self.nbytes) - 1)


def adapter_room(info: ModelInfo) -> int:
    """Bytes that LoRA adapters may take which come while the engine serves, before memory counts as short."""
    planned = info.weight_bytes + info.adapter_bytes + info.activation_bytes + info.pool_bytes + info.state_bytes
    return max(0, Watermarks.of(info.budget_bytes, info.device_bytes, machine_bytes()).soft_held - planned)


def machine_bytes() -> int:
    """All memory that the host, or the container, has."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_container_limits()])


def memory_key() -> str:
    """Names the memory that engines share: a Mac's GPU and CPU have one, other GPUs have theirs."""
    if sys.platform == "darwin" or not on_gpu():
        return "host"
    return "cuda-" + re.sub(r"[^\w-]", "_", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))


def watch_memory(info: ModelInfo) -> MemoryWatch:
    """What looks after the memory of an engine that was planned so."""
    unified = sys.platform == "darwin" or not on_gpu()

    def read() -> Reading:
        held = mx.get_active_memory()
        return Reading(max(held, process_bytes() - mx.get_cache_memory()) if unified else held, free_bytes())

    marks = Watermarks.of(info.budget_bytes, info.device_bytes, machine_bytes())
    return MemoryWatch(marks, read, give_back)


def give_back() -> None:
    """Gives the system what is freed and kept for reuse: by MLX, and by the C library."""
    mx.clear_cache()
    trim()


def set_wired_limit(config: EngineConfig) -> None:
    """As asked for, and only then. Raises ConfigError."""
    if config.wired_limit_gb is None:
        return
    try:
        mx.set_wired_limit(int(config.wired_limit_gb * 1e9))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{config.wired_limit_gb:g} GB can't be wired: {error}", "--wired-limit-gb") from error


def limit_buffers(plan: MemoryPlan) -> None:
    """Bounds what MLX keeps of freed buffers: one step's, and some. Shapes that change for ever would pile up more."""
    mx.set_cache_limit(plan.activation_bytes + _SPARE_BYTES)


def memory_in_use() -> tuple[int, int]:
    """Bytes of arrays on MLX's device: now, and the most so far. MLX's cache of free buffers is not counted."""
    return mx.get_active_memory(), mx.get_peak_memory()


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
