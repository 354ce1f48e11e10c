"""Weights that others packed, written here as their formats say: logits are those of the numbers that were packed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from pippin.config import ConvertOptions, EngineConfig
from pippin.errors import ModelError
from pippin.models.convert import convert
from pippin.models.load import load_mlx_model
from tests.checkpoints import make_checkpoint

TOKENS = mx.array([[5, 9, 200, 41, 7, 3, 77, 130]])
GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Numbers = npt.NDArray[np.int64]
Parts = dict[str, npt.NDArray[Any]]
Pack = Callable[[Numbers, Numbers, npt.NDArray[np.float32], int], Parts]
"""From codes [in, out], zeros and scales [groups, out] to a layer's arrays, by the ends of their names."""


def words(numbers: Numbers, bits: int) -> npt.NDArray[np.int32]:
    """Along the last axis, lowest bits first."""
    shifts = np.arange(0, 32, bits)
    parts = numbers.reshape(*numbers.shape[:-1], -1, 32 // bits) << shifts
    return np.asarray(parts.sum(axis=-1).astype(np.uint32).view(np.int32))


def by_gptq(codes: Numbers, zeros: Numbers, scales: npt.NDArray[np.float32], bits: int) -> Parts:
    packed = {"qweight": words(codes.T, bits).T.copy(), "qzeros": words((zeros - 1) % (1 << bits), bits)}
    return packed | {"scales": scales, "g_idx": (np.arange(len(codes)) // GROUP).astype(np.int32)}


def by_gptq_2(codes: Numbers, zeros: Numbers, scales: npt.NDArray[np.float32], bits: int) -> Parts:
    return by_gptq(codes, zeros, scales, bits) | {"qzeros": words(zeros, bits)}


def by_awq(codes: Numbers, zeros: Numbers, scales: npt.NDArray[np.float32], bits: int) -> Parts:
    def order(numbers: Numbers) -> Numbers:
        return numbers.reshape(len(numbers), -1, 8)[..., list(AWQ_ORDER)].reshape(numbers.shape)

    return {"qweight": words(order(codes), bits), "qzeros": words(order(zeros), bits), "scales": scales}


def by_compressed_tensors(codes: Numbers, zeros: Numbers, scales: npt.NDArray[np.float32], bits: int) -> Parts:
    shape = np.array(codes.T.shape, np.int64)
    return {"weight_packed": words(codes.T, bits), "weight_scale": scales.T.copy(), "weight_shape": shape}


class Packed:
    """A checkpoint with its linear layers packed, and one with the numbers that they stand for."""

    def __init__(self, root: Path, pack: Pack, bits: int, family: str = "qwen3", zero: int | None = None) -> None:
        sizes: dict[str, Any] = {
            "hidden_size": 128,
            "intermediate_size": 96,
            "moe_intermediate_size": 64,
            "head_dim": 32,
        }
        self.plain = make_checkpoint(root / "plain", family, **sizes)
        self.path = root / "packed"
        shutil.copytree(self.plain, self.path)
        weights: Any = mx.load(str(self.plain / "model.safetensors"))
        arrays = {name: np.array(value) for name, value in weights.items()}
        packed, rng = dict(arrays), np.random.default_rng(3)
        for name, value in arrays.items():
            if not name.endswith("_proj.weight") or value.ndim != 2 or value.shape[1] % GROUP or value.shape[0] % 32:
                continue
            width, out = value.shape[1], value.shape[0]
            codes = rng.integers(0, 1 << bits, (width, out))
            zeros = rng.integers(1, 1 << bits, (width // GROUP, out))
            zeros = zeros if zero is None else np.full_like(zeros, zero)
            spread = float(1 << bits) * width**0.5
            scales = (rng.integers(64, 256, zeros.shape) / 64 / spread).astype(np.float16).astype(np.float32)
            dense = (codes - zeros.repeat(GROUP, axis=0)) * scales.repeat(GROUP, axis=0)
            arrays[name] = dense.T.astype(np.float32)
            del packed[name]
            parts = pack(codes, zeros, scales, bits)
            packed |= {name.removesuffix("weight") + end: part for end, part in parts.items()}
        assert len(packed) > len(arrays)
        for path, found in ((self.plain, arrays), (self.path, packed)):
            saved = {name: mx.array(value) for name, value in found.items()}
            mx.save_safetensors(str(path / "model.safetensors"), saved, metadata={"format": "pt"})

    def says(self, **settings: Any) -> Path:
        facts = json.loads((self.path / "config.json").read_text())
        (self.path / "config.json").write_text(json.dumps(facts | {"quantization_config": settings}))
        return self.path


def logits(path: Path) -> mx.array:
    found: mx.array = load_mlx_model(str(path), EngineConfig(dtype="float32")).model(TOKENS)
    return found


def assert_near(found: mx.array, expected: mx.array) -> None:
    assert float(mx.abs(found - expected).max()) < 1e-4 * float(mx.abs(expected).max())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("pack", "form"), [(by_gptq, "gptq"), (by_gptq_2, "gptq_v2")])
def test_gptq(pack: Pack, form: str, bits: int, tmp_path: Path) -> None:
    packed = Packed(tmp_path, pack, bits)
    path = packed.says(quant_method="gptq", bits=bits, group_size=GROUP, desc_act=False, checkpoint_format=form)
    loaded = load_mlx_model(str(path), EngineConfig(dtype="float32"))
    assert loaded.quantization == f"{bits}-bit affine, group {GROUP}"
    assert_near(loaded.model(TOKENS), logits(packed.plain))


def test_gptq_converted_is_read_as_mlxs_own(tmp_path: Path) -> None:
    packed = Packed(tmp_path, by_gptq, 4)
    path = packed.says(quant_method="gptq", bits=4, group_size=GROUP)
    convert(ConvertOptions(output=str(tmp_path / "converted"), model_path=str(path)))
    assert_near(logits(tmp_path / "converted"), logits(packed.plain))


def test_gptq_that_mlx_has_no_form_of_is_refused(tmp_path: Path) -> None:
    path = Packed(tmp_path, by_gptq, 4).says(quant_method="gptq", bits=4, group_size=-1)
    with pytest.raises(ModelError, match="GPTQ with bits 4 and group_size -1"):
        logits(path)


def test_gptq_in_the_order_of_activations_is_refused(tmp_path: Path) -> None:
    def ordered(codes: Numbers, *rest: Any) -> Parts:
        return by_gptq(codes, *rest) | {"g_idx": np.arange(len(codes), dtype=np.int32) % (len(codes) // GROUP)}

    turned = Packed(tmp_path, ordered, 4)
    with pytest.raises(ModelError, match="desc_act"):
        logits(turned.says(quant_method="gptq", bits=4, group_size=GROUP, desc_act=True))


def test_awq(tmp_path: Path) -> None:
    packed = Packed(tmp_path, by_awq, 4)
    assert_near(logits(packed.says(quant_method="awq", bits=4, group_size=GROUP, version="gemm")), logits(packed.plain))


def test_compressed_tensors_where_the_class_unpacks_them(tmp_path: Path) -> None:
    packed = Packed(tmp_path, by_compressed_tensors, 4, "deepseek_v3", zero=8)
    path = packed.says(quant_method="compressed-tensors", format="pack-quantized")
    assert_near(logits(path), logits(packed.plain))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "quantized by compressed-tensors.*not in model",
        ),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "quantized by modelopt.*quant_algo: FP8"),
        ({"quant_method": "fp8"}, "quantized by fp8.*not in model"),
        ({"quant_method": "bitsandbytes"}, "quantized by bitsandbytes.*not in model"),
    ],
)
def test_what_nobody_unpacks_is_refused_by_its_methods_name(settings: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=why):
        logits(Packed(tmp_path, by_compressed_tensors, 4, zero=8).says(**settings))
