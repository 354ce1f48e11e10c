"""TorchModelRunner's logits are the model's own, however steps are cut and mixed, before any sampler sees them."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pippin.config import EngineConfig
from pippin.torch.bridge import METAL, mlx_to_torch, torch_to_mlx
from pippin.torch.load import find_device, load_torch_runner
from pippin.torch.runner import TorchModelRunner
from pippin.types import Batch, Request, SamplingParams, Work
from tests.parity.reference import LENGTH, SHARED, Reference, build_reference

Model = tuple[Reference, TorchModelRunner]


@pytest.fixture(scope="module", params=["llama", "gemma2", "deepseek_v3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    reference = build_reference(tmp_path_factory.mktemp(request.param), request.param)
    config = EngineConfig(str(reference.path), device="torch:cpu", max_total_tokens=400)
    return reference, load_torch_runner(config, lambda _: None)[0]


def requests_of(reference: Reference, order: list[int]) -> list[Request]:
    """Requests whose slots lie as ``order`` says; the second begins in slots of the first."""
    found = [Request(f"r{i}", list(t), len(t), SamplingParams(), row=i + 1) for i, t in enumerate(reference.tokens)]
    for i, request in enumerate(found):
        request.slots = array("i", order[i * LENGTH : (i + 1) * LENGTH])
    found[1].slots[:SHARED] = found[0].slots[:SHARED]
    return found


@settings(max_examples=12)
@given(st.data(), st.permutations(range(1, 5 * LENGTH + 1)))
def test_any_way_to_cut_and_mix(model: Model, data: st.DataObject, order: list[int]) -> None:
    reference, runner = model
    requests = requests_of(reference, order)
    done = [0, SHARED, 0, 0, 0]
    while unfinished := [i for i, n in enumerate(done) if n < LENGTH]:
        ready = [i for i in unfinished if i != 1 or done[0] >= SHARED or 0 in unfinished]
        chosen = data.draw(st.lists(st.sampled_from(ready), min_size=1, unique=True), label="requests")
        ends = {i: min(LENGTH, done[i] + data.draw(st.sampled_from([1, 2, 9, 20, 33]), label="tokens")) for i in chosen}
        if 1 in ends and max(done[0], ends.get(0, 0)) < SHARED:  # what it shares must be written, in this step at last
            ends[0] = SHARED + 1
        works = [Work(requests[i], done[i], end, True) for i, end in ends.items()]
        found = np.asarray(runner.logits(Batch(tuple(works))))
        expected = np.stack([reference.logits[i, end - 1] for i, end in ends.items()])
        assert np.abs(found - expected).max() <= 1e-4 * reference.scale
        for i, end in ends.items():
            done[i] = end


def test_the_device_is_the_one_asked_for_or_the_best_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    given_streams: list[Any] = []
    monkeypatch.setattr("pippin.torch.load.add_streams", given_streams.append)
    for cuda, mps, best in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=cuda: found)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda found=mps: found)
        assert find_device("torch").type == best
        assert find_device("torch:cpu").type == "cpu"
    assert given_streams == [torch.mps], "MPS alone lacks streams"


# --- the bridge on Metal, by a fake of what MLX and torch have there ---


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Records, in order, what is asked of a Metal that isn't there."""
    asked: list[Any] = []
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: asked.append("torch is done"))
    monkeypatch.setattr(mx, "synchronize", lambda: asked.append("MLX is done"))
    monkeypatch.setattr(mx, "eval", lambda *_: asked.append("evaluated"))
    monkeypatch.setattr("pippin.torch.bridge._positive", lambda _: True)
    monkeypatch.setattr(mx, "from_dlpack", lambda tensor, copy: asked.append(("imported", copy)))

    def from_dlpack(capsule: object) -> torch.Tensor:
        asked.append(capsule)
        return torch.ones(3)

    monkeypatch.setattr(torch, "from_dlpack", from_dlpack)
    return asked


def test_an_mps_tensor_is_imported_once_torch_is_done(metal: list[Any]) -> None:
    tensor: Any = SimpleNamespace(
        requires_grad=False,
        layout=torch.strided,
        dtype=torch.float32,
        device=torch.device("mps"),
        numel=lambda: 3,
    )
    tensor.resolve_conj = tensor.resolve_neg = lambda: tensor
    torch_to_mlx(tensor, copy=False)
    assert metal == ["torch is done", ("imported", False)]


def test_an_array_is_exported_to_mps_once_it_is_computed(metal: list[Any]) -> None:
    array: Any = SimpleNamespace(ndim=1, shape=(3,), dtype=mx.float32)
    array.__dlpack__ = lambda **options: options
    mlx_to_torch(array, "mps", copy=False)
    assert metal[0] == "evaluated"
    assert metal[-2:] == ["MLX is done", {"dl_device": METAL, "copy": False}]
