"""From a directory or hub id to a model that is ready to run."""

from __future__ import annotations

import logging
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten

from pippin.config import EngineConfig
from pippin.errors import ConfigError, ModelError
from pippin.gguf_files import FILE
from pippin.messages import Progress
from pippin.models import gguf, gptq
from pippin.models.corrections import correct, older_names, refuse
from pippin.models.download import find_checkpoint, one_line
from pippin.models.names import changing_classes, model_classes, renaming_of
from pippin.models.quantize import BITS, Form, convert_lazily, materialize, quantization_of, weight_bytes
from pippin.models.vectors import VectorForm, is_bare, read_vector_form

logger = logging.getLogger(__name__)

CONTEXT_LENGTH_NAMES = (
    "max_position_embeddings",
    "max_sequence_length",
    "model_max_length",
    "max_seq_len",
    "seq_length",
    "n_positions",
    "n_ctx",
)
SAFETENSORS = "model*.safetensors"
PICKLED = ("pytorch_model*.bin", "pytorch_model*.pt", "model*.bin", "model*.pt")
READER = "pippin.torch.checkpoints:write_safetensors"
"""What reads those: found by name, since it stands above this module, and only where torch is."""

HEADLESS = "pippin_headless"
"""Noted in the configuration of a checkpoint that has no head, nor takes its embedding for one."""

DEFAULT_CONTEXT_LENGTH = 32768
"""For models that name none, as recurrent ones."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory and what its files say of it.

    ``config`` is config.json as mlx-lm reads it (eos ids of generation_config.json included), ``path`` the
    directory, also of a hub id. ``dtype`` is that of activations, K and V; ``quantization`` says how most
    weights are quantized (None: not). ``eos_token_ids`` may be empty: then only the tokenizer knows.
    ``context_length`` is the most tokens of a request, ``weight_bytes`` the parameters' size in memory, ``vectors`` how
    it makes a vector of a text.
    """

    model: nn.Module
    config: dict[str, Any]
    path: Path
    model_type: str
    dtype: mx.Dtype
    quantization: str | None
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    context_length: int
    weight_bytes: int
    vectors: VectorForm = field(default_factory=VectorForm)


def load_mlx_model(
    path: str | None, config: EngineConfig, progress: Callable[[Progress], None] | None = None
) -> LoadedModel:
    """Load whatever mlx-lm loads, in the form that ``config`` asks for; ``path`` None is the demo model.

    ``progress`` is called in this thread, with bytes, for the stages ``download`` and ``load`` or
    ``quantize``. The model belongs to the calling thread, as MLX's arrays do until they are evaluated.

    Raises ModelError if the model can't be found, downloaded, read or run by mlx-lm, or brings code that
    ``config.trust_remote_code`` does not allow; ConfigError if ``--quantization`` is asked of a quantized one.
    """
    form = Form(_wanted_dtype(config), BITS[config.quantization] if config.quantization else None)
    model, facts, found = load_model(path, form, progress, revision=config.revision, trusted=config.trust_remote_code)
    return _described(model, facts, found, config)


def read_lazily(path: str | None, config: EngineConfig) -> LoadedModel:
    """The model that ``load_mlx_model`` would load, in the form asked for, none of whose weights have been read.

    Raises as that does.
    """
    form = Form(_wanted_dtype(config), BITS[config.quantization] if config.quantization else None)
    found = find_model(path, config.revision, None)
    with as_safetensors(found) as readable:
        model, facts = _build(found, readable, config.trust_remote_code)
        if form.bits and (kind := quantization_of(model)):
            raise ConfigError(f"{found.name} is already quantized ({kind}); leave the option out", "--quantization")
        convert_lazily(model, _of_one_dtype(form, model, found))
        return _described(model, facts, found, config)


def load_model(
    path: str | None,
    form: Form,
    progress: Callable[[Progress], None] | None = None,
    *,
    revision: str | None = None,
    trusted: bool = False,
) -> tuple[nn.Module, dict[str, Any], Path]:
    """The model in memory, cast and quantized as ``form`` says, its configuration, and the checkpoint's directory.

    Arguments and errors as of ``load_mlx_model``; ``trusted`` allows the checkpoint's own code.
    """
    found = find_model(path, revision, progress)
    with as_safetensors(found, progress) as readable:
        model, facts = _build(found, readable, trusted)
        if form.bits and (kind := quantization_of(model)):
            raise ConfigError(f"{found.name} is already quantized ({kind}); leave the option out", "--quantization")
        try:
            materialize(model, _of_one_dtype(form, model, found), progress)
        except Exception as error:
            raise ModelError(f"Could not read the weights of {found}: {one_line(error)}") from error
    return model, facts, found


def find_model(path: str | None, revision: str | None, progress: Callable[[Progress], None] | None) -> Path:
    """The directory of a checkpoint, downloaded if need be; None is the demo model. Raises ModelError."""
    if path is None:
        from pippin.demo import demo_model_path

        return Path(demo_model_path())
    patterns = mlx_lm.utils.DEFAULT_ALLOW_PATTERNS
    found = find_checkpoint(path, revision, patterns, progress)
    if not any(found.glob(SAFETENSORS)) and not Path(path).expanduser().is_dir():
        found = find_checkpoint(path, revision, [*patterns, *PICKLED], progress)
    return found


@contextmanager
def as_safetensors(path: Path, progress: Callable[[Progress], None] | None = None) -> Iterator[Path]:
    """A directory with the checkpoint's weights as mlx-lm reads them: ``path``, or one made for now from .bin files.

    Of a GGUF file it has none of them: ``_build`` brings those.

    Raises ModelError if there are no weights, or they are PyTorch's and torch isn't there to read them.
    """
    if any(path.glob(SAFETENSORS)):
        yield path
        return
    if (path / FILE).exists():
        with TemporaryDirectory(prefix="pippin-") as made:
            gguf.hollow(path, Path(made))
            yield Path(made)
        return
    pickled = sorted(file for pattern in PICKLED for file in path.glob(pattern))
    if not pickled:
        raise ModelError(f"{path} has no {SAFETENSORS}, nor PyTorch's {PICKLED[0]}.")
    if find_spec("torch") is None:
        raise ModelError(
            f"{path} holds PyTorch's {pickled[0].suffix} files, and only PyTorch reads these safely:"
            " pip install 'pippin[torch]', then `pippin convert` makes a checkpoint that needs no torch."
        )
    with TemporaryDirectory(prefix="pippin-") as made:
        pkgutil.resolve_name(READER)(path, pickled, Path(made), progress)
        yield Path(made)


def _build(path: Path, readable: Path, trusted: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The model with lazy weights, and its configuration; whatever mlx-lm raises becomes a ModelError.

    ``readable`` is where mlx-lm finds the weights of ``path``.
    """
    facts = read_config(path)
    if (code := facts.get("model_file")) is not None and not trusted:
        raise ModelError(
            f"{path} brings its own code ({code}) and was not loaded: pass --trust-remote-code if you trust it."
        )
    refuse(facts)
    settings, packed = older_names(facts), gptq.settings_of(facts)
    changes: list[Callable[[dict[str, mx.array]], dict[str, mx.array]]] = []
    try:
        if (path / FILE).exists() and readable != path:
            changes.append(lambda _: gguf.weights_of(path, facts))
        if packed is not None:
            settings |= dict.fromkeys(("quantization", "quantization_config"), gptq.quantization_of(packed))
            changes.append(partial(gptq.as_affine, settings=packed))
        if bare := is_bare(readable):
            settings |= {"tie_word_embeddings": True, HEADLESS: not facts.get("tie_word_embeddings")}
        if (rename := renaming_of(facts["model_type"], bare)) is not None:
            changes.append(rename)
        classes = partial(changing_classes, changes) if changes else model_classes
        model, facts = mlx_lm.utils.load_model(
            readable, lazy=True, model_config=settings, trust_remote_code=trusted, get_model_classes=classes
        )
        correct(model, facts)
    except (Exception, SystemExit) as error:  # mlx-lm's olmo ends the process where its makers' package is missing
        kind, why = facts["model_type"], one_line(error)
        if isinstance(error, SystemExit):
            why = "its class ends the process; what it printed says which package it needs"
        form = f", weights quantized by {method}" if (method := _method(facts)) else ""
        raise ModelError(f"mlx-lm can't load {path} (model_type {kind!r}{form}): {why}") from error
    return model, facts


def _method(facts: dict[str, Any]) -> str | None:
    """Who quantized a checkpoint, where config.json names one of others than MLX."""
    found = facts.get("quantization_config")
    return str(found["quant_method"]) if isinstance(found, dict) and "quant_method" in found else None


def read_config(path: Path) -> dict[str, Any]:
    """config.json, eos ids of generation_config.json included. Raises ModelError if it can't be read."""
    try:
        facts = mlx_lm.utils.load_config(path)
    except FileNotFoundError as error:
        raise ModelError(f"{path} has no config.json, so it is not a model's directory.") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{path}: config.json or generation_config.json can't be read: {one_line(error)}") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("model_type"), str):
        raise ModelError(f"{path / 'config.json'} names no model_type, so there is no telling what it is.")
    return facts


def _wanted_dtype(config: EngineConfig) -> mx.Dtype | None:
    """None keeps the checkpoint's. MLX's CPU backend multiplies float16 and bfloat16 ten times slower."""
    if config.dtype != "auto":
        dtype: mx.Dtype = getattr(mx, config.dtype)
        return dtype
    on_cpu = config.device == "cpu" or (config.device == "auto" and mx.default_device() == mx.cpu)
    return mx.float32 if on_cpu else None


def _described(model: nn.Module, facts: dict[str, Any], path: Path, config: EngineConfig) -> LoadedModel:
    return LoadedModel(
        model=model,
        config=facts,
        path=path,
        model_type=facts["model_type"],
        dtype=_dtype_of(model),
        quantization=quantization_of(model),
        eos_token_ids=eos_token_ids_of(facts),
        vocab_size=vocab_size_of(model, facts, path),
        context_length=context_length_of(model, facts, config.context_length),
        weight_bytes=weight_bytes(model),
        vectors=read_vector_form(path, facts, config.pooling, config.is_embedding or facts.get(HEADLESS) is True),
    )


def _of_one_dtype(form: Form, model: nn.Module, path: Path) -> Form:
    """GGUF files have norms of float32 beside 16-bit weights, and a step would compute in the widest of them."""
    return replace(form, dtype=form.dtype or _dtype_of(model)) if (path / FILE).exists() else form


def _dtype_of(model: nn.Module) -> mx.Dtype:
    """The dtype of most floating parameters (by bytes), which activations follow."""
    sizes: Counter[mx.Dtype] = Counter()
    for _, array in tree_flatten(model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating):
            sizes[array.dtype] += array.nbytes
    return sizes.most_common(1)[0][0] if sizes else mx.float32


def _stated(model: object, facts: dict[str, Any], names: Iterable[str]) -> int | None:
    """The first positive integer under one of ``names``: of the text model, of the whole, of its class's defaults."""
    defaults = vars(model.args) if hasattr(model, "args") else {}
    for source in (_text_config(facts), facts, defaults):
        for name in names:
            value = source.get(name)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _text_config(facts: dict[str, Any]) -> dict[str, Any]:
    """What a multimodal model says of its language part; nothing if it has no such part."""
    text = facts.get("text_config")
    return text if isinstance(text, dict) else {}


def eos_token_ids_of(facts: dict[str, Any]) -> tuple[int, ...]:
    """generation_config.json's ids or else config.json's (mlx-lm merges the two), or else the text model's."""
    for source in (facts, _text_config(facts)):
        value = source.get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if known := tuple(i for i in ids if isinstance(i, int)):
            return known
    return ()


def vocab_size_of(model: object, facts: dict[str, Any], path: Path) -> int:
    """How many ids the embedding has. Raises ModelError where nothing says."""
    size = _stated(model, facts, ("vocab_size", "padded_vocab_size", "n_vocab"))
    if size is None:
        raise ModelError(f"{path / 'config.json'} names no vocab_size.")
    return size


def context_length_of(model: object, facts: dict[str, Any], asked: int | None) -> int:
    """The model's own limit, unless another was asked for; beyond its own it may well answer nonsense."""
    own = _stated(model, facts, CONTEXT_LENGTH_NAMES)
    if asked is None:
        return _yarn_length(facts, own or DEFAULT_CONTEXT_LENGTH)
    if own is not None and asked > _yarn_length(facts, own):
        logger.warning("--context-length %d is beyond the %d tokens that the model was made for.", asked, own)
    return asked


def _yarn_length(facts: dict[str, Any], own: int) -> int:
    """YaRN's original length times its factor, where config.json still states the length before scaling."""
    rope = _text_config(facts).get("rope_scaling") or facts.get("rope_scaling")
    if not isinstance(rope, dict) or "yarn" not in (rope.get("rope_type"), rope.get("type")):
        return own
    try:
        return max(own, int(rope["original_max_position_embeddings"] * rope["factor"]))
    except (KeyError, TypeError):
        return own
