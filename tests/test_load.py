"""Loading: every family, in every form, and every way in which a checkpoint can be wrong."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from pippin.config import EngineConfig
from pippin.errors import ConfigError, ModelError
from pippin.messages import Progress
from pippin.models.corrections import older_names
from pippin.models.load import load_mlx_model
from tests.checkpoints import COMMON, FAMILIES, WINDOW, make_checkpoint
from tests.hub import serve_hub

TOKENS = mx.array([[5, 9, 100, 17, 3, 250, 4, 4, 60, 7, 8, 9]])
Configs = dict[str, Any]


def logits(model: nn.Module) -> mx.array:
    found: mx.array = model(TOKENS).astype(mx.float32)
    return found


def parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def load(path: Path, **options: Any) -> nn.Module:
    return load_mlx_model(str(path), EngineConfig(**options)).model


# --- what is loaded ---


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_with_its_facts(family: str, tmp_path: Path) -> None:
    events: list[Progress] = []
    loaded = load_mlx_model(str(make_checkpoint(tmp_path, family)), EngineConfig(), events.append)
    assert (loaded.model_type, loaded.path) == (family, tmp_path)
    assert (loaded.dtype, loaded.quantization) == (mx.float32, None)
    assert (loaded.eos_token_ids, loaded.vocab_size, loaded.context_length) == ((2,), 288, 256)
    saved = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(saved, dict)
    found = parameters(loaded.model)
    assert found.keys() == saved.keys()
    assert all(mx.array_equal(found[name], saved[name]) for name in saved)
    assert loaded.weight_bytes == sum(a.nbytes for a in saved.values())
    assert_complete(events, "load", loaded.weight_bytes)
    assert mx.isfinite(logits(loaded.model)).all()


def assert_complete(events: list[Progress], stage: str, total: int) -> None:
    """Progress starts at nothing, only grows, and ends at everything."""
    assert {e.stage for e in events} == {stage}
    assert {e.total for e in events} == {total}
    done = [e.done for e in events]
    assert (done[0], done[-1]) == (0, total)
    assert done == sorted(set(done))


@pytest.mark.parametrize(
    ("changes", "generation", "expected"),
    [
        ({"eos_token_id": [2, 7]}, None, (2, 7)),
        ({"eos_token_id": 2}, {"eos_token_id": [9, 2]}, (9, 2)),
        ({"eos_token_id": 0}, {}, (0,)),
        ({"eos_token_id": None}, None, ()),
        ({"eos_token_id": None, "text_config": {"eos_token_id": 11}}, None, (11,)),
    ],
)
def test_eos_token_ids(changes: Configs, generation: Configs | None, expected: tuple[int, ...], tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3", **changes)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert load_mlx_model(str(tmp_path), EngineConfig()).eos_token_ids == expected


@pytest.mark.parametrize(
    ("changes", "asked", "expected", "warns"),
    [
        ({}, None, 256, False),
        ({}, 100, 100, False),
        ({}, 1000, 1000, True),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}}, None, 1024, False),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}}, 900, 900, False),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, None, 256, False),
        ({"max_position_embeddings": 64, "text_config": {"max_position_embeddings": 77}}, None, 77, False),
    ],
)
def test_context_length(
    changes: Configs,
    asked: int | None,
    expected: int,
    warns: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_checkpoint(tmp_path, "qwen3", **changes)
    assert load_mlx_model(str(tmp_path), EngineConfig(context_length=asked)).context_length == expected
    assert ("--context-length" in caplog.text) == warns


# --- in which form ---


def test_auto_dtype_is_float32_on_the_cpu(tmp_path: Path) -> None:
    loaded = load_mlx_model(str(make_checkpoint(tmp_path, "llama", dtype=mx.bfloat16)), EngineConfig(device="cpu"))
    assert loaded.dtype == mx.float32
    assert {a.dtype for a in parameters(loaded.model).values()} == {mx.float32}


def test_auto_dtype_keeps_the_checkpoints_elsewhere(tmp_path: Path) -> None:
    loaded = load_mlx_model(str(make_checkpoint(tmp_path, "llama", dtype=mx.float16)), EngineConfig(device="gpu"))
    assert loaded.dtype == mx.float16
    assert {a.dtype for a in parameters(loaded.model).values()} == {mx.float16}


def test_cast_leaves_what_the_class_wants_left(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path, "deepseek_v3"), dtype="bfloat16")
    kept = {name for name, a in parameters(model).items() if a.dtype == mx.float32}
    assert kept == {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2)}


def test_cast_reaches_parameters_outside_of_leaf_modules(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path, "gpt_oss"), dtype="float16")
    assert parameters(model)["model.layers.0.self_attn.sinks"].dtype == mx.float16


QUANTIZABLE: Configs = {"hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64}


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize(("flag", "bits"), [("mlx_q4", 4), ("mlx_8bit", 8)])
def test_quantizing_while_loading_equals_quantizing_afterwards(
    family: str, flag: str, bits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_checkpoint(tmp_path, family, **QUANTIZABLE)
    events: list[Progress] = []
    loaded = load_mlx_model(str(path), EngineConfig(quantization=flag), events.append)
    assert loaded.quantization == f"{bits}-bit affine, group 64"
    whole, config = mlx_lm.utils.load_model(path)
    expected, _ = mlx_lm.utils.quantize_model(whole, config, 64, bits)
    assert capsys.readouterr().out.startswith("[INFO] Quantized")
    found = parameters(loaded.model)
    assert found.keys() == parameters(expected).keys()
    assert all(mx.array_equal(found[name], a) for name, a in parameters(expected).items())
    assert_complete(events, "quantize", (path / "model.safetensors").stat().st_size - header_bytes(path))


def header_bytes(path: Path) -> int:
    return 8 + int.from_bytes((path / "model.safetensors").read_bytes()[:8], "little")


def test_layers_that_do_not_divide_stay_whole_and_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_checkpoint(tmp_path, "llama", hidden_size=128, intermediate_size=96)
    found = parameters(load(path, quantization="mlx_q4"))
    assert "model.layers.0.mlp.down_proj.scales" not in found
    assert "model.layers.0.mlp.up_proj.scales" in found
    assert "model.layers.0.mlp.down_proj stays unquantized: its rows of 96 don't divide by 64" in caplog.text


def save_quantized(path: Path, out: Path, mode: str = "affine", group: int = 64, bits: int = 4) -> Path:
    model, config = mlx_lm.utils.load_model(path)
    model, config = mlx_lm.utils.quantize_model(model, config, group, bits, mode)
    mlx_lm.utils.save_model(out, model)
    mlx_lm.utils.save_config(config, out / "config.json")
    return out


@pytest.mark.parametrize(
    ("mode", "group", "bits"),
    [("affine", 64, bits) for bits in (2, 3, 4, 5, 6)]
    + [("affine", 32, 8), ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)],
)
def test_prequantized_checkpoint_stays_packed(mode: str, group: int, bits: int, tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", "qwen3", dtype=mx.bfloat16, **QUANTIZABLE)
    path = save_quantized(plain, tmp_path / "packed", mode, group, bits)
    loaded = load_mlx_model(str(path), EngineConfig(device="cpu"))
    assert loaded.quantization == f"{bits}-bit {mode}, group {group}"
    assert loaded.dtype == mx.float32
    weight = parameters(loaded.model)["model.layers.0.mlp.up_proj.weight"]
    assert (weight.dtype, weight.shape) == (mx.uint32, (192, 128 * bits // 32))
    same, _ = mlx_lm.utils.load_model(path)
    expected = logits(mlx_lm.utils.dequantize_model(same))
    scale = mx.abs(expected).max()
    assert (mx.abs(logits(loaded.model) - expected).max() < 0.05 * scale).item()  # it ran in bfloat16, ours didn't


def test_quantizing_twice_is_refused(tmp_path: Path) -> None:
    path = save_quantized(make_checkpoint(tmp_path / "plain", "qwen3", **QUANTIZABLE), tmp_path / "packed")
    with pytest.raises(ConfigError, match=r"--quantization: packed is already quantized \(4-bit affine, group 64\)"):
        load(path, quantization="mlx_q8")


@pytest.mark.parametrize(("dtype", "flag", "times"), [("float32", "mlx_q4", 0.6), ("auto", None, 1.0)])
def test_memory_never_holds_two_copies(dtype: str, flag: str | None, times: float, tmp_path: Path) -> None:
    size: Configs = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 5, "vocab_size": 1024}
    path = make_checkpoint(tmp_path, "llama", **size, head_dim=64, num_attention_heads=8, tie_word_embeddings=True)
    whole = (path / "model.safetensors").stat().st_size
    assert whole > 38e6
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load(path, dtype=dtype, quantization=flag)
    peak = mx.get_peak_memory() - before
    largest = 1024 * 512 * 4
    assert peak <= times * whole + largest
    assert parameters(model)


def test_casting_holds_a_few_layers_twice_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pippin.models.quantize.READ_AT_ONCE", 2**20)
    path = make_checkpoint(
        tmp_path, "llama", dtype=mx.float16, hidden_size=512, intermediate_size=1024, vocab_size=1024
    )
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    loaded = load_mlx_model(str(path), EngineConfig(dtype="float32"))
    assert loaded.weight_bytes > 20e6
    assert mx.get_peak_memory() - before <= loaded.weight_bytes + 2 * 2**20


# --- what is refused ---


def code_checkpoint(path: Path) -> tuple[Path, Path]:
    """A checkpoint that, when its code runs, leaves a mark."""
    make_checkpoint(path, "qwen3", model_file="model.py")
    mark = path / "it-ran"
    source = (
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\nfrom mlx_lm.models.qwen3 import Model, ModelArgs\n"
    )
    (path / "model.py").write_text(source)
    return path, mark


def test_code_in_a_checkpoint_is_refused_before_it_runs(tmp_path: Path) -> None:
    path, mark = code_checkpoint(tmp_path)
    with pytest.raises(ModelError, match=r"brings its own code \(model.py\).*--trust-remote-code"):
        load(path)
    assert not mark.exists()


def test_code_in_a_checkpoint_runs_if_trusted(tmp_path: Path) -> None:
    path, mark = code_checkpoint(tmp_path)
    assert logits(load(path, trust_remote_code=True)).shape == (1, 12, 288)
    assert mark.exists()


def test_code_that_nothing_asks_for_does_not_run(tmp_path: Path) -> None:
    path, mark = code_checkpoint(tmp_path)
    make_checkpoint(path, "qwen3", auto_map={"AutoModelForCausalLM": "model.Model"})
    load(path)
    assert not mark.exists()


def rewrite(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def drop_tensor(path: Path) -> None:
    weights = mx.load(str(path / "model.safetensors"))
    assert isinstance(weights, dict)
    kept = {name: a + 0 for name, a in weights.items() if name != "model.norm.weight"}
    mx.eval(kept)
    mx.save_safetensors(str(path / "model.safetensors"), kept)


BROKEN: dict[str, tuple[Any, str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "has no config.json"),
    "config cut off": (
        lambda p: (p / "config.json").write_text('{"model_type": "qw'),
        "generation_config.json can't be read",
    ),
    "config is a list": (lambda p: (p / "config.json").write_text("[]"), "names no model_type"),
    "config is binary": (
        lambda p: (p / "config.json").write_bytes(b"\xff\xfe\x00"),
        "generation_config.json can't be read",
    ),
    "no model type": (lambda p: rewrite(p, model_type=None), "names no model_type"),
    "unknown model type": (lambda p: rewrite(p, model_type="abacus"), "Model type abacus not supported"),
    "module that is no model": (lambda p: rewrite(p, model_type="base"), "model_type 'base'"),
    "setting missing": (lambda p: rewrite(p, num_attention_heads=None), "mlx-lm can't load"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "has no model.*safetensors"),
    "weights cut off": (lambda p: os.truncate(p / "model.safetensors", 100), "mlx-lm can't load"),
    "weights half": (lambda p: os.truncate(p / "model.safetensors", 200_000), "Could not read|can't load"),
    "tensor missing": (drop_tensor, "Missing 1 parameters: model.norm.weight"),
    "shape mismatch": (lambda p: rewrite(p, vocab_size=300), "Expected shape"),
    "unknown quantization": (
        lambda p: rewrite(p, quantization_config={"quant_method": "compressed-tensors", "format": "fp5"}),
        "unsupported compressed-tensors format 'fp5'",
    ),
    "config is no setting": (lambda p: rewrite(p, rope_parameters=[1], rope_theta="x"), "mlx-lm can't load"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_say_what_is_wrong_in_a_line(case: str, tmp_path: Path) -> None:
    damage, message = BROKEN[case]
    damage(make_checkpoint(tmp_path, "qwen3"))
    with pytest.raises(ModelError, match=message) as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


JUNK = st.sampled_from([None, "", "x", -1, 0, 1.5, True, [], [1], {}, {"rope_type": "x"}, float("nan")])


NAMES = st.sampled_from(sorted(COMMON | FAMILIES["gemma3_text"] | {"text_config": 0, "rope_parameters": 0}))


@given(changes=st.dictionaries(NAMES, JUNK, max_size=3))
def test_any_nonsense_in_config_is_a_model_error_or_ignored(changes: Configs, gemma: Path) -> None:
    original = (gemma / "config.json").read_text()
    rewrite(gemma, **changes)
    try:
        loaded = load_mlx_model(str(gemma), EngineConfig())
    except ModelError:
        return
    finally:
        (gemma / "config.json").write_text(original)
    assert loaded.vocab_size > 0
    assert loaded.context_length > 0


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("gemma"), "gemma3_text")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no directory ./nowhere"),
        ("~/nowhere-at-all", "no directory ~/nowhere-at-all"),
        ("models/of/mine", "no directory models/of/mine"),
        ("two words", "neither a directory nor a hub id"),
        ("made/unheard-of", "the hub can't be reached"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_mlx_model(name, EngineConfig())


def test_file_instead_of_directory(tmp_path: Path) -> None:
    file = make_checkpoint(tmp_path, "qwen3") / "model.safetensors"
    with pytest.raises(ModelError, match="is a file; give the directory"):
        load(file)


# --- the hub ---

DOWNLOAD = """
import json, sys
from pippin.config import EngineConfig
from pippin.errors import ModelError
from pippin.models.load import load_mlx_model
for name, revision in json.loads(sys.argv[1]):
    events = []
    try:
        path = load_mlx_model(name, EngineConfig(revision=revision), events.append).path
        said = sorted(p.name for p in path.iterdir())
    except ModelError as error:
        said = str(error)
    print(json.dumps([said, [[e.done, e.total] for e in events if e.stage == "download"]]))
"""


def test_download(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "tiny", "qwen3")
    (path / "README.md").write_text("Nobody needs this to run it.")
    asked = [("made/tiny", None), ("made/tiny", "nope"), ("made/gated", None), ("made/none", None)]
    with serve_hub("made/tiny", path) as address:
        hub = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        found, nope, gated, none = run_downloads(hub, asked)
    assert found[0] == ["config.json", "model.safetensors"]
    total = sum((path / name).stat().st_size for name in found[0])
    assert found[1][-1] == [total, total]
    assert "no revision 'nope'" in nope[0]
    assert "accept its terms" in gated[0]
    assert "the hub has no such model" in none[0]
    # What was downloaded loads again when the hub is gone.
    assert run_downloads(hub | {"HF_HUB_OFFLINE": "1"}, asked[:1])[0] == [found[0], []]


def test_of_a_repository_without_safetensors_pytorchs_files_are_downloaded(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "tiny", "qwen3")
    (path / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "optimizer.bin"):
        (path / name).write_bytes(b"PK" * 1000)
    with serve_hub("made/tiny", path) as address:
        hub = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        ((said, _),) = run_downloads(hub, [("made/tiny", None)])
    assert "torch" in said  # it is no weights: without torch it can't be read, with torch it is damaged
    there = {file.name for file in (tmp_path / "cache").rglob("*")}
    assert "pytorch_model.bin" in there
    assert "optimizer.bin" not in there


def run_downloads(env: dict[str, str], asked: list[tuple[str, str | None]]) -> list[Any]:
    command = [sys.executable, "-c", DOWNLOAD, json.dumps(asked)]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


# --- the process ---

LIMITS = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
import {module}
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize("module", ["pippin.models", "pippin.loading"])
@pytest.mark.parametrize(("soft", "expected"), [(256, 2048), (3000, 3000)])
def test_importing_mlx_lm_leaves_the_limit_of_open_files(soft: int, expected: int, module: str) -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    command = [sys.executable, "-c", LIMITS.format(soft=soft, module=module)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(expected), str(hard)]


# --- what mlx-lm reads otherwise than transformers ---


RENAMED = {"rope_theta", "rope_local_base_freq", "partial_rotary_factor", "sliding_window_pattern", "num_experts"}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_config_reads_as_its_makers_wrote_it(family: str) -> None:
    from transformers import AutoConfig

    made = COMMON | FAMILIES[family]
    saved = AutoConfig.for_model(family, **made).to_dict()
    read = saved | older_names(saved)
    for name in (
        "rope_theta",
        "rope_local_base_freq",
        "partial_rotary_factor",
        "sliding_window_pattern",
        "num_experts",
    ):
        if name in made:
            assert read[name] == made[name], name
    if "rope_scaling" in made:
        assert made["rope_scaling"].items() <= read["rope_scaling"].items() | {
            ("type", made["rope_scaling"].get("type"))
        }


def test_what_config_states_itself_is_never_replaced() -> None:
    facts = {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0, "rope_type": "linear", "factor": 2.0}}
    assert older_names(facts) == {"rope_scaling": facts["rope_parameters"] | {"type": "linear"}}  # type: ignore[operator]
    assert older_names({"text_config": {"rope_parameters": {"rope_theta": 7.0}}})["text_config"]["rope_theta"] == 7.0
    assert older_names({}) == {}


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("mistral", {}, [WINDOW] * 3),
        ("mistral", {"sliding_window": None}, None),
        ("gemma2", {}, [WINDOW, None, WINDOW]),
        ("phi3", {"sliding_window": WINDOW}, [WINDOW] * 3),
        ("qwen2", {"sliding_window": WINDOW}, None),
        ("qwen2", {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2}, [None, None, WINDOW]),
    ],
)
def test_windows_that_mlx_lm_ignores(
    family: str, changes: Configs, windows: list[int | None] | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model = load(make_checkpoint(tmp_path, family, **changes))
    assert ("sliding window of 8 tokens" in caplog.text) == (windows is not None)
    if windows is None:
        assert "make_cache" not in vars(model)
    else:
        assert [getattr(cache, "max_size", None) for cache in model.make_cache()] == windows
