"""``pippin convert``: a checkpoint of any form that loads, as MLX's safetensors, cast or quantized if asked."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten

from pippin.config import ConvertOptions
from pippin.errors import ConfigError, ModelError
from pippin.messages import Progress
from pippin.models.load import load_model
from pippin.models.quantize import BITS, GROUP_SIZE, Form, quantization_of, weight_bytes

# What is no weight, but belongs to a checkpoint: tokenizer, templates, generation settings, code.
COPIED = ("*.json", "*.jsonl", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py")
DTYPES = {"auto": None, "float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
WRITTEN_ANEW = ("config.json", "*.index.json")


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written: where, its weights' bytes and files, and how they are quantized (None: not)."""

    path: Path
    weight_bytes: int
    files: int
    quantization: str | None


def convert(options: ConvertOptions, progress: Callable[[Progress], None] | None = None) -> Converted:
    """Writes the model of ``options`` as a directory of MLX's safetensors, which appears when it is complete.

    ``progress`` hears of the stages download, load or quantize, and save, in bytes.
    Raises ModelError if the model can't be loaded, ConfigError if an option can't be met or there is something in
    ``--output``.
    """
    output = _free(Path(options.output).expanduser())
    form = _form(options)
    model, facts, source = load_model(
        options.model_path, form, progress, revision=options.revision, trusted=options.trust_remote_code
    )
    with _appearing(output) as directory:
        _copy_files(source, directory)
        try:
            files = _save_weights(model, directory, max(1, int(options.max_shard_gb * 2**30)), progress)
            mlx_lm.utils.save_config(_config(facts, model, form), directory / "config.json")
        except OSError as error:
            raise ModelError(f"Could not write {output}: {error.strerror or error}") from error
    return Converted(output, weight_bytes(model), files, quantization_of(model))


def _form(options: ConvertOptions) -> Form:
    bits = options.q_bits or (BITS[options.quantization] if options.quantization else None)
    return Form(DTYPES[options.dtype], bits, options.q_group_size or GROUP_SIZE)


def _free(output: Path) -> Path:
    if output.is_dir() and not any(output.iterdir()):
        return output
    if output.exists():
        raise ConfigError(f"there is something at {output} already; give a directory that is new", "--output")
    return output


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A directory beside ``output`` that becomes it at the end, and is gone if anything fails."""
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{output.parent} can't be written: {error.strerror}", "--output") from error
    try:
        yield partial
        if output.exists():
            output.rmdir()
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_files(source: Path, directory: Path) -> None:
    for pattern in COPIED:
        for file in source.glob(pattern):
            if file.is_file() and not any(file.match(p) for p in WRITTEN_ANEW):
                shutil.copyfile(file, directory / file.name)


def _save_weights(
    model: nn.Module, directory: Path, most_bytes: int, progress: Callable[[Progress], None] | None
) -> int:
    """Writes all parameters in files of at most so many bytes, with an index; returns how many files."""
    weights = dict(tree_flatten(model.parameters()))
    shards = list(shards_of({name: w.nbytes for name, w in weights.items()}, most_bytes))
    total, done = weight_bytes(model), 0
    index: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        if progress:
            progress(Progress("save", done, total))
        mx.save_safetensors(str(directory / file), {n: weights[n] for n in names}, metadata={"format": "mlx"})
        index |= dict.fromkeys(names, file)
        done += sum(weights[n].nbytes for n in names)
    if progress:
        progress(Progress("save", done, total))
    listing = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(listing, indent=2), encoding="utf-8")
    return len(shards)


def shards_of(sizes: Mapping[str, int], most_bytes: int) -> Iterator[list[str]]:
    """Names in order, in runs whose sizes add up to at most so many bytes, or of one that is larger alone."""
    names: list[str] = []
    size = 0
    for name, nbytes in sizes.items():
        if names and size + nbytes > most_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names


def _config(facts: Mapping[str, Any], model: nn.Module, form: Form) -> dict[str, Any]:
    """config.json: what was read, with the dtype and the layers' quantization as they are now."""
    found = dict(facts)
    if form.dtype is not None:
        name = str(form.dtype).removeprefix("mlx.core.")
        found |= {key: name for key in ("dtype", "torch_dtype") if key in found} or {"dtype": name}
    if form.bits is not None:
        found["quantization"] = _quantization(model, form)
    return found


def _quantization(model: nn.Module, form: Form) -> dict[str, Any]:
    """The settings of most layers, and by name those of layers that have others; layers without scales are whole."""
    usual: dict[str, Any] = {"group_size": form.group_size, "bits": form.bits, "mode": "affine"}
    layers = {
        name: {"group_size": m.group_size, "bits": m.bits, "mode": m.mode}
        for name, m in model.named_modules()
        if "scales" in m
    }
    return usual | {name: settings for name, settings in layers.items() if settings != usual}
