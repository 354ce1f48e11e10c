"""What the owner of a Mac runs, so that we learn what Pippin does on it: ``make metal-check``.

    python scripts/metal_check.py [--output metal-check.json] [--model-path MODEL] [--only PART …]

Each part is a process of its own with a time limit, since Metal may end the one that it runs in. The report is one JSON
object; it runs on any platform, and says what did not apply there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "failed", "timed out", "does not apply"]

_WIDTH = 15


@dataclass(frozen=True, slots=True)
class Done:
    """A process that has ended: ``status`` is None if its time was up."""

    status: int | None
    output: str
    errors: str


Run = Callable[[Sequence[str], dict[str, str], float], Done]


@dataclass(frozen=True, slots=True)
class Part:
    """One question to the machine. ``command`` follows the interpreter; ``needs_metal`` says where it applies.

    Nor does it where the process fails and says ``unless``. ``read`` makes of the output what the report keeps, and
    raises ValueError for what is not as it should be.
    """

    name: str
    command: tuple[str, ...]
    read: Callable[[str], Any]
    seconds: float
    needs_metal: bool = False
    unless: str = ""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of a part; ``detail`` is its output as data, ``said`` the end of what it wrote if it went wrong."""

    status: Status
    seconds: float
    detail: Any = None
    said: str = ""


def run_process(command: Sequence[str], environment: dict[str, str], seconds: float) -> Done:
    """Runs it to its end or that of its time."""
    try:
        done = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as late:
        out, err = (
            (s or b"").decode(errors="replace") if not isinstance(s, str) else s for s in (late.stdout, late.stderr)
        )
        return Done(None, out, err)
    return Done(done.returncode, done.stdout, done.stderr)


# --- reading what parts print ---


def an_object(output: str) -> Any:
    """The one JSON object that it printed."""
    return json.loads(output)


def lines_of_json(output: str) -> list[Any]:
    """Its lines of JSON, at least one."""
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if not found:
        raise ValueError("it printed no result")
    return found


def figures(output: str) -> list[Any]:
    """Who was measured, on what, and how fast."""
    return [{k: line[k] for k in ("side", "settings", "figures")} for line in lines_of_json(output)]


def equal_answers(output: str) -> list[Any]:
    """All greedy answers must equal the peer's."""
    found = figures(output)
    if wrong := [f["figures"] for f in found if f["figures"]["equal"] != f["figures"]["prompts"]]:
        raise ValueError(f"answers differ: {wrong}")
    return found


def text(output: str) -> list[str]:
    """Its lines."""
    return output.splitlines()


# --- parts ---


def parts(model: str | None) -> list[Part]:
    """All of them, in the order to run; ``model`` is the demo model if None."""
    chosen = ("--model-path", model) if model else ()
    one_batch = ("-m", "pippin", "bench", "one-batch", *chosen)
    sizes = ("--batch-size", "1", "8", "--input-len", "128", "--output-len", "32", "--rounds", "2")
    mine = (str(Path(__file__).resolve()), "--part")
    return [
        Part("environment", ("-m", "pippin.check_env", "--json"), an_object, 60),
        Part("kernels", ("-m", "pippin", "kernels", "check", "--quick"), text, 300),
        Part(
            "parity float32",
            (*one_batch, "--correctness-test", "--vs", "mlx-lm", "--output-len", "32"),
            equal_answers,
            300,
        ),
        Part("overlap", (*mine, "overlap", *chosen), an_object, 300),
        Part("capture", (*mine, "capture"), an_object, 120, True, "", {"MTL_CAPTURE_ENABLED": "1"}),
        Part("kernel times", ("-m", "pippin", "bench", "kernels", "--quick", "--rounds", "2"), figures, 300),
        Part("speed", (*one_batch, *sizes, "--vs", "mlx-lm"), figures, 600),
        Part("build", ("-m", "pippin", "kernels", "build", *chosen), text, 900, True, "kernels can't be built here"),
        Part("kernels, built", ("-m", "pippin", "kernels", "check", "--quick"), text, 300, True),
    ]


def overlap(model: str | None) -> dict[str, Any]:
    """Greedy answers to eight prompts with and without overlap, which must be the same, and the seconds of each.

    Raises ValueError where they differ.
    """
    from pippin import Engine

    prompts = [f"What is {n} + {n + 7}?" for n in range(8)]
    found: dict[str, Any] = {}
    answers = []
    for name, off in (("with", False), ("without", True)):
        with Engine(model, disable_overlap_schedule=off) as engine:
            engine.generate(prompts[:1], {"temperature": 0, "max_new_tokens": 4})
            begin = time.perf_counter()
            done = engine.generate(prompts, {"temperature": 0, "max_new_tokens": 32, "ignore_eos": True})
            found[f"seconds {name} overlap"] = time.perf_counter() - begin
            answers.append([answer["output_ids"] for answer in done])
            engine.flush_cache()
    if answers[0] != answers[1]:
        raise ValueError(f"answers differ with overlap and without: {answers}")
    return found | {"prompts": len(prompts), "equal": True}


def capture() -> dict[str, Any]:
    """Captures a few kernels with Metal's tools. Raises ValueError where no trace comes of it."""
    import mlx.core as mx

    from pippin.bench.kernel_checks import check_order

    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "check.gputrace"
        mx.metal.start_capture(str(trace))
        check_order(2)
        mx.metal.stop_capture()
        size = sum(f.stat().st_size for f in (trace.rglob("*") if trace.is_dir() else [trace]) if f.is_file())
    if not size:
        raise ValueError("the capture is empty")
    return {"bytes": size}


# --- the report ---


def examine(part: Part, run: Run, metal: bool) -> Finding:
    """Runs a part and judges it; never raises."""
    if part.needs_metal and not metal:
        return Finding("does not apply", 0.0)
    begin = time.perf_counter()
    done = run([sys.executable, *part.command], part.environment, part.seconds)
    taken, said = time.perf_counter() - begin, (done.errors or done.output)[-2000:]
    if done.status is None:
        return Finding("timed out", taken, None, said)
    if done.status and part.unless and part.unless in said:
        return Finding("does not apply", taken, None, said)
    try:
        detail = part.read(done.output)
    except (ValueError, KeyError, TypeError) as error:
        return Finding("failed", taken, None, f"{error}\n{said}"[:4000])
    return Finding("failed" if done.status else "ok", taken, detail, said if done.status else "")


def report(chosen: Sequence[Part], run: Run, metal: bool, tell: Callable[[str], None]) -> dict[str, Any]:
    """Everything as one JSON object; ``tell`` gets a line a part."""
    begin, found = time.time(), {}
    for part in chosen:
        finding = examine(part, run, metal)
        found[part.name] = finding
        words = finding.said.strip().splitlines()[-1:] if finding.status in ("failed", "timed out") else []
        tell(f"{finding.status:<{_WIDTH}} {part.name:<18} {finding.seconds:6.1f} s  {' '.join(words)[:160]}")
    return {
        "report": "pippin metal-check",
        "machine": platform.platform(),
        "metal": metal,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(begin)),
        "seconds": time.time() - begin,
        "ok": all(f.status in ("ok", "does not apply") for f in found.values()),
        "parts": {name: asdict(f) for name, f in found.items()},
    }


def has_metal() -> bool:
    from pippin.backend import NoBackendError, prepare

    try:
        prepare()
    except NoBackendError:
        return False
    import mlx.core as mx

    return bool(mx.metal.is_available())


def main(arguments: Sequence[str] | None = None, run: Run = run_process) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("metal-check.json"), help="the report")
    parser.add_argument("--model-path", help="a model instead of the demo model: a directory or hub id")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts to run")
    parser.add_argument("--part", choices=("overlap", "capture"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        print(json.dumps(overlap(options.model_path) if options.part == "overlap" else capture()))
        return 0
    chosen = parts(options.model_path)
    if options.only:
        names = [part.name for part in chosen]
        if unknown := [name for name in options.only if name not in names]:
            parser.error(f"--only: there is no part {unknown[0]!r}; there are {', '.join(names)}")
        chosen = [part for part in chosen if part.name in options.only]
    found = report(chosen, run, has_metal(), lambda line: print(line, flush=True))
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{options.output}: {'all well' if found['ok'] else 'something went wrong'}; please send it with an issue")
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
