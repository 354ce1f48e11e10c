"""An exception in each stage of the engine fails the request that it is about, or nobody; others get their tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pippin import runner
from pippin.cache.radix import RadixCache
from pippin.core import EngineCore
from pippin.flight import InFlight
from pippin.grammar import compiler
from pippin.grammar.matcher import GrammarMatcher, Masks
from pippin.messages import Submit
from pippin.penalties import TokenCounts
from pippin.types import Grammar, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.cores import collect, make_core, run
from tests.server.conftest import byte_tokenizer

MARK = 33
"""The first token of the prompt that stages fail on."""

PLAIN = SamplingParams(max_new_tokens=14, temperature=0, ignore_eos=True)
DRAWN = SamplingParams(max_new_tokens=14, temperature=1, seed=5, frequency_penalty=0.4, ignore_eos=True)
FITTED = SamplingParams(max_new_tokens=14, temperature=0, grammar=Grammar("regex", "[a-z]{4}forced by it[a-z]{20}"))
BAD = Grammar("regex", "[0-9]{3}forced by it[0-9]{20}", "bad")

Blames = Callable[..., bool]


def works_of(works: Any, *_: Any, **__: Any) -> bool:
    return any(work.request.id == "bad" for work in works)


def marked(self: Any, tokens: Any, *_: Any) -> bool:
    return len(tokens) > 0 and tokens[0] == MARK


def fields_of(self: Any, matchers: dict[int, GrammarMatcher]) -> bool:
    return any(matcher._field == "bad" for matcher in matchers.values())


STAGES: dict[str, tuple[Any, str, Blames, SamplingParams]] = {
    "compiling a grammar": (compiler, "llguidance_grammar", lambda grammar, *_: grammar.field == "bad", PLAIN),
    "following a grammar": (GrammarMatcher, "take", lambda self, token: self._field == "bad", PLAIN),
    "forced tokens": (GrammarMatcher, "forced", lambda self: self._field == "bad", PLAIN),
    "masks": (Masks, "fill", fields_of, PLAIN),
    "sampler's rows": (runner, "sampling_inputs", works_of, DRAWN),
    "penalties": (TokenCounts, "of", lambda self, work, size: work.request.id == "bad", DRAWN),
    "reading": (InFlight, "read", lambda self: works_of(self.works), DRAWN),
    "matching": (RadixCache, "match", marked, PLAIN),
    "insertion": (RadixCache, "insert", marked, PLAIN),
    "release": (RadixCache, "release", lambda self, pin: pin is not None, PLAIN),
}
OURS = ("match", "insert", "release")
"""Where nothing of an answer is lost: the engine starts over with an empty cache."""


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> EngineCore:
    path: Path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "qwen3", num_hidden_layers=2)
    byte_tokenizer().hf.save_pretrained(path)
    return make_core(path, kv_canary="raise")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What is planted is logged, and pytest would keep tracebacks with the pool in them."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def asked(bad: SamplingParams) -> list[Submit]:
    """Prompts with a common beginning, some longer than a chunk is, and one that ``STAGES`` are about."""
    common = [97 + i % 23 for i in range(30)]
    rows = [[*common, 40 + i, 41] for i in range(3)]
    others = [
        Submit(f"r{i}", row, len(row), p) for i, (row, p) in enumerate(zip(rows, (PLAIN, DRAWN, FITTED), strict=True))
    ]
    prompt = [MARK, *common]
    return [*others, Submit("bad", prompt, len(prompt), bad)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_fails_on_one_request_fails_it_alone(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    owner, name, blames, params = STAGES[stage]
    if owner in (compiler, GrammarMatcher, Masks):
        params = SamplingParams(max_new_tokens=40, temperature=0, grammar=BAD)
    submits = asked(params)
    expected = run(core, submits)
    core.flush()
    assert core._grammars._compiler is not None
    core._grammars._compiler._compiled.clear()
    real, times = vars(owner)[name], 0

    def planted(*args: Any, **options: Any) -> Any:
        nonlocal times
        if blames(*args, **options) and (name not in OURS or times < 6):
            times += 1
            raise ZeroDivisionError("planted")
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, planted)
        found = collect(core, submits)
    assert times
    tokens = {id: [t for o in outputs for t in o.tokens] for id, outputs in found.items()}
    for id in ("r0", "r1", "r2"):
        assert tokens[id] == expected[id], id
        end = found[id][-1].finish
        assert end is not None
        assert end.reason != "error"
    end = found["bad"][-1].finish
    assert end is not None
    if end.reason == "error":
        assert end.status == 500
        assert "planted" not in end.message
        assert "this request" in end.message or "grammar" in end.message
    else:
        assert name in OURS
        assert tokens["bad"] == expected["bad"]
    assert run(core, submits) == expected, "all is as it was"
    core.flush()
    assert core.stats.slots_free == core.stats.slots_total
    assert core.stats.kv_canary_mismatches == 0
