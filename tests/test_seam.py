"""The seam: mlx-lm's models are hooked wherever they bind attention, and are their own selves outside of a step."""

from __future__ import annotations

import gc
import importlib
import sys
import weakref
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import base, qwen3
from mlx_lm.utils import load_model

from pippin.config import EngineConfig
from pippin.errors import ModelError
from pippin.loading import load_core
from pippin.messages import Submit
from pippin.models import seam
from pippin.models.deferred import Part, settled
from pippin.models.seam import Seam, active, install
from pippin.types import SamplingParams
from tests.checkpoints import build_model, family_config, make_checkpoint, random_weights

VOCAB = 288


def tiny(family: str = "qwen3", **overrides: Any) -> nn.Module:
    model = build_model(family_config(family, num_hidden_layers=2, **overrides))
    model.load_weights(list(random_weights(model, 1).items()))
    mx.eval(model.parameters())
    return model


def operands(seed: int = 0) -> tuple[mx.array, mx.array, mx.array]:
    """q [3, 4, 1, 16], k and v [3, 2, 1, 16]"""
    keys = mx.random.split(mx.random.key(seed), 3)
    shapes = (3, 4, 1, 16), (3, 2, 1, 16), (3, 2, 1, 16)
    q, k, v = (mx.random.normal(s, key=key) for s, key in zip(shapes, keys, strict=True))
    return q, k, v


class Recorder:
    """A layer that attends by returning its queries, doubled."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, object, mx.array | None]] = []

    def attend(self, q: mx.array | Part, scale: float, mask: object, sinks: mx.array | None) -> mx.array:
        self.asked.append((scale, mask, sinks))
        out: mx.array = 2 * settled(q)
        return out


@pytest.mark.parametrize("family", ["gemma", "qwen3"])
def test_outside_of_a_step_a_hooked_model_computes_what_it_did(family: str) -> None:
    model = tiny(family, head_dim=16)
    tokens = mx.array([[5, 6, 7, 8], [9, 10, 11, 12]])
    before = np.array(model(tokens))
    modules = [name for name, _ in model.named_modules()]
    for _ in range(3):  # hooking twice changes nothing
        install(model, VOCAB)
        if family == "gemma":
            assert (np.array(model(tokens)) == before).all()
        else:  # swiglu is another on the CPU
            np.testing.assert_allclose(np.array(model(tokens)), before, rtol=1e-4, atol=1e-4)
    assert [name for name, _ in model.named_modules()] == modules
    head = type(model.model.embed_tokens if family == "gemma" else model.lm_head)
    assert [c.__name__ for c in head.__mro__].count("_Selecting") == 1


def test_keys_of_our_caches_reach_their_layer_and_others_are_refused() -> None:
    q, k, v = operands()
    layer, through = Recorder(), Seam(None)
    with active(through):
        plain = base.scaled_dot_product_attention(q, k, v, cache=None, scale=0.5, mask=None)
        through.own(k, layer)
        owned = base.scaled_dot_product_attention(q, k, v, cache=None, scale=0.5, mask="m", sinks=q)
        with pytest.raises(ModelError, match="keys are changed"):
            base.scaled_dot_product_attention(q, k + 0, v, cache=None, scale=0.5, mask=None)
    assert layer.asked == [(0.5, "m", q)]
    assert mx.array_equal(owned, 2 * q)
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.5)
    assert mx.array_equal(plain, expected)
    assert mx.array_equal(base.scaled_dot_product_attention(q, k, v, cache=None, scale=0.5, mask=None), expected)


@pytest.mark.parametrize(("tied", "quantized"), [(False, False), (True, False), (False, True), (True, True)])
def test_the_head_computes_the_selected_rows_and_no_others(
    tied: bool, quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(head_dim=16, tie_word_embeddings=tied)
    if quantized:
        nn.quantize(model, group_size=32, bits=8)
    tokens = mx.array([[5], [6], [7], [8], [9]])
    whole = np.array(model(tokens))
    install(model, VOCAB)
    head, name = (model.model.embed_tokens, "as_linear") if tied else (model.lm_head, "__call__")
    seen: list[tuple[int, ...]] = []
    plain = type(head).__mro__[2]  # behind the hook
    compute = getattr(plain, name)

    def counted(self: nn.Module, x: mx.array) -> mx.array:
        if self is head and mx.issubdtype(x.dtype, mx.floating):
            seen.append(x.shape)
        out: mx.array = compute(self, x)
        return out

    monkeypatch.setattr(plain, name, counted)
    with active(Seam(mx.array([3, 0, 3]))):
        selected = np.array(model(tokens))
    assert seen == [(3, 1, 64)]
    np.testing.assert_allclose(selected, whole[[3, 0, 3]], rtol=1e-5, atol=1e-4)
    with active(Seam(None)):
        np.testing.assert_allclose(np.array(model(tokens)), whole, rtol=1e-5, atol=1e-4)


def test_an_array_that_is_gone_leaves_its_identity_to_nobody_else() -> None:
    through = Seam(None)
    _, k, _ = operands()
    through.own(k + 0, Recorder())
    assert not any(id(other) in through.owners for other in [k + 0 for _ in range(100)])


def test_a_step_that_raises_leaves_no_seam_behind() -> None:
    q, k, v = operands()
    through = Seam(None)

    def step() -> None:
        with active(through):
            through.own(k, Recorder())
            raise KeyError

    with pytest.raises(KeyError):
        step()
    assert not through.owners
    base.scaled_dot_product_attention(q, k, v, cache=None, scale=1.0, mask=None)


def test_nothing_keeps_the_keys_of_a_step_but_the_step() -> None:
    """Layers and seam refer to each other: without the cycle collector K and V must go all the same."""
    q, k, v = operands()

    class Layer(Recorder):
        def __init__(self, through: Seam) -> None:
            super().__init__()
            self.seam = through
            self.keys = k

    gc.disable()
    try:
        through = Seam(None)
        layer = Layer(through)
        with active(through):
            through.own(k, layer)
            base.scaled_dot_product_attention(q, k, v, cache=None, scale=1.0, mask=None)
        found = weakref.ref(layer)
        del through, layer
        assert found() is None
    finally:
        gc.enable()


def test_steps_leave_no_garbage_that_holds_arrays(tmp_path: Path) -> None:
    core = load_core(EngineConfig(model_path=str(make_checkpoint(tmp_path, "qwen3")), max_total_tokens=200))
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    core.add(Submit("a", [5, 6, 7], 3, params))
    for _ in range(5):
        core.step()
    gc.collect()
    gc.disable()
    try:
        before = mx.get_active_memory()
        for _ in range(15):
            core.step()
        assert mx.get_active_memory() - before < 64 * 1024
    finally:
        gc.enable()


# --- who binds the attention function, and when ---


@pytest.fixture
def unhooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm as it is before any model of ours: its own function bound everywhere."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_lm.models."):
            for key, value in list(vars(module).items()):
                if value is seam.attention:
                    monkeypatch.setattr(module, key, seam._original)


@pytest.mark.usefixtures("unhooked")
def test_modules_imported_before_and_after_are_hooked() -> None:
    model = tiny(head_dim=16)
    assert qwen3.scaled_dot_product_attention is seam._original
    install(model, VOCAB)
    assert qwen3.scaled_dot_product_attention is seam.attention
    assert base.scaled_dot_product_attention is seam.attention
    sys.modules.pop("mlx_lm.models.olmo2", None)
    late = importlib.import_module("mlx_lm.models.olmo2")
    assert late.scaled_dot_product_attention is seam.attention


@pytest.mark.usefixtures("unhooked")
def test_a_checkpoints_own_code_is_hooked_though_mlx_lm_puts_it_in_no_table_of_modules(tmp_path: Path) -> None:
    source = Path(qwen3.__file__).read_text().replace("from .", "from mlx_lm.models.")
    path = make_checkpoint(tmp_path, "qwen3", model_file="own.py")
    (path / "own.py").write_text(source)
    model, _ = load_model(path, trust_remote_code=True)
    own = type(model).__call__.__globals__
    assert own["scaled_dot_product_attention"] is seam._original
    install(model, VOCAB)
    assert own["scaled_dot_product_attention"] is seam.attention


@pytest.mark.parametrize("tied", [True, False])
def test_quantized_products_get_flat_rows(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of [n, 1, in] is n products of one row on CUDA."""
    model = build_model(family_config("qwen3", head_dim=32, tie_word_embeddings=tied))
    nn.quantize(model, group_size=32, bits=4)
    tokens = mx.array([[5], [6], [7]])
    expected = model(tokens)
    install(model, 288)
    shapes: list[tuple[int, ...]] = []
    product = mx.quantized_matmul

    def seen(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        shapes.append(x.shape)
        return product(x, *args, **kwargs)

    monkeypatch.setattr(mx, "quantized_matmul", seen)
    assert mx.allclose(model(tokens), expected, atol=1e-5)
    assert len(shapes) == 3 * 7 + 1
    assert all(len(shape) == 2 for shape in shapes)
