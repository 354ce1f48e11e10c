"""Every architecture of mlx-lm that has a small configuration, through the engine: ``make sweep-models``.

Each is a tiny random model in a process of its own. Its greedy tokens by mlx-lm alone are compared with the engine's:
one request at a time, many at once, prompts in chunks, from the prefix cache, and with so few slots that requests are
retracted and resumed. The outcome is the table of docs/models.md; the exit status is 1 if any served model differs.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pippin.catalogue import UNTRIED

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
CHECKED = ROOT / "src" / "pippin" / "models" / "checked.json"
BEGIN, END = "<!-- sweep: begin -->", "<!-- sweep: end -->"
CHECKS = ("alone", "batched", "chunked", "prefix hit", "retracted")
TOKENS = 24
SHORT = ((104, 16), (72, 64))
"""Slots and chunks with which requests are retracted: the second where windows let few run at a time."""

DRAWS, NEAR = 8, 1e-4
"""How often weights are drawn until mlx-lm chooses no expert and no token by less than this, or else the best draw.

Scores are off by up to 2e-5 in float32, so nearer ones are ranked by how a product happens to be cut.
"""


@dataclass(slots=True)
class Outcome:
    """What the sweep found of one architecture: its backend, and whether each check's tokens were mlx-lm's."""

    architecture: str
    backend: str = ""
    refusal: str = ""
    state_bytes: int = 0
    checks: dict[str, bool] = field(default_factory=dict)

    @property
    def row(self) -> str:
        if self.refusal:
            return f"| {self.architecture} | refused | " + " | " * 4 + f" | {self.refusal} |"
        marks = " | ".join("yes" if self.checks[c] else "**differs**" for c in CHECKS)
        keeps = f"{self.state_bytes} bytes of state a request" if self.state_bytes else ""
        return f"| {self.architecture} | {self.backend} | {marks} | {keeps} |"


def architectures() -> list[str]:
    """mlx-lm's, by the files that define a ``Model``, without importing them."""
    import mlx_lm

    folder = Path(mlx_lm.__file__).parent / "models"
    return sorted(f.stem for f in folder.glob("*.py") if re.search(r"^class Model\(", f.read_text(), re.M))


def check(architecture: str) -> Outcome:
    """Runs one architecture through every check. Raises KeyError if there is no small configuration for it."""
    from pippin.errors import ModelError
    from tests.architectures import small_config

    config, outcome = small_config(architecture), Outcome(architecture)
    with tempfile.TemporaryDirectory() as folder:
        try:
            _check(*_drawn(config, Path(folder)), outcome)
        except ModelError as error:
            outcome.refusal = _shorter(str(error).replace(folder, "it").replace("|", "/").splitlines()[0])
    return outcome


def _drawn(config: dict[str, Any], path: Path) -> tuple[Any, list[list[int]]]:
    """A loaded model of mlx-lm whose choices are clear, and the tokens that it answers each prompt with.

    Judged by mlx-lm alone, before the engine has run.
    """
    from pippin.config import EngineConfig
    from pippin.models.load import load_mlx_model
    from tests.checkpoints import write_checkpoint

    margins: dict[int, float] = {}

    def draw(seed: int) -> tuple[Any, list[list[int]]]:
        write_checkpoint(path, config, seed=1000 * seed)
        loaded = load_mlx_model(str(path), EngineConfig(dtype="float32"))
        answers = [_answer(loaded.model, prompt) for prompt in _prompts()]
        margins[seed] = min(_margin(loaded.model, *pair) for pair in zip(_prompts(), answers, strict=True))
        return loaded, answers

    for seed in range(DRAWS):
        drawn = draw(seed)
        if margins[seed] > NEAR:
            return drawn
    return draw(max(margins, key=margins.__getitem__))


def _answer(model: Any, prompt: list[int]) -> list[int]:
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=TOKENS)]


def _margin(model: Any, prompt: list[int], answer: list[int]) -> float:
    """By how much the nearest choice of experts or of a token was won. Exact ties are not near: nothing turns them."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.models.cache import make_prompt_cache

    with _partitions() as found:
        tokens = mx.array([prompt + answer[:-1]])
        logits = model(tokens, cache=make_prompt_cache(model))[0, len(prompt) - 1 :]
        choices = [np.asarray(mx.sort(logits, axis=-1)[:, -2:].astype(mx.float32))]
        for scores, kth in found:
            ranked = np.sort(np.asarray(scores.astype(mx.float32)), axis=-1)
            first = kth if kth >= 0 else ranked.shape[-1] + kth - 1
            choices.append(ranked[..., first : first + 2].reshape(-1, ranked[..., first : first + 2].shape[-1]))
    apart = np.concatenate([pair[:, 1] - pair[:, 0] for pair in choices if pair.shape[-1] == 2])
    return float(apart[(apart > 0) & np.isfinite(apart)].min(initial=np.inf))


@contextmanager
def _partitions() -> Iterator[list[tuple[Any, int]]]:
    """What was partitioned, and where: all of mlx-lm's routers choose by ``argpartition``."""
    import mlx.core as mx

    found, partition = list[tuple[Any, int]](), mx.argpartition

    def noted(scores: Any, kth: int, axis: int = -1, **options: Any) -> Any:
        found.append((mx.moveaxis(scores, axis, -1), kth))
        return partition(scores, kth, axis, **options)

    mx.disable_compile()
    mx.argpartition = noted  # type: ignore[assignment]  # for one forward
    try:
        yield found
    finally:
        mx.argpartition = partition
        mx.enable_compile()


def _shorter(refusal: str) -> str:
    """The same reason of several backends, told once."""
    head, _, rest = refusal.partition(": ")
    reasons = [part.partition(": ")[2] for part in rest.split("; ")]
    return f"{head}: {reasons[0]}" if len(reasons) > 1 and len(set(reasons)) == 1 else refusal


def _check(loaded: Any, expected: list[list[int]], outcome: Outcome) -> None:
    from pippin.config import EngineConfig
    from pippin.core import EngineCore
    from pippin.loading import build_core
    from pippin.messages import Submit
    from pippin.probe import measure_caches
    from pippin.types import SamplingParams

    params = SamplingParams(temperature=0.0, max_new_tokens=TOKENS, ignore_eos=True)
    base: dict[str, Any] = {"model_path": str(loaded.path), "max_total_tokens": 1000, "dtype": "float32"}
    rows = _prompts()

    def core(**options: Any) -> EngineCore:
        return build_core(loaded, EngineConfig(**base | options), lambda _: None)

    def run(core: EngineCore, some: Sequence[int]) -> bool:
        found: dict[str, list[int]] = {str(i): [] for i in some}
        for i in some:
            core.add(Submit(str(i), rows[i], len(rows[i]), params))
        while core.has_work:
            step = core.step()
            for output in step.outputs if step else ():
                found[output.id] += output.tokens
        return all(found[str(i)] == expected[i] for i in some)

    everyone, cached = range(len(rows)), core()
    outcome.backend = cached.info.attention_backend
    outcome.state_bytes = measure_caches(loaded.model).state_bytes
    outcome.checks["batched"] = run(cached, everyone)
    outcome.checks["prefix hit"] = run(cached, everyone) and run(cached, everyone) and cached.stats.cached_tokens > 0
    single = core(disable_radix_cache=True)
    outcome.checks["alone"] = all(run(single, [i]) for i in everyone)
    outcome.checks["chunked"] = run(core(chunked_prefill_size=7), everyone)
    for slots, chunk in SHORT:
        short = core(max_total_tokens=slots, chunked_prefill_size=chunk)
        outcome.checks["retracted"] = run(short, everyone) and short.stats.retractions > 0
        if short.stats.retractions:
            break


def _prompts() -> list[list[int]]:
    """Prompts of many lengths, some with a common beginning."""
    source = random.Random(5)
    trunk = [source.randrange(3, 280) for _ in range(30)]
    tails = [[source.randrange(3, 280) for _ in range(n)] for n in (3, 9, 1)]
    return [[trunk[0]], [source.randrange(3, 280) for _ in range(47)], *([*trunk, *tail] for tail in tails)]


def sweep(names: Sequence[str], jobs: int) -> list[Outcome]:
    """Each architecture in a process of its own: some of mlx-lm's files crash on small models, or end the process."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(_sweep_one, names))


def _sweep_one(name: str) -> Outcome:
    command = [sys.executable, __file__, "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    last = (done.stdout.splitlines() or [""])[-1]
    if last.startswith("{"):
        outcome = Outcome(**json.loads(last))
    else:
        reason = "no small configuration" if "KeyError" in done.stderr else _why(done)
        outcome = Outcome(name, refusal=f"{UNTRIED}: {reason}")
    print(outcome.row, flush=True)
    return outcome


def _why(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"mlx-lm's own model crashes (signal {-done.returncode})"
    lines = (done.stderr or done.stdout).strip().splitlines()
    return f"it fails outside of the engine: {lines[-1][:100]}" if lines else f"exit status {done.returncode}"


def table(outcomes: Sequence[Outcome]) -> str:
    """The table, what is served first."""
    head = f"| architecture | backend | {' | '.join(CHECKS)} | |\n|---{'|---' * (len(CHECKS) + 2)}|\n"
    served = [o for o in outcomes if not o.refusal]
    count = f"{len(served)} architectures served, {len(outcomes) - len(served)} not.\n\n"
    order = sorted(outcomes, key=lambda o: (bool(o.refusal), o.backend, o.architecture.lower()))
    return count + head + "\n".join(o.row for o in order) + "\n"


def write(outcomes: Sequence[Outcome]) -> None:
    text = PAGE.read_text()
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    PAGE.write_text(f"{before}{BEGIN}\n{table(outcomes)}{after}")
    rows = sorted(map(_checked, outcomes), key=lambda row: row["architecture"].lower())
    CHECKED.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def _checked(outcome: Outcome) -> dict[str, Any]:
    """What ``pippin models`` tells of it."""
    if outcome.refusal:
        return {"architecture": outcome.architecture, "refusal": outcome.refusal}
    passed = [check for check in CHECKS if outcome.checks[check]]
    return {"architecture": outcome.architecture, "backend": outcome.backend, "checks": passed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", help="check this architecture here, and print the outcome as JSON")
    parser.add_argument("names", nargs="*", help="architectures; all if left out, and the page is written")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.one:
        from pippin.backend import prepare

        prepare()
        print(json.dumps(asdict(check(args.one))))
        return 0
    outcomes = sweep(args.names or architectures(), args.jobs)
    if not args.names:
        write(outcomes)
    return int(any(not ok for o in outcomes for ok in o.checks.values()))


if __name__ == "__main__":
    sys.exit(main())
