"""What a model would take of memory, by part, from its files' headers: nothing of its weights is read."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from pippin import kernels
from pippin.attention import backends_to_try
from pippin.cache.layout import bytes_per_slot, is_within
from pippin.cache.windows import streams
from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.errors import EngineError
from pippin.loading import PAGE, load_core, measure_adapters
from pippin.memory import Limits, MemoryPlan, limit_rows, limits, plan_memory, use_device
from pippin.messages import Output, Submit
from pippin.models.load import LoadedModel, read_lazily
from pippin.probe import Choice, measure_caches
from pippin.types import SamplingParams

# Arrays of a hidden state's width, and of the widest layer's, that a step's tokens have at a time.
_HIDDEN, _WIDEST = 4, 3
# Rows of logits that sampling works on, in float32.
_LOGITS = 4
_PROOF_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Estimate:
    """A model's memory plan, as ``EngineCore`` would make it, with an estimate where that measures (activations).

    ``slot_bytes`` are K and V of a token in all layers, ``window_bytes`` in those whose slots are the plan's
    ``window_slots``; ``request_bytes`` a request's recurrent states; ``max_running`` is how many
    requests may run.
    """

    name: str
    model_type: str
    form: str
    plan: MemoryPlan
    slot_bytes: int
    window_bytes: int
    request_bytes: int
    context_length: int
    max_running: int
    page_size: int
    chunk: int

    @property
    def longest(self) -> int:
        """Tokens of the longest request that fits, prompt and answer."""
        return min(self.context_length, self.plan.slots)

    def streams(self, length: int) -> int:
        """Requests of so many tokens, each with a prefix of its own, that run at a time."""
        plan, page = self.plan, self.page_size
        most = min(self.max_running, _streams(plan.slots, page, length))
        return min(most, _window_streams(plan.window_slots, plan.reach, page, self.chunk, length))


def _streams(slots: int, page: int, length: int) -> int:
    return slots // page // math.ceil(length / page)


def _window_streams(slots: int, reach: int, page: int, chunk: int, length: int) -> int:
    """By windows alone; no bound where windowed layers have no slots of their own."""
    return streams(slots, reach, page, chunk, length) if slots else sys.maxsize


def estimate(config: EngineConfig) -> Estimate:
    """What ``config``'s model would take on this machine.

    Raises ModelError if it can't be read, served or fitted in, ConfigError for options that can't be met.
    """
    use_device(config.device)
    loaded = read_lazily(config.model_path, config)
    layout = measure_caches(loaded.model, lazily=True)
    choice = Choice(backends_to_try("mlx")[0], "", layout).with_kv_cache_dtype(config.kv_cache_dtype)
    config = config.with_pages(PAGE if kernels.backend() and not layout.states else 1)
    sizes = limit_rows(config, choice, limits(config), loaded.weight_bytes)
    plan = plan_memory(
        config,
        choice,
        weight_bytes=loaded.weight_bytes,
        activation_bytes=activations(loaded, choice, sizes),
        context_length=loaded.context_length,
        max_running=sizes.max_running,
        adapter_bytes=measure_adapters(loaded.model, config),
    )
    return Estimate(
        name=config.model_path or loaded.path.name,
        model_type=loaded.model_type,
        form=loaded.quantization or str(loaded.dtype).removeprefix("mlx.core."),
        plan=plan,
        slot_bytes=bytes_per_slot(choice.shapes),
        window_bytes=bytes_per_slot([s for s in choice.shapes if is_within(s, plan.reach)]),
        request_bytes=layout.state_bytes,
        context_length=loaded.context_length,
        max_running=sizes.max_running,
        page_size=config.page_size,
        chunk=sizes.chunk,
    )


def activations(loaded: LoadedModel, choice: Choice, sizes: Limits) -> int:
    """About what the largest step needs beside weights and pool, in bytes."""
    widths = [
        module.weight.shape[0]
        for _, module in loaded.model.named_modules()
        if isinstance(module, (nn.Linear, nn.QuantizedLinear)) and module.weight.shape[0] != loaded.vocab_size
    ]
    tokens = min(sizes.chunk, loaded.context_length - 1)
    row = loaded.dtype.size * (_HIDDEN * _hidden(loaded.model) + _WIDEST * max(widths, default=0))
    layer = max((s.bytes_in_full for s in choice.shapes if s), default=0)
    return tokens * row + sizes.max_running * loaded.vocab_size * _LOGITS * 4 + 2 * layer * loaded.context_length


def _hidden(model: nn.Module) -> int:
    embeddings = [m for _, m in model.named_modules() if isinstance(m, (nn.Embedding, nn.QuantizedEmbedding))]
    sizes = [m.dims if isinstance(m, nn.QuantizedEmbedding) else m.weight.shape[1] for m in embeddings]
    return max(sizes, default=0)


@dataclass(frozen=True, slots=True)
class Proof:
    """What was really run: ``plan_bytes`` by part as the engine planned them, and the most memory that was held.

    ``streams`` requests of ``length`` tokens ran at a time, after one of ``longest``.
    """

    weight_bytes: int
    activation_bytes: int
    pool_bytes: int
    slots: int
    longest: int
    length: int
    streams: int
    retractions: int
    peak_bytes: int
    budget_bytes: int

    @property
    def holds(self) -> bool:
        """Whether all stayed within the budget, and nobody had to make room."""
        return self.peak_bytes <= self.budget_bytes and not self.retractions


def prove(config: EngineConfig, length: int, tell: Callable[[str], None] = lambda text: None) -> Proof:
    """Loads the model and runs the longest request that fits, then as many of ``length`` tokens as fit.

    Raises what loading raises, and EngineError if a request fails.
    """
    core = load_core(config)
    info = core.info
    longest = min(info.context_length, info.max_total_tokens)
    length = min(length, longest)
    page, chunk = info.page_size, info.chunked_prefill_size
    most = min(info.max_running_requests, _streams(info.max_total_tokens, page, length))
    most = max(1, min(most, _window_streams(info.window_slots, info.window, page, chunk, length)))
    mx.reset_peak_memory()
    tell(f"one request of {longest} tokens")
    _run(core, 1, longest)
    tell(f"{most} requests of {length} tokens")
    _run(core, most, length)
    stats = core.stats
    return Proof(
        weight_bytes=info.weight_bytes,
        activation_bytes=info.activation_bytes,
        pool_bytes=info.pool_bytes,
        slots=info.max_total_tokens,
        longest=longest,
        length=length,
        streams=most,
        retractions=stats.retractions,
        peak_bytes=stats.memory_peak_bytes,
        budget_bytes=info.budget_bytes,
    )


def _run(core: EngineCore, count: int, length: int) -> None:
    """So many requests at once, that share no prefix and end at ``length`` tokens."""
    drawn = min(_PROOF_TOKENS, length - 1)
    params = SamplingParams(temperature=0.0, max_new_tokens=drawn, ignore_eos=True)
    vocab = core.info.vocab_size
    for i in range(count):
        tokens = [(7919 * (i + 1) + 31 * at) % vocab for at in range(length - drawn)]
        core.add(Submit(f"{length}-{i}", tokens, len(tokens), params))
    while core.has_work:
        step = core.step()
        for output in step.outputs if step else ():
            _check(output)


def _check(output: Output) -> None:
    if output.finish is not None and output.finish.reason == "error":
        raise EngineError(output.finish.message, output.finish.status)


def as_text(found: Estimate, length: int, proof: Proof | None = None) -> str:
    """Lines for people."""
    plan, length = found.plan, min(length, found.longest)
    states = plan.state_bytes + plan.snapshot_bytes
    lines = [
        f"{found.name}: {found.model_type}, {found.form}",
        f"  budget       {_gb(plan.budget_bytes)} of {_gb(plan.device_bytes)}",
        f"  weights      {_gb(plan.weight_bytes)}",
        *([f"  adapters     {_gb(plan.adapter_bytes)}"] if plan.adapter_bytes else []),
        f"  activations  {_gb(plan.activation_bytes)} about",
        *([f"  states       {_gb(states)}, {plan.snapshots} snapshots in it"] if states else []),
        *([f"  disk copies  {_gb(plan.copy_bytes)}"] if plan.copy_bytes else []),
        f"  KV slots     {_gb(plan.pool_bytes)}: {_slots(found)}",
        f"Longest request: {found.longest} tokens (the context is {found.context_length}).",
        f"Streams of {length} tokens at a time: {found.streams(length)}; more wait, or share prefixes.",
    ]
    if proof is not None:
        lines += [
            f"Run: one request of {proof.longest} tokens, then {proof.streams} of {proof.length} at a time.",
            f"  activations measured {_gb(proof.activation_bytes)}, slots {proof.slots}; "
            f"at most {_gb(proof.peak_bytes)} held of {_gb(proof.budget_bytes)}, {proof.retractions} had to make room: "
            f"{'it holds' if proof.holds else 'IT DOES NOT HOLD'}",
        ]
    return "\n".join(lines)


def _slots(found: Estimate) -> str:
    plan = found.plan
    if not plan.window_slots:
        return f"{plan.slots} tokens of {found.slot_bytes} bytes"
    full = f"{plan.slots} tokens of {found.slot_bytes - found.window_bytes} bytes"
    return f"{full}, {plan.window_slots} of {found.window_bytes} in layers that see the last {plan.reach}"


def _gb(count: int) -> str:
    return f"{count / 1e9:8.3f} GB"
