"""The ``pippin`` command: parse, call one function, print.

Options are the fields of the configuration classes (see ``config.option``), so each exists exactly once. Only what a
command needs is imported, when it runs.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException

from pippin import __version__
from pippin.backend import leave_torch_out, prepare
from pippin.bench.cli import bench
from pippin.config import ConvertOptions, EngineConfig, SamplingOptions, ServerConfig, flag_of
from pippin.errors import ConfigError, EngineError, PippinError, RequestError
from pippin.kernels_cli import kernels
from pippin.messages import ModelInfo
from pippin.options import with_options

log = logging.getLogger(__name__)

app = typer.Typer(
    name="pippin",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve large language models on MLX.

    The first three minutes: `pippin chat` talks to the model that is part of the package, `pippin serve` serves it to
    any OpenAI client, and `--model-path Qwen/Qwen3-0.6B` takes another.
    """


app.add_typer(bench)
app.add_typer(kernels)


Model = Annotated[str | None, typer.Argument(metavar="MODEL", help="The same as --model-path.")]


@app.command()
@with_options
def serve(engine: EngineConfig, server: ServerConfig, model: Model = None) -> None:
    """Serve a model over HTTP: OpenAI's endpoints and SGLang's."""
    engine = _of_model(engine, model)
    from pippin.server.launch import plan, run
    from pippin.terminal import LoadingBar, budget, ready

    leave_torch_out()  # with --device torch it is the engine's process that imports it
    if os.environ.get("SGLANG_USE_MLX"):
        log.debug("SGLANG_USE_MLX is set; MLX is what there is")
    with LoadingBar() as bar:
        if server.dry_run:
            found = plan(engine, bar)
            bar.stop()
            typer.echo(f"{found.model_path} would be served within this memory:\n{budget(found)}")
            return

        def on_ready(info: ModelInfo, url: str) -> None:
            bar.stop()
            typer.echo(ready(info, url, server.served_model_name, server.api_key is not None, not server.no_ui))

        run(engine, server, on_ready, bar)


@app.command()
@with_options
def chat(
    engine: EngineConfig,
    sampling: SamplingOptions,
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    chat_template: Annotated[str | None, typer.Option(help="File with a Jinja chat template.")] = None,
) -> None:
    """Talk to a model in the terminal. /help there lists what you can type."""
    from pippin.terminal import Conversation

    params = _checked(sampling)
    with _engine(_of_model(engine, model), chat_template) as opened:
        if sys.stdin.isatty():
            typer.echo(f"{opened.info.model_path} · /help for help", err=True)
        answered = Conversation(opened, params, system).run(sys.stdout)
    if not answered and not sys.stdin.isatty():
        raise typer.Exit(2)  # a script wants to know; what was refused has been said


@app.command()
@with_options
def generate(
    engine: EngineConfig,
    sampling: SamplingOptions,
    prompt: Annotated[str, typer.Argument(help="Text to go on from; `-` or nothing reads standard input.")] = "-",
) -> None:
    """Print how a model goes on from PROMPT, as it comes. No chat template is applied."""
    from pippin.terminal import show

    params = _checked(sampling)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise RequestError("the prompt is empty", "prompt")
    with _engine(engine, None) as opened:
        show(opened.generate(text, params, stream=True), sys.stdout)


@app.command()
@with_options
def convert(options: ConvertOptions) -> None:
    """Write a checkpoint as MLX's safetensors: from PyTorch's files, cast, or quantized."""
    prepare()
    leave_torch_out()
    from pippin.models.convert import convert as run
    from pippin.terminal import LoadingBar

    with LoadingBar() as progress:
        done = run(options, progress)
    form = done.quantization or "not quantized"
    typer.echo(f"{done.path}: {done.weight_bytes / 2**20:.1f} MiB in {done.files} file(s), {form}")
    typer.echo(f"Try: pippin chat --model-path {done.path}")


@app.command()
def env(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs and bug reports.")] = False,
) -> None:
    """Print versions, device, memory and limits, and what each feature lacks here: what a bug report needs."""
    from rich.console import Console

    from pippin import environment

    found = environment.describe()
    if as_json:
        typer.echo(environment.as_json(found))
    else:
        width = None if sys.stdout.isatty() else 200  # in a file no line is broken
        Console(width=width).print(environment.as_table(found))


@app.command()
def models(
    name: Annotated[str, typer.Argument(help="Only architectures with this in their name.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
) -> None:
    """List the architectures that are served, by which attention backend, and what was checked of each."""
    from pippin.catalogue import FORMATS, ON_LOAD, UNTRIED, architectures

    found = architectures(name)
    if as_json:
        import msgspec

        typer.echo(msgspec.json.encode({"architectures": found, "formats": FORMATS, "on_load": ON_LOAD}))
        return
    if not found:
        raise RequestError(f"no architecture of mlx-lm has {name!r} in its name; `pippin models` lists all", "name")
    width = max(len(a.architecture) for a in found)
    for a in found:
        untried = a.refusal.startswith(UNTRIED)
        refusal = a.refusal if untried else f"refused: {a.refusal}"
        said = refusal if a.refusal else f"{a.backend:<15} {', '.join(a.checks)}"
        typer.echo(f"{a.architecture:<{width}}  {said}")
    typer.echo(f"\nCheckpoints: {FORMATS}\nWhile loading: {ON_LOAD}")


@app.command()
@with_options
def check(
    engine: EngineConfig,
    model: Model = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each stream, prompt and answer.")] = 4096,
    prove: Annotated[bool, typer.Option("--prove", help="Load it, and run what is said to fit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Estimate what a model takes of memory, and what fits, before it is loaded; --prove runs it."""
    engine = _of_model(engine, model)
    prepare()
    leave_torch_out()
    import msgspec

    from pippin import estimate

    found = estimate.estimate(engine)
    proof = estimate.prove(engine, length, lambda text: typer.echo(text, err=True)) if prove else None
    if as_json:
        figures = {**dataclasses.asdict(found), "longest": found.longest, "streams": found.streams(length)}
        typer.echo(msgspec.json.encode(figures | {"proof": dataclasses.asdict(proof) if proof else None}))
    else:
        typer.echo(estimate.as_text(found, length, proof))
    if proof is not None and not proof.holds:
        raise EngineError("what was planned did not hold: see the lines above")


@app.command()
def profile(
    file: Annotated[Path, typer.Argument(help="A timeline, `….trace.json.gz` or unpacked.")],
    top: Annotated[int, typer.Option(min=0, help="How many of the slowest steps and longest gaps to list.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Summarise a timeline: time by lane, gaps between device steps, the slowest steps."""
    import msgspec
    from rich.console import Console

    from pippin.profile.report import show_summary
    from pippin.profile.summary import read_trace, summarize

    summary = summarize(read_trace(file))
    if as_json:
        typer.echo(msgspec.json.encode(summary))
    else:
        show_summary(summary, Console(highlight=False), top)


@app.command()
def version() -> None:
    """Print Pippin's version."""
    typer.echo(__version__)


def _of_model(engine: EngineConfig, model: str | None) -> EngineConfig:
    """The configuration with the model that was named without a flag. Raises ConfigError for two models."""
    if model is None:
        return engine
    if engine.model_path is not None:
        raise ConfigError(f"there is MODEL {model} too; name one of them", "--model-path")
    return dataclasses.replace(engine, model_path=model)


def _checked(sampling: SamplingOptions) -> dict[str, Any]:
    """As SGLang's dict. Raises RequestError for a value that is out of range, before minutes of loading."""
    from pippin.sglang import sampling_params

    given = dataclasses.asdict(sampling)
    sampling_params(given)
    return given


def _engine(config: EngineConfig, chat_template: str | None) -> Any:
    """An Engine, with a bar while it loads."""
    from pippin.engine import Engine
    from pippin.terminal import LoadingBar

    if not config.device.startswith("torch"):
        leave_torch_out()
    with LoadingBar() as progress:
        return Engine(chat_template=chat_template, progress=progress, **dataclasses.asdict(config))


# --- from arguments to an exit status ---


def run_command(arguments: Sequence[str]) -> int:
    """Runs one command line; the exit status: 0, 1 if the model or the engine failed, 2 for a wrong option."""
    try:
        status = app(args=list(arguments), prog_name="pippin", standalone_mode=False)
    except TyperException as error:
        return _fail(error.format_message().replace("Value error, ", ""), error.exit_code)
    except (ConfigError, RequestError) as error:
        return _fail(_flagged(error), 2)
    except PippinError as error:
        return _fail(str(error), 1)
    except (typer.Abort, KeyboardInterrupt):
        return 130
    return status if isinstance(status, int) else 0


def main() -> NoReturn:
    """The console script."""
    raise SystemExit(run_command(sys.argv[1:]))


def serve_from_args(arguments: Sequence[str]) -> int:
    """``pippin serve`` with these arguments, for ``python -m pippin.launch_server``; its exit status."""
    return run_command(["serve", *arguments])


def _fail(message: str, status: int) -> int:
    if message.strip():
        typer.echo(f"pippin: {' '.join(message.split())}", err=True)
    return status


def _flagged(error: ConfigError | RequestError) -> str:
    """With the flag that a sampling parameter came from."""
    name = error.field.removeprefix("sampling_params.") if isinstance(error, RequestError) and error.field else None
    if name in [f.name for f in dataclasses.fields(SamplingOptions)]:
        return f"{flag_of(name)}: {error}"
    return str(error)
