"""Checkpoints that PyTorch pickled: read as they are or converted, and never run as code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pippin.config import ConvertOptions, EngineConfig
from pippin.errors import ModelError
from pippin.messages import Progress
from pippin.models.convert import convert
from pippin.models.load import load_mlx_model
from pippin.torch.checkpoints import INDEX
from pippin.torch.load import load_torch_model
from tests.parity.reference import Reference, build_reference

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return build_reference(tmp_path_factory.mktemp("llama"), "llama")


def weights_of(reference: Reference) -> Weights:
    found: Weights = load_file(reference.path / "model.safetensors")
    return found


def checkpoint(reference: Reference, path: Path, **files: Any) -> Path:
    """The reference's checkpoint with pickled weights: a file for each argument, ``__`` for a dot."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text((reference.path / "config.json").read_text())
    for name, content in files.items():
        torch.save(content, path / name.replace("__", "."))
    return path


def assert_equal(reference: Reference, path: Path) -> None:
    model = load_mlx_model(str(path), EngineConfig(dtype="float32")).model
    found = np.asarray(model(mx.array(reference.tokens)))
    assert np.abs(found - reference.logits).max() <= 1e-4 * reference.scale


def test_one_file(reference: Reference, tmp_path: Path) -> None:
    path = checkpoint(reference, tmp_path, pytorch_model__bin=weights_of(reference))
    before = sorted(f.name for f in path.iterdir())
    assert_equal(reference, path)
    assert sorted(f.name for f in path.iterdir()) == before


def test_several_files_with_an_index(reference: Reference, tmp_path: Path) -> None:
    weights = list(weights_of(reference).items())
    shards = {"pytorch_model-00001-of-00002": weights[:7], "pytorch_model-00002-of-00002": weights[7:]}
    path = checkpoint(reference, tmp_path, **{f"{name}__bin": dict(part) for name, part in shards.items()})
    index = {name: f"{file}.bin" for file, part in shards.items() for name, _ in part}
    (path / INDEX).write_text(json.dumps({"weight_map": index}))
    assert_equal(reference, path)
    (path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ModelError, match=r"lacks pytorch_model-00002-of-00002\.bin, which .* names"):
        load_mlx_model(str(path), EngineConfig())


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_training_scripts_file(reference: Reference, tmp_path: Path, key: str) -> None:
    assert_equal(reference, checkpoint(reference, tmp_path, model__pt={key: weights_of(reference), "epoch": 3}))


def test_files_of_old_torch_are_no_archives(reference: Reference, tmp_path: Path) -> None:
    path = checkpoint(reference, tmp_path)
    torch.save(weights_of(reference), path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_equal(reference, path)


def test_parameters_and_their_dtype_are_kept(reference: Reference, tmp_path: Path) -> None:
    """Parameters carry gradients; float64 is none of MLX's on a GPU."""
    weights: dict[str, Any] = {n: torch.nn.Parameter(w.bfloat16()) for n, w in weights_of(reference).items()}
    path = checkpoint(reference, tmp_path / "halves", pytorch_model__bin=weights)
    done = convert(ConvertOptions(str(tmp_path / "mlx"), str(path)))
    written = mx.load(str(done.path / "model.safetensors"))
    assert isinstance(written, dict)
    assert {w.dtype for w in written.values()} == {mx.bfloat16}
    name = "model.embed_tokens.weight"
    assert np.array_equal(np.array(written[name].astype(mx.float32)), weights[name].detach().float().numpy())
    doubles = {n: w.double() for n, w in weights_of(reference).items()}
    assert_equal(reference, checkpoint(reference, tmp_path / "doubles", pytorch_model__bin=doubles))


def test_converted_once_it_needs_no_torch(reference: Reference, tmp_path: Path) -> None:
    path = checkpoint(reference, tmp_path / "from", pytorch_model__bin=weights_of(reference))
    heard: list[Progress] = []
    done = convert(ConvertOptions(str(tmp_path / "to"), str(path)), heard.append)
    assert list(dict.fromkeys(p.stage for p in heard)) == ["unpack", "load", "save"]
    assert {f.suffix for f in done.path.iterdir()} == {".json", ".safetensors"}
    assert_equal(reference, done.path)


def test_quantized_while_converting_as_from_safetensors(reference: Reference, tmp_path: Path) -> None:
    path = checkpoint(reference, tmp_path / "from", pytorch_model__bin=weights_of(reference))
    ways = {"bin": str(path), "safetensors": str(reference.path)}
    made = [convert(ConvertOptions(str(tmp_path / n), p, q_bits=4, q_group_size=32)).path for n, p in ways.items()]
    one, two = (mx.load(str(m / "model.safetensors")) for m in made)
    assert isinstance(one, dict)
    assert isinstance(two, dict)
    assert one.keys() == two.keys()
    assert all(mx.array_equal(one[name], two[name]) for name in one)


def test_the_torch_runners_model_reads_them_too(reference: Reference, tmp_path: Path) -> None:
    path = checkpoint(reference, tmp_path, pytorch_model__bin=weights_of(reference))
    loaded = load_torch_model(EngineConfig(str(path), device="torch:cpu"))
    with torch.no_grad():
        logits = loaded.model(torch.tensor(reference.tokens)).logits.numpy()
    assert np.abs(logits - reference.logits).max() <= 1e-4 * reference.scale


class Harm:
    """Pickled, it makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("archive", [True, False])
def test_code_in_a_pickle_is_not_run(reference: Reference, tmp_path: Path, archive: bool) -> None:
    mark = tmp_path / "harm done"
    path = checkpoint(reference, tmp_path / "model")
    content = weights_of(reference) | {"x": Harm(mark)}
    torch.save(content, path / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
    with pytest.raises(ModelError, match="holds code besides tensors, which is not run"):
        load_mlx_model(str(path), EngineConfig())
    assert not mark.exists()
    if archive:
        torch.load(path / "pytorch_model.bin", weights_only=False)
        assert mark.exists(), "the file would have done harm"


@pytest.mark.parametrize("case", ["damaged", "no tensors", "a list", "a pickle of numbers"])
def test_files_that_hold_no_weights_say_so(reference: Reference, tmp_path: Path, case: str) -> None:
    path = checkpoint(reference, tmp_path)
    file = path / "pytorch_model.bin"
    match case:
        case "damaged":
            torch.save(weights_of(reference), file)
            file.write_bytes(file.read_bytes()[:5000])
        case "no tensors":
            torch.save({"epoch": 3}, file)
        case "a list":
            torch.save([torch.ones(2)], file)
        case _:
            file.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ModelError, match=r"pytorch_model\.bin (was not loaded|holds no table)"):
        load_mlx_model(str(path), EngineConfig())
