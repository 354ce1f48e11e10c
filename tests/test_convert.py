"""``pippin convert``: what it writes loads everywhere, computes the same, and is there whole or not at all."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from pippin.cli import run_command
from pippin.config import ConvertOptions, EngineConfig
from pippin.demo import demo_model_path
from pippin.errors import ConfigError, ModelError
from pippin.messages import Progress
from pippin.models.convert import convert, shards_of
from pippin.models.load import load_mlx_model
from tests.checkpoints import make_checkpoint

TOKENS = [[5, 9, 17, 3, 250, 8]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", head_dim=32, tokenizer=Path(demo_model_path()))
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "training_args.bin").write_bytes(b"not for us")
    return path


def logits(path: Path | None, **options: Any) -> Any:
    """By the engine's own loader, float32."""
    config = EngineConfig(dtype="float32", **options)
    model = load_mlx_model(None if path is None else str(path), config).model
    return np.asarray(model(mx.array(TOKENS)).astype(mx.float32))


def made(checkpoint: Path, output: Path, **options: Any) -> Path:
    convert(ConvertOptions(str(output), str(checkpoint), **options))
    return output


def test_a_copy_computes_the_same(checkpoint: Path, tmp_path: Path) -> None:
    path = made(checkpoint, tmp_path / "copy")
    assert (logits(path) == logits(checkpoint)).all()
    theirs, config = mlx_lm.utils.load_model(path)
    assert (np.asarray(theirs(mx.array(TOKENS))) == logits(checkpoint)).all()
    assert config["model_type"] == "qwen3"


@pytest.mark.parametrize(
    ("options", "bits", "group"),
    [
        ({"quantization": "mlx_q4"}, 4, 64),
        ({"quantization": "mlx_8bit"}, 8, 64),
        ({"q_bits": 4, "q_group_size": 32}, 4, 32),
        ({"q_bits": 3}, 3, 64),
        ({"q_bits": 6, "q_group_size": 32, "dtype": "float16"}, 6, 32),
    ],
    ids=str,
)
def test_quantized_as_asked_and_as_while_loading(
    checkpoint: Path, tmp_path: Path, options: dict[str, Any], bits: int, group: int
) -> None:
    path = made(checkpoint, tmp_path / "small", **options)
    loaded = load_mlx_model(str(path), EngineConfig())
    assert loaded.quantization == f"{bits}-bit affine, group {group}"
    if "quantization" in options:
        assert (logits(path) == logits(checkpoint, **options)).all()
    theirs, _ = mlx_lm.utils.load_model(path)
    theirs.set_dtype(mx.float32)
    assert np.asarray(theirs(mx.array(TOKENS))) == pytest.approx(logits(path), abs=1e-4)
    written = mx.load(str(path / "model.safetensors"))
    assert isinstance(written, dict)
    kinds = {w.dtype for w in written.values()} - {mx.uint32}
    assert kinds == {mx.float16 if options.get("dtype") == "float16" else mx.float32}


def test_layers_that_are_quantized_otherwise_or_not_at_all_stay_so(tmp_path: Path) -> None:
    """qwen3_moe's gates get 8 bits by its class; rows of 48 don't divide by 64 and stay whole."""
    source = make_checkpoint(tmp_path / "moe", "qwen3_moe", hidden_size=128, intermediate_size=48)
    path = made(source, tmp_path / "small", q_bits=4)
    config = json.loads((path / "config.json").read_text())
    others = {name: q["bits"] for name, q in config["quantization"].items() if isinstance(q, dict)}
    assert others
    assert set(others.values()) == {8}
    assert all(name.endswith("mlp.gate") for name in others)
    assert (logits(path) == logits(source, quantization="mlx_q4")).all()


def test_the_demo_model_is_the_default(tmp_path: Path) -> None:
    done = convert(ConvertOptions(str(tmp_path / "demo"), quantization="mlx_q8", dtype="float32"))
    assert (done.files, done.quantization) == (1, "8-bit affine, group 64")
    assert (logits(done.path) == logits(None, quantization="mlx_q8")).all()
    assert (done.path / "tokenizer.json").read_bytes() == Path(demo_model_path(), "tokenizer.json").read_bytes()


def test_what_belongs_to_the_checkpoint_comes_along_and_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    path = made(checkpoint, tmp_path / "copy")
    assert {f.name for f in path.iterdir()} == {
        "chat_template.jinja", "config.json", "model.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_large_models_are_cut_into_files_with_an_index(checkpoint: Path, tmp_path: Path) -> None:
    path = made(checkpoint, tmp_path / "cut", max_shard_gb=100_000 / 2**30)
    files = sorted(path.glob("*.safetensors"))
    assert len(files) > 3
    assert all(f.name == f"model-{i:05d}-of-{len(files):05d}.safetensors" for i, f in enumerate(files, 1))
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: file.name for file in files for name in mx.load(str(file))} == index
    assert (logits(path) == logits(checkpoint)).all()


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 50), min_size=1), st.integers(1, 60))
def test_shards_hold_all_in_order_and_no_more_than_they_may(sizes: dict[str, int], most: int) -> None:
    shards = list(shards_of(sizes, most))
    assert [name for names in shards for name in names] == list(sizes)
    assert all(len(names) == 1 or sum(sizes[n] for n in names) <= most for names in shards)
    followed = pairwise(shards)
    assert all(sum(sizes[n] for n in names) + sizes[after[0]] > most for names, after in followed), "no file too many"


def test_progress_is_told_of_in_bytes_to_the_end(checkpoint: Path, tmp_path: Path) -> None:
    heard: list[Progress] = []
    convert(ConvertOptions(str(tmp_path / "o"), str(checkpoint), max_shard_gb=1e-4), heard.append)
    assert list(dict.fromkeys(p.stage for p in heard)) == ["load", "save"]
    for stage in ("load", "save"):
        mine = [p for p in heard if p.stage == stage]
        assert [p.done for p in mine] == sorted(p.done for p in mine)
        assert mine[0].done == 0
        assert mine[-1].done == mine[-1].total > 0


# --- whole or not at all ---


def test_nothing_is_left_where_it_fails(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pippin.models.convert.mx.save_safetensors", full)
    with pytest.raises(ModelError, match="No space left on device"):
        made(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_directory_is_not_there_before_it_is_complete(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[bool] = []
    output = tmp_path / "out"
    convert(ConvertOptions(str(output), str(checkpoint)), lambda _: seen.append(output.exists()))
    assert not any(seen)
    assert output.is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_directory_may_be_there_and_a_full_one_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    made(checkpoint, tmp_path / "empty")
    before = sorted(p.name for p in (tmp_path / "empty").iterdir())
    assert "model.safetensors" in before
    with pytest.raises(ConfigError, match="--output: there is something at"):
        made(checkpoint, tmp_path / "empty")
    assert sorted(p.name for p in (tmp_path / "empty").iterdir()) == before


# --- options ---


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"output": ""}, "--output"),
        ({"q_bits": 7}, "--q-bits"),
        ({"q_bits": 4, "quantization": "mlx_q4"}, "--q-bits"),
        ({"q_bits": 4, "q_group_size": 48}, "--q-group-size"),
        ({"q_group_size": 64}, "--q-group-size"),
        ({"max_shard_gb": 0.0}, "--max-shard-gb"),
        ({"dtype": "int8"}, "--dtype"),
        ({"quantization": "awq"}, "--quantization"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError, match=f"^{flag}: "):
        ConvertOptions(**{"output": "out", **options})


def test_what_is_quantized_is_not_quantized_again(checkpoint: Path, tmp_path: Path) -> None:
    path = made(checkpoint, tmp_path / "four", q_bits=4)
    with pytest.raises(ConfigError, match="--quantization: four is already quantized"):
        made(path, tmp_path / "again", q_bits=8)
    again = made(path, tmp_path / "copy")
    weights = (dict(tree_flatten(mlx_lm.utils.load_model(p)[0].parameters())) for p in (path, again))
    one, two = weights
    assert one.keys() == two.keys()
    assert all(mx.array_equal(one[name], two[name]) for name in one)


def test_pickled_weights_without_torch_name_the_extra(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    monkeypatch.setattr("pippin.models.load.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"PyTorch's .bin files.*pip install 'pippin\[torch\]'.*pippin convert"):
        load_mlx_model(str(tmp_path), EngineConfig())


def test_a_directory_without_weights_says_what_it_looked_for(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    (tmp_path / "optimizer.pt").write_bytes(b"PK")
    with pytest.raises(ModelError, match=r"has no model\*.safetensors, nor PyTorch's pytorch_model\*.bin"):
        load_mlx_model(str(tmp_path), EngineConfig())


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert run_command(["convert", "--model-path", str(checkpoint), "--output", str(output), "--q-bits", "4"]) == 0
    said = capsys.readouterr()
    assert f"{output}: " in said.out
    assert "4-bit affine, group 64" in said.out
    assert said.err == ""
    assert run_command(["convert", "--model-path", str(checkpoint), "--output", str(output)]) == 2
    assert capsys.readouterr().err.startswith("pippin: --output: there is something at")
    assert run_command(["convert"]) == 2
    assert capsys.readouterr().err == "pippin: --output: say where to write\n"
