"""What a loaded model needs, found out by running it: what its layers store, and which backend serves it exactly."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, count, product
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU

from pippin import kernels
from pippin.attention import AttentionBackend, backends_to_try
from pippin.cache.layout import CacheLayout, LayerShape, Leaf, StateShape
from pippin.cache.pool import KVPool
from pippin.cache.windows import WindowTable
from pippin.errors import ConfigError, ModelError
from pippin.models.deferred import Fusions
from pippin.models.joined import join
from pippin.models.matrices import matrices
from pippin.models.seam import NO_FUSIONS, install, off_by_a_rounding, one_expert
from pippin.runner import MlxModelRunner
from pippin.types import Batch, Request, SamplingParams, Work

log = logging.getLogger(__name__)

# Contexts of the probe's sequences before and after it; a chunk behind a prefix, a prompt, decodes and a short chunk.
_PROBE = ((7, 12), (0, 5), (9, 10), (3, 5), (13, 14))
# Tokens after which a recurrent state has its usual shape.
_SETTLED = 8
# How far logits may lie from the model's own, as a share of their largest: rounding, and no more.
_TOLERANCE = {mx.float32: 1e-3, mx.float16: 2e-2, mx.bfloat16: 1e-1}
# In 16 bits, where that is more, so many times what a rounding of each layer's attention does to them; logits that have
# nothing to do with the model's lie farther than the last. The former is from random models (docs/log.md).
_ROUNDINGS, _MOST = 3.0, 0.5


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend for a model, why it, and what the model's caches store.

    ``fusions`` are the operations that its forward may put together (``models.deferred``).
    """

    backend: AttentionBackend
    reason: str
    layout: CacheLayout
    fusions: Fusions = NO_FUSIONS

    @property
    def shapes(self) -> tuple[LayerShape | None, ...]:
        """What each K and V stores; None: nothing."""
        return self.layout.shapes

    def with_kv_cache_dtype(self, name: str) -> Choice:
        """This with K and V stored as ``--kv-cache-dtype`` says. Raises ConfigError where none can be."""
        if name == "auto":
            return self
        packing = next(p for p in kernels.PACKINGS if name.startswith(p))
        layout = self.layout.quantized(packing)
        if layout == self.layout:
            raise ConfigError("this model keeps no K and V that can be quantized; leave it out", "--kv-cache-dtype")
        return replace(self, layout=layout)

    def pool(self, num_slots: int, page_size: int = 1, windows: WindowTable | None = None) -> KVPool:
        """A store for the model: ``num_slots`` slots, the scratch page included; ``windows`` as ``KVPool`` takes it."""
        return KVPool(self.shapes, num_slots, page_size, self.layout, windows=windows)


def choose_attention(model: nn.Module, name: str, vocab_size: int, *, fuse: bool | None = None) -> Choice:
    """Finds the first backend that ``name`` allows and whose logits are the model's own.

    ``fuse``: also try to put operations together; where kernels run, if left out. Hooks the model (``seam.install``).
    Where there are several ways to compute the model's products, it finds out which is fastest here.
    Raises ModelError with every backend's reason if none serves it.
    """
    layout = measure_caches(model)
    install(model, vocab_size)
    with one_expert():
        choice = _exact(model, name, layout, vocab_size, kernels.backend() is not None if fuse is None else fuse)
    if kernels.backend() is not None and layout.dtypes:
        kernels.measure_products(matrices(model), layout.dtypes[0])
    return choice


def _exact(model: nn.Module, name: str, layout: CacheLayout, vocab_size: int, fuse: bool) -> Choice:
    """The first backend that is right, with what can be put together."""
    own = _Own(model, _probe_tokens(vocab_size))
    refused: list[str] = []
    for backend in backends_to_try(name):
        reason = _differs(Choice(backend, "", layout), own, vocab_size)
        if reason is None:
            reason = "exact in the probe" + "".join(f"; not {r}" for r in refused)
            choice = Choice(backend, reason, layout)
            return _fused(choice, own, vocab_size) if fuse else choice
        refused.append(f"{backend.name}: {reason}")
    raise ModelError("no attention backend serves this model exactly: " + "; ".join(refused))


def _largest(x: mx.array) -> float:
    return float(np.abs(np.asarray(x)).max())


class _Own:
    """A model's own logits for each of ``tokens``, and how far a rounding moves them."""

    def __init__(self, model: nn.Module, tokens: Sequence[Sequence[int]]) -> None:
        self.model = model
        self.tokens = tokens
        self.logits = _alone(model, tokens)
        self.scale = _largest(self.logits)

    @cached_property
    def moved(self) -> float:
        """The largest difference; asked for only where there are large ones."""
        with off_by_a_rounding():
            return _largest(_alone(self.model, self.tokens) - self.logits)

    def reason(self, logits: mx.array, dtype: mx.Dtype) -> str | None:
        """Why ``logits`` are not the model's own for all that ``dtype`` can tell, or None."""
        worst, scale = _largest(logits - self.logits), self.scale
        if worst <= _TOLERANCE[dtype] * scale:
            return None
        if dtype.size > 2 or not worst <= _MOST * scale:
            return f"logits differ by {worst:.2g} of {scale:.2g}"
        if worst <= _ROUNDINGS * self.moved:
            return None
        return f"logits differ by {worst:.2g} of {scale:.2g}, by {self.moved:.2g} where attention is off by a rounding"


def _fused(choice: Choice, own: _Own, vocab_size: int) -> Choice:
    """``choice`` with the fusions that leave the logits what they are: all, or as many as do."""
    model = own.model
    if choice.backend.name != "rows":
        return choice
    joined = join(model, lambda: model(mx.array([[1]]), cache=make_prompt_cache(model)))
    for fusions in _to_try(joined, any(isinstance(m, SwitchGLU) for _, m in model.named_modules())):
        reason = _differs(replace(choice, fusions=fusions), own, vocab_size)
        if reason is None:
            return replace(choice, fusions=fusions)
        log.info("%s: %s", fusions, reason)
    return choice


def _to_try(joined: frozenset[tuple[str, ...]], experts: bool) -> list[Fusions]:
    """All fusions there may be, the most first; a model that takes few of them is one of many tries."""
    names = sorted(joined)
    some = [frozenset(part) for n in range(len(names) + 1) for part in combinations(names, n)]
    routed = (False, True) if experts else (False,)
    found = [Fusions(*each) for each in product((False, True), some, routed) if each != (False, frozenset(), False)]
    return sorted(found, key=lambda f: (len(f.joined) + f.residual + f.experts, len(f.joined)), reverse=True)


def measure_caches(model: nn.Module, lazily: bool = False) -> CacheLayout:
    """Runs some tokens through the model with its own caches, and looks at what they hold.

    ``lazily``: nothing is computed, so that weights which nobody has read stay unread.

    Raises ModelError for caches of kinds that no backend serves, and for states that grow with the context.
    """
    caches = make_prompt_cache(model)
    for leaf in _leaves(caches):
        if type(leaf) not in (KVCache, RotatingKVCache, ArraysCache):
            raise ModelError(f"its layers keep {type(leaf).__name__}, which no attention backend serves yet")
    asked = {id(leaf): _note_windows(leaf) for leaf in _leaves(caches) if isinstance(leaf, RotatingKVCache)}
    model(mx.array([[1] * _SETTLED]), cache=caches)
    states = [_state_of(leaf) for leaf in _leaves(caches) if isinstance(leaf, ArraysCache)]
    logits = model(mx.array([[1]]), cache=caches)
    if not lazily:
        mx.eval(logits)
    if states != [_state_of(leaf) for leaf in _leaves(caches) if isinstance(leaf, ArraysCache)]:
        raise ModelError("its recurrent state changes its shape with the context, which no attention backend serves")
    shapes = [_shape_of(leaf, asked.get(id(leaf), [])) for leaf in _leaves(caches) if not isinstance(leaf, ArraysCache)]
    indices = count(), count()  # of K and Vs, of states

    def part(leaf: object) -> Leaf:
        recurrent = isinstance(leaf, ArraysCache)
        return Leaf(next(indices[recurrent]), recurrent)

    tree = [tuple(map(part, c.caches)) if isinstance(c, CacheList) else part(c) for c in caches]
    return CacheLayout(tuple(tree), tuple(shapes), tuple(states))


def _leaves(caches: Iterable[Any]) -> list[Any]:
    """The caches, with those in mlx-lm's lists of caches in their place."""
    return [leaf for c in caches for leaf in (c.caches if isinstance(c, CacheList) else (c,))]


def _state_of(cache: ArraysCache) -> StateShape:
    return StateShape(tuple(None if a is None else (a.shape[1:], a.dtype) for a in cache.cache))


def _note_windows(cache: RotatingKVCache) -> list[int]:
    """From here on, the windows that ``cache`` is asked masks for: PLaMo 3 looks one token further than its caches."""
    asked: list[int] = []
    make_mask = cache.make_mask

    def noting(N: int, window_size: int | None = None, return_array: bool = False) -> Any:
        asked.append(window_size or 0)
        return make_mask(N, window_size=window_size, return_array=return_array)

    cache.make_mask = noting
    return asked


def _shape_of(cache: KVCache | RotatingKVCache, windows: Sequence[int]) -> LayerShape | None:
    """``windows``: what masks it was asked for."""
    window = None
    if isinstance(cache, RotatingKVCache):
        if cache.keep:
            raise ModelError("it keeps the first tokens beside a sliding window, which no backend serves yet")
        window = max(int(cache.max_size), *windows, 0)
    if cache.keys is None:
        return None
    (_, heads, _, key_dim), value_dim = cache.keys.shape, cache.values.shape[-1]
    return LayerShape(heads, key_dim, value_dim, cache.keys.dtype, window)


def _probe_tokens(vocab_size: int) -> list[list[int]]:
    """Tokens spread over the vocabulary, the same on every run."""
    top = max(2, vocab_size)
    return [[(7919 * (i * 31 + j) + 1) % top for j in range(end)] for i, (_, end) in enumerate(_PROBE)]


def _alone(model: nn.Module, tokens: Sequence[Sequence[int]]) -> mx.array:
    """The model's own logits for each sequence's last token, [n, vocab] float32."""
    found = []
    for (start, _), row in zip(_PROBE, tokens, strict=True):
        caches = make_prompt_cache(model)
        if start:
            model(mx.array([row[:start]]), cache=caches)
        found.append(model(mx.array([row[start:]]), cache=caches)[0, -1].astype(mx.float32))
    out = mx.stack(found)
    mx.eval(out)
    return out


def _differs(choice: Choice, own: _Own, vocab_size: int) -> str | None:
    """Why ``choice`` doesn't serve the model, or None: a ragged batch against each sequence alone."""
    tokens, pool = own.tokens, choice.pool(1 + sum(map(len, own.tokens)))
    runner = MlxModelRunner(
        own.model, choice.backend, pool, max_running=len(tokens), vocab_size=vocab_size, fusions=choice.fusions
    )
    requests = [_request(i, row) for i, row in enumerate(tokens)]
    _scatter_slots(requests)
    try:
        prefixes = [Work(r, 0, s, True) for r, (s, _) in zip(requests, _PROBE, strict=True) if s]
        runner.logits(Batch(tuple(prefixes)))
        works = [Work(r, s, e, True) for r, (s, e) in zip(requests, _PROBE, strict=True)]
        logits = runner.logits(Batch(tuple(works)))
    except ModelError as error:
        return str(error)
    except Exception as error:  # a model's own code met our caches: whatever it raised is the reason
        return f"{type(error).__name__} ({str(error).splitlines()[0] if str(error) else 'no message'})"
    return own.reason(logits, min(choice.layout.dtypes, key=lambda d: int(d.size), default=mx.float32))


def _request(index: int, tokens: Sequence[int]) -> Request:
    return Request(f"probe-{index}", list(tokens), len(tokens), SamplingParams(), row=index + 1)


def _scatter_slots(requests: Sequence[Request]) -> None:
    """Deals slots out in turn, so that no request's are neighbours."""
    slot = 1
    for at in range(max(len(r.tokens) for r in requests)):
        for request in requests:
            if at < len(request.tokens):
                request.slots.append(slot)
                slot += 1


def measure_activations(
    model: nn.Module, choice: Choice, *, chunk: int, max_running: int, vocab_size: int, context_length: int
) -> int:
    """Bytes that the largest step needs beside weights and pool: a full chunk, and a full batch that samples.

    The chunk runs against itself only; what a longer context adds (one layer's gathered K and V) is computed.
    """
    count = max(1, min(max_running, chunk))
    rows = [chunk // count + (i < chunk % count) for i in range(count)] if not choice.layout.states else []
    pool = choice.pool(1 + chunk + 1)
    runner = MlxModelRunner(
        model, choice.backend, pool, max_running=count, vocab_size=vocab_size, fusions=choice.fusions
    )
    requests = [_request(i, [1] * n) for i, n in enumerate(rows)]
    for request in requests:
        request.slots = array("i", range(1, 1 + len(request.tokens)))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    if requests:
        runner.logits(Batch(tuple(Work(r, 0, len(r.tokens), True) for r in requests)))
    whole = _request(0, [1] * (chunk + 1))
    whole.slots = array("i", range(1, 2 + chunk))
    runner.logits(Batch((Work(whole, 0, chunk, True, save=1),)))
    if pool.states:  # a full batch that decodes, each row with a state of its own
        for _ in range(2):
            works = [Work(r, chunk, chunk + 1, True, restore=1) for r in _copies(whole, count)]
            runner.logits(Batch(tuple(works)))
    measured = mx.get_peak_memory() - before
    # Plain MLX reads quantized slots through arrays of codes and of scaled numbers.
    layer = max((s.bytes_in_full * (2 if s.packing else 1) for s in choice.shapes if s), default=0)
    return int(measured + 2 * layer * context_length)


def _copies(request: Request, count: int) -> list[Request]:
    """Requests that read and write the same slots: for what they cost, not for what they compute."""
    return [replace(request, id=f"probe-{i}", row=i + 1) for i in range(count)]
