"""``pippin bench one-batch --correctness-test``: greedy answers to real prompts, the same here and at a peer's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from pippin.bench.options import OneBatchOptions
from pippin.bench.results import BenchResult, make_result
from pippin.bench.sides import Side, open_ours, peer, with_room
from pippin.config import EngineConfig
from pippin.environment import device
from pippin.errors import ConfigError
from pippin.messages import ModelInfo
from pippin.terminal import LoadingBar
from pippin.text.tokenizer import Tokenizer, load_tokenizer
from pippin.types import Token

CORRECTNESS = "correctness"

PROMPTS = (
    "The capital of the United Kingdom is",
    "Once upon a time there was a fox who",
    "To boil an egg, first",
    "7 + 5 =",
    "Yes",
)
"""Of different lengths, so that the batch is ragged."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two answers part: token ``at`` of the answer to prompt ``prompt``; None if an answer has no such token."""

    prompt: int
    at: int
    ours: Token | None
    theirs: Token | None


def differences(ours: Sequence[Sequence[Token]], theirs: Sequence[Sequence[Token]]) -> Iterator[Difference]:
    """The first difference of each pair of answers that has one."""
    for prompt, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if list(a) != list(b):
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            yield Difference(prompt, at, a[at] if at < len(a) else None, b[at] if at < len(b) else None)


def in_float32(config: EngineConfig) -> EngineConfig:
    """Exact enough to compare, unless another dtype was asked for: in 16 bits tokens may differ by rounding alone."""
    return dataclasses.replace(config, dtype="float32") if config.dtype == "auto" else config


def peers_of(config: EngineConfig, options: OneBatchOptions) -> list[str]:
    """Those asked for; PyTorch if it is installed and not what ``--device`` runs, or else mlx-lm."""
    torch = find_spec("torch") is not None and not config.device.startswith("torch")
    return options.peers or ["torch" if torch else "mlx-lm"]


def read_prompts(options: OneBatchOptions) -> list[str]:
    """Lines of the file that was given, empty ones left out. Raises ConfigError if there are none."""
    if options.prompt_filename is None:
        return list(PROMPTS)
    path = Path(options.prompt_filename)
    try:
        found = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}", "--prompt-filename") from error
    if not found:
        raise ConfigError(f"{path} holds no prompt: one a line", "--prompt-filename")
    return found


def check_correctness(config: EngineConfig, options: OneBatchOptions, console: Console) -> list[BenchResult]:
    """Answers the prompts on every side, and compares; a result for each peer.

    Raises ConfigError where a prompt does not fit the context.
    """
    texts, steps = read_prompts(options), options.output_lens[0]
    # A token stands for a byte at least, and a few special ones may be put round them.
    config = with_room(in_float32(config), [[len(text.encode()) + 8 + steps for text in texts]])
    with ExitStack() as stack:
        with LoadingBar() as loading:
            ours = open_ours(config, loading)
        tokenizer = load_tokenizer(ours.info.tokenizer_path, trust_remote_code=config.trust_remote_code)
        prompts = [tokenizer.encode(text) for text in texts]
        if (longest := max(map(len, prompts)) + steps) > ours.info.context_length:
            raise ConfigError(
                f"a prompt and its answer take {longest} tokens, the context has {ours.info.context_length}",
                "--prompt-filename",
            )
        sides = [stack.enter_context(peer(name, config, ours.info)) for name in peers_of(config, options)]
        with ours.engine.cutting(options.cut_len):
            return list(compare(ours.side, sides, prompts, options, ours.info, tokenizer, console))


def compare(
    ours: Side,
    peers: Sequence[Side],
    prompts: Sequence[list[Token]],
    options: OneBatchOptions,
    info: ModelInfo,
    tokenizer: Tokenizer,
    console: Console,
) -> Iterator[BenchResult]:
    """A result for each peer, and on the console what differs. We get all prompts in one batch, a peer one by one."""
    steps = options.output_lens[0]
    own = ours.run(prompts, steps).timing.tokens
    for prompt, answer in zip(prompts, own, strict=True):
        console.print(f"[dim]{escape(repr(tokenizer.decode(prompt)))}[/dim] {escape(repr(tokenizer.decode(answer)))}")
    for side in peers:
        theirs = [side.run([prompt], steps).timing.tokens[0] for prompt in prompts]
        found = list(differences(own, theirs))
        for d in found:
            console.print(f"[red]{escape(said(d, ours.name, side.name, prompts, own, tokenizer))}[/red]")
        equal = len(prompts) - len(found)
        console.print(f"{ours.name} and {side.name}: {equal} of {len(prompts)} answers of {steps} tokens are equal")
        yield make_result(
            CORRECTNESS,
            run_name=options.run_name,
            side=ours.name,
            model=info.model_path,
            device=device()["device"],
            settings={"vs": side.name, "output_len": steps, "dtype": info.dtype, "quantization": info.quantization},
            figures={
                "prompts": len(prompts),
                "equal": equal,
                "first_difference": [found[0].prompt, found[0].at] if found else None,
            },
        )


def said(
    d: Difference,
    ours: str,
    theirs: str,
    prompts: Sequence[list[Token]],
    answers: Sequence[Sequence[Token]],
    tokenizer: Tokenizer,
) -> str:
    """The difference, with the text that both agree on."""
    before = tokenizer.decode([*prompts[d.prompt], *answers[d.prompt][: d.at]])

    def token(id: Token | None) -> str:
        return "nothing" if id is None else f"{id} {tokenizer.piece(id)!r}"

    return (
        f"prompt {d.prompt + 1}, token {d.at + 1} of the answer, behind {before[-60:]!r}: "
        f"{ours} has {token(d.ours)}, {theirs} {token(d.theirs)}"
    )
