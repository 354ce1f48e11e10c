"""Structured output's price: tokens a second of many requests at once, half of them with grammars, and none of them.

    python -m benchmarks.grammar [--shape demo] [--requests 64] [--tokens 128] [--rounds 5] [--json results.jsonl]

Every answer has ``--tokens`` tokens, with a grammar or without: no grammar here ends before. ``free`` leaves the model
much choice (strings); ``forced`` leaves little (records whose keys are given, so that tokens are forced ahead). Sides
take turns; medians of ``--rounds``. ``--shape 8b`` takes random weights and a vocabulary of 151 936, on a GPU;
``--shape tiny --vocab 151936`` shows on a CPU what the host does for such a vocabulary. ``host_ms`` is processor time
a step of the engine's thread, which on a CPU runs none of the model, and ``process_ms`` of all threads.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.garbage import leave_loaded_alone
from pippin.loading import build_core, load_core
from pippin.messages import Output, Submit
from pippin.types import Grammar, SamplingParams

RECORD = {
    "type": "object",
    "properties": {
        "identifier": {"type": "integer", "minimum": 0, "maximum": 9999},
        "description": {"type": "string", "maxLength": 24},
        "category": {"enum": ["electronics", "groceries", "clothing"]},
        "available": {"type": "boolean"},
    },
    "required": ["identifier", "description", "category", "available"],
    "additionalProperties": False,
}
GRAMMARS = {
    "free": Grammar("json_schema", json.dumps({"type": "array", "items": {"type": "string"}, "minItems": 500})),
    "forced": Grammar("json_schema", json.dumps({"type": "array", "items": RECORD, "minItems": 500})),
}


def config_of(requests: int) -> EngineConfig:
    return EngineConfig(max_running_requests=requests, max_total_tokens=requests * 600)


def shaped_core(shape: str, config: EngineConfig, directory: Path, vocab_size: int | None = None) -> EngineCore:
    """Random weights in a real model's shape, and a vocabulary of its size, which is written to ``directory``.

    ``vocab_size`` gives a tiny one more tokens."""
    import mlx.core as mx

    from benchmarks.gpu import make_model, weight_bytes
    from pippin.models.load import LoadedModel

    model = make_model(shape, vocab_size=vocab_size)
    vocab = int(model.args.vocab_size)
    (directory / "tokenizer.json").write_text(large_tokenizer(vocab), encoding="utf-8")
    dtype = mx.float32 if shape == "tiny" else mx.bfloat16
    kind, size = str(model.args.model_type), weight_bytes(model)
    loaded = LoadedModel(model, {}, directory, kind, dtype, None, (), vocab, 40960, size)
    return build_core(loaded, config, lambda _: None)


def large_tokenizer(vocab: int) -> str:
    """The shipped model's tokenizer with made-up merges, up to ``vocab`` ids, or with its first so many.

    What a mask costs hangs on how many tokens may end a string or must be escaped in one. Of cl100k's 100 256 tokens
    and o200k's 199 998, 1.3 and 0.6 % have a quotation mark, 3.5 and 1.7 % a control character, and they are 6.4 and
    7.0 bytes long on average. Of the made-up ones 1.3 and 3.5 %, and 6.6.
    """
    from pippin.demo import demo_model_path

    data = json.loads((demo_model_path() / "tokenizer.json").read_text(encoding="utf-8"))
    known: dict[str, int] = data["model"]["vocab"]
    source, pieces = random.Random(0), _Pieces(known)
    next_id = max([*known.values(), *(token["id"] for token in data["added_tokens"])]) + 1
    known = {piece: id for piece, id in known.items() if id < vocab}
    data["model"]["merges"] = [m for m in data["model"]["merges"] if {*m, "".join(m)} <= known.keys()]
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < vocab]
    while next_id < vocab:
        left, right = pieces.draw(source), pieces.draw(source)
        if left + right not in known:
            known[left + right] = next_id
            data["model"]["merges"].append([left, right])
            next_id += 1
    data["model"]["vocab"] = known
    return json.dumps(data)


class _Pieces:
    """Short tokens of a byte-level vocabulary, by what strings in JSON make of them."""

    def __init__(self, known: Iterable[str]) -> None:
        short = [piece for piece in known if len(piece) <= _LONGEST]
        self._kinds = {
            "quoted": [p for p in short if '"' in p],
            "control": [p for p in short if '"' not in p and any("\u0100" <= c < "\u0120" for c in p)],
            "foreign": [p for p in short if _plain(p) and any("\u007f" < c != "\u0120" for c in p)],
            "plain": [p for p in short if _plain(p) and all(c < "\u007f" or c == "\u0120" for c in p)],
        }

    def draw(self, source: random.Random) -> str:
        kind = source.choices(list(_SHARES), list(_SHARES.values()))[0]
        return source.choice(self._kinds[kind])


_LONGEST = 5
_SHARES = {"quoted": 0.0065, "control": 0.0175, "foreign": 0.1, "plain": 0.876}


def _plain(piece: str) -> bool:
    return not any(c in '"\\' or "\u0100" <= c < "\u0120" for c in piece)


class Round(NamedTuple):
    """What a round of requests showed: tokens a second, and processor time a step in milliseconds."""

    rate: float
    host_ms: float
    process_ms: float


class Load:
    """Rounds of requests that all come at once."""

    def __init__(self, core: EngineCore, requests: int, tokens: int) -> None:
        self._core = core
        self._requests = requests
        self._tokens = tokens
        self._round = 0

    def run(self, grammars: Sequence[Grammar | None]) -> Round:
        """Request i has grammar i modulo their number."""
        self._round += 1
        source = random.Random(self._round)
        most = self._core.info.vocab_size
        for i in range(self._requests):
            prompt = [source.randrange(300, min(most, 4000)) for _ in range(32)]
            params = SamplingParams(
                max_new_tokens=self._tokens,
                temperature=1.0,
                seed=i,
                ignore_eos=True,
                grammar=grammars[i % len(grammars)],
            )
            self._core.add(Submit(f"{self._round}-{i}", prompt, len(prompt), params))
        began, thread, process = time.perf_counter(), time.thread_time(), time.process_time()
        count, finished, steps = 0, 0, self._core.stats.steps
        for output in self._outputs():
            count += len(output.tokens)
            if output.finish is not None:
                assert output.finish.reason == "length", output.finish
                finished += 1
        assert (finished, count) == (self._requests, self._requests * self._tokens)
        steps = self._core.stats.steps - steps
        each = [1e3 * spent / steps for spent in (time.thread_time() - thread, time.process_time() - process)]
        return Round(count / (time.perf_counter() - began), *each)

    def _outputs(self) -> Iterator[Output]:
        while self._core.has_work:
            step = self._core.step()
            yield from step.outputs if step else ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="demo", help="demo, or one of benchmarks.gpu's: 0.6b, 8b")
    parser.add_argument("--vocab", type=int, help="tokens of --shape tiny")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.shape == "demo":
            core = load_core(config_of(options.requests))
        else:
            core = shaped_core(options.shape, config_of(options.requests), Path(folder), options.vocab)
        load = Load(core, options.requests, options.tokens)
        sides: dict[str, list[Grammar | None]] = {
            "none": [None],
            "half free": [GRAMMARS["free"], None],
            "half forced": [GRAMMARS["forced"], None],
            "half mixed": [GRAMMARS["free"], None, GRAMMARS["forced"], None],
            "all mixed": [GRAMMARS["free"], GRAMMARS["forced"]],
        }
        rounds: dict[str, list[Round]] = {name: [] for name in sides}
        for grammars in sides.values():
            load.run(grammars)  # to warm up
        leave_loaded_alone()  # as the engine's own process does
        forced = core.stats.forced_tokens
        for _ in range(options.rounds):
            for name, grammars in sides.items():
                rounds[name].append(load.run(grammars))
    none = statistics.median(r.rate for r in rounds["none"])
    for name, found in rounds.items():
        ratio = statistics.median(f.rate / n.rate for f, n in zip(found, rounds["none"], strict=True))
        rate, host, process = (statistics.median(values) for values in zip(*found, strict=True))
        row = {"side": name, "tokens_per_second": round(rate, 1), "of_none": round(ratio, 3)}
        row |= {"host_ms": round(host, 2), "process_ms": round(process, 2)}
        row |= {"shape": options.shape, "requests": options.requests, "tokens": options.tokens}
        print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(f"none={none:.1f} tokens/s, forced tokens: {core.stats.forced_tokens - forced}, device {core.info.device}")


if __name__ == "__main__":
    main()
