"""Grammars in the engine: every answer fits, and is the same alone, batched, overlapped, forced ahead and resumed."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.grammar.matcher import GrammarMatcher, Masks
from pippin.loading import load_core
from pippin.messages import Output, Submit
from pippin.runner import MlxModelRunner
from pippin.types import Finish, Grammar, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.compiling import play_gpu, traces_of
from tests.test_core_faults import FlakyRunner
from tests.tokenizers_for_tests import byte_level

EOS = byte_level().eos_ids[0]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["a test of tokens", "a test of apples", "seed"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}
REGEX = r"(apple|apples|app){1,4}-[0-9]{2,5}( stopped| stop)?"
GRAMMARS = [
    Grammar("json_schema", json.dumps(SCHEMA)),
    Grammar("regex", REGEX),
    Grammar("regex", r"[^a]{3,30}"),
    Grammar("choice", json.dumps(["Hello world, this is", "Hello world, that was", "Ünïcödé 🙂", "no"])),
    Grammar("grammar", 'root ::= "Pippin" (" and " "apple" [0-9])* "!"'),
    None,
    None,
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    tokenizer = byte_level()
    make_checkpoint(path, "qwen3", head_dim=16, num_hidden_layers=2, vocab_size=tokenizer.vocab_size + 9)
    tokenizer.hf.save_pretrained(path)
    return path


def make_core(path: Path, **options: Any) -> EngineCore:
    return load_core(EngineConfig(model_path=str(path), **{"max_total_tokens": 2000, "context_length": 200, **options}))


@pytest.fixture(scope="module")
def core(checkpoint: Path) -> EngineCore:
    return make_core(checkpoint)


def answers(core: EngineCore, submits: Sequence[Submit]) -> dict[str, tuple[list[int], Finish | None]]:
    """Adds all at once and steps until nothing is left."""
    for submit in submits:
        core.add(submit)
    return rest_of(core, submits)


def rest_of(core: EngineCore, submits: Sequence[Submit]) -> dict[str, tuple[list[int], Finish | None]]:
    """Steps until nothing is left."""
    found: dict[str, list[Output]] = {submit.id: [] for submit in submits}
    while core.has_work:
        step = core.step()
        for output in step.outputs if step else ():
            found[output.id].append(output)
    assert all(outputs[-1].finish is not None for outputs in found.values())
    assert all(output.finish is None for outputs in found.values() for output in outputs[:-1])
    for outputs in found.values():
        facts = [(o.num_cached, o.miss, o.waited) for o in outputs if o.tokens or o is outputs[-1]]
        assert facts == facts[:1] * len(facts), "what is known of a request is told with each of its tokens"
    return {id: ([t for o in outputs for t in o.tokens], outputs[-1].finish) for id, outputs in found.items()}


def params_for(source: random.Random, grammar: Grammar | None) -> SamplingParams:
    longest = source.choice([5, 60, 60, 100])
    return SamplingParams(
        max_new_tokens=longest,
        min_new_tokens=source.choice([0, 0, 4]),
        temperature=source.choice([0.0, 1.0, 1.5]),
        top_p=source.choice([1.0, 0.7]),
        top_k=source.choice([-1, 3]),
        min_p=source.choice([0.0, 0.1]),
        repetition_penalty=source.choice([1.0, 1.3]),
        presence_penalty=source.choice([0.0, 1.0]),
        logit_bias=source.choice([{}, {300: 20.0, 20: -100.0}]),
        seed=source.choice([0, 1, 2**63]),
        stop_token_ids=source.choice([(), (), (70, 300)]),
        ignore_eos=source.random() < 0.3,
        grammar=grammar,
    )


def submits_for(source: random.Random, count: int) -> list[Submit]:
    prefix = [source.randrange(3, 280) for _ in range(20)]
    found = []
    for i in range(count):
        tail = [source.randrange(3, 280) for _ in range(source.choice([1, 4, 30]))]
        params = params_for(source, source.choice(GRAMMARS))
        found.append(Submit(f"r{i}", [*prefix[: source.choice([0, 20])], *tail], 0, params))
    return [msgspec.structs.replace(s, num_prompt=len(s.tokens)) for s in found]


def text(tokens: Sequence[int]) -> str:
    return byte_level().decode([t for t in tokens if t != EOS])


def fits(grammar: Grammar, said: str) -> bool:
    """By other means than those that made it."""
    match grammar.kind:
        case "json_schema":
            value = json.loads(said)
            return (
                [*value] in (["name", "kind"], ["name", "kind", "count"])
                and value["kind"] in SCHEMA["properties"]["kind"]["enum"]  # type: ignore[index]
                and len(value["name"]) <= 6
                and 0 <= value.get("count", 0) <= 120
            )
        case "regex":
            return re.fullmatch(grammar.text, said) is not None
        case "choice":
            return said in json.loads(grammar.text)
    return re.fullmatch(r"Pippin( and apple[0-9])*!", said) is not None


OPTIONS: list[dict[str, Any]] = [
    {"disable_overlap_schedule": True},
    {"chunked_prefill_size": 3},
    {"disable_radix_cache": True, "max_running_requests": 3},
    {"max_total_tokens": 200, "page_size": 4},
    {"attention_backend": "padded", "schedule_policy": "lpm"},
]


@pytest.mark.parametrize("seed", range(3))
def test_answers_fit_and_are_the_same_whatever_the_schedule(checkpoint: Path, core: EngineCore, seed: int) -> None:
    submits = submits_for(random.Random(seed), 16)
    expected: dict[str, tuple[list[int], Finish | None]] = {}
    for submit in submits:
        expected |= answers(core, [submit])
    for submit in submits:
        tokens, finish = expected[submit.id]
        assert finish is not None
        assert finish.reason in ("stop", "length")
        if submit.params.grammar and finish.reason == "stop" and finish.matched in (None, EOS):
            assert fits(submit.params.grammar, text(tokens)), text(tokens)
        if submit.params.grammar and finish.reason == "length":
            assert len(tokens) == submit.params.max_new_tokens
    assert sum(finish is not None and finish.reason == "stop" for _, finish in expected.values()) > 6
    assert answers(core, submits) == expected
    for options in OPTIONS:
        other = make_core(checkpoint, **options)
        assert answers(other, submits) == expected, options
        assert other.stats.forced_tokens > 0
        other.flush()
        assert other.stats.slots_free == other.stats.slots_total


def test_answers_that_lose_their_slots_come_back_to_their_place(checkpoint: Path, core: EngineCore) -> None:
    grammars = [Grammar("regex", r"([^a]{20}, apples and ){3,}END"), None]
    submits = [
        Submit(f"r{i}", [3 + i] * 9, 9, SamplingParams(max_new_tokens=80, seed=i, grammar=grammars[i % 2]))
        for i in range(8)
    ]
    small = make_core(checkpoint, max_total_tokens=160)
    assert answers(small, submits) == answers(core, submits)
    assert small.stats.retractions > 0
    assert small.stats.forced_tokens > 0


def test_among_many_only_long_runs_are_forced_ahead(core: EngineCore) -> None:
    """Of short ones each token is drawn, and is the same."""
    grammars = [Grammar("regex", r"([0-9]{2}xqz){9}"), Grammar("regex", r"([0-9]{2} and then some more; ){9}")]

    def forced(count: int, grammar: Grammar) -> tuple[int, list[list[int]]]:
        before = core.stats.forced_tokens
        params = SamplingParams(max_new_tokens=60, seed=4, grammar=grammar)
        found = answers(core, [Submit(f"m{i}", [3 + i] * 4, 4, params) for i in range(count)])
        return (core.stats.forced_tokens - before) // count, [tokens for tokens, _ in found.values()]

    (short, one), (shorter, all_short) = forced(1, grammars[0]), forced(24, grammars[0])
    (long, other), (longer, all_long) = forced(1, grammars[1]), forced(24, grammars[1])
    assert short > 0 == shorter
    assert long >= longer > 0
    assert (all_short[0], all_long[0]) == (one[0], other[0])


@pytest.mark.parametrize("options", [{}, {"page_size": 8, "graph_max_rows": 4}, {"disable_graph": True}], ids=str)
def test_answers_are_the_same_as_on_a_gpu(
    checkpoint: Path, core: EngineCore, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Where a kernel's definition writes the pool, steps go through graphs, which end at the logits here."""
    play_gpu(monkeypatch)
    submits = submits_for(random.Random(9), 14)
    other = make_core(checkpoint, **options)
    assert answers(other, submits) == answers(core, submits)
    runner = other._runner
    assert isinstance(runner, MlxModelRunner)
    assert runner.graphs is None or traces_of(runner) > 2


def test_logprobs_change_no_token_and_are_the_models_own(core: EngineCore) -> None:
    """With them nothing is forced ahead: each token is drawn, from a mask that may leave one."""
    ahead = 0
    for grammar in GRAMMARS[:5]:
        params = SamplingParams(max_new_tokens=60, seed=3, grammar=grammar)
        forced = core.stats.forced_tokens
        ((tokens, _),) = answers(core, [Submit("a", [5, 6, 7], 3, params)]).values()
        ahead += core.stats.forced_tokens - forced
        forced = core.stats.forced_tokens
        core.add(Submit("b", [5, 6, 7], 3, msgspec.structs.replace(params, logprobs=True, top_logprobs=2)))
        outputs = [o for _ in range(400) if core.has_work and (step := core.step()) for o in step.outputs]
        assert core.stats.forced_tokens == forced
        drawn = [p for o in outputs for p in o.logprobs]
        assert [p.token for p in drawn] == [t for o in outputs for t in o.tokens] == tokens
        free = SamplingParams(max_new_tokens=1, logprobs=True, prompt_logprobs=True)
        core.add(Submit("c", [5, 6, 7, *tokens], 3 + len(tokens), free))
        outputs = [o for _ in range(400) if core.has_work and (step := core.step()) for o in step.outputs]
        scored = [p for o in outputs for p in o.prompt_logprobs][3:]
        assert [p.logprob for p in drawn] == pytest.approx([p.logprob for p in scored], abs=1e-4)
    assert ahead > 10


def test_a_stream_that_broke_off_anywhere_goes_on_as_it_would_have(core: EngineCore) -> None:
    for grammar in GRAMMARS[:5]:
        whole = Submit("a", [9, 8], 2, SamplingParams(max_new_tokens=60, seed=7, ignore_eos=True, grammar=grammar))
        ((tokens, finish),) = answers(core, [whole]).values()
        cuts = [
            msgspec.structs.replace(whole, id=f"cut{i}", tokens=[9, 8, *tokens[:i]]) for i in range(1, len(tokens) + 1)
        ]
        for i, (rest, end) in enumerate(answers(core, cuts).values(), 1):
            assert (tokens[:i] + rest, end) == (tokens, finish)


def test_the_grammar_wins_over_what_forbids_all_that_it_allows(core: EngineCore) -> None:
    """min_new_tokens forbids stop tokens, but here the grammar allows nothing else."""
    stops = tuple(byte_level().encode("S T"))[::2]
    grammar = Grammar("regex", "[ST]{3}")
    for temperature in (0.0, 1.0):
        params = SamplingParams(
            max_new_tokens=9, min_new_tokens=9, stop_token_ids=stops, grammar=grammar, temperature=temperature
        )
        ((tokens, finish),) = answers(core, [Submit("a", [4], 1, params)]).values()
        assert re.fullmatch("[ST]{3}", text(tokens))
        assert finish == Finish("stop")


def test_an_end_comes_only_where_the_grammar_allows_it(core: EngineCore) -> None:
    """The model wants to end at once, and to write its turn's beginning."""
    eager = SamplingParams(
        max_new_tokens=40, logit_bias={EOS: 100.0, 1: 100.0, 0: 100.0}, grammar=Grammar("regex", "(ab){3,}")
    )
    ((tokens, finish),) = answers(core, [Submit("a", [4], 1, eager)]).values()
    assert (text(tokens), tokens[-1], finish) == ("ababab", EOS, Finish("stop", EOS))
    endless = msgspec.structs.replace(eager, ignore_eos=True)
    ((tokens, finish),) = answers(core, [Submit("a", [4], 1, endless)]).values()
    assert re.fullmatch("(ab)*a?", text(tokens))
    assert (len(tokens), finish) == (40, Finish("length"))


def test_a_grammar_that_fails_is_its_own_requests_trouble(core: EngineCore) -> None:
    fine = Submit("fine", [5, 6], 2, SamplingParams(max_new_tokens=30, seed=1, ignore_eos=True))
    alone = answers(core, [fine])
    bad = [
        Grammar("regex", "(a", "regex"),
        Grammar("json_schema", '{"not": {}}', "response_format.json_schema.schema"),
        Grammar("grammar", "start: UNKNOWN", "ebnf"),
    ]
    submits = [Submit(f"bad{i}", [5, 6], 2, SamplingParams(grammar=grammar)) for i, grammar in enumerate(bad)]
    good = Submit("good", [7], 1, SamplingParams(grammar=Grammar("choice", '["yes"]')))
    found = answers(core, [*submits, fine, good])
    assert found["fine"] == alone["fine"]
    assert text(found["good"][0]) == "yes"
    for submit, grammar in zip(submits, bad, strict=True):
        tokens, finish = found[submit.id]
        assert finish is not None
        assert (tokens, finish.reason, finish.status, finish.field) == ([], "error", 400, grammar.field)
        assert grammar.field in finish.message
    assert "keyword not" in str(found["bad1"][1])


def test_a_request_may_go_while_its_grammar_compiles(core: EngineCore) -> None:
    core.add(Submit("a", [5], 1, SamplingParams(grammar=Grammar("regex", "[a-z]{900}"))))
    core.abort("a")
    step = core.step()
    assert step is not None
    assert [(o.id, o.finish) for o in step.outputs] == [("a", Finish("abort"))]
    assert not core.has_work


def test_without_a_backend_grammars_are_refused_by_name(checkpoint: Path) -> None:
    core = make_core(checkpoint, grammar_backend="none")
    with pytest.raises(Exception, match="regex: grammars are switched off"):
        core.add(Submit("a", [5], 1, SamplingParams(grammar=Grammar("regex", "a", "regex"))))


def test_steps_with_grammars_overlap_as_all_do(core: EngineCore) -> None:
    before = core.stats
    mixed = [
        Submit(f"r{i}", [5, 6, i + 3], 3, SamplingParams(max_new_tokens=40, seed=i, ignore_eos=True, grammar=grammar))
        for i, grammar in enumerate([GRAMMARS[2], None] * 4)
    ]
    answers(core, mixed)
    steps, overlapped = core.stats.steps - before.steps, core.stats.overlapped_steps - before.overlapped_steps
    assert steps <= 44
    assert overlapped >= steps - 2


def test_what_was_drawn_is_followed_while_the_next_step_is_queued(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where steps overlap, whoever waits for a step finds its tokens taken and masks begun, by a thread beside it."""
    mixed = [
        Submit(f"r{i}", [5, 6, i + 3], 3, SamplingParams(max_new_tokens=12, seed=i, grammar=grammar))
        for i, grammar in enumerate([GRAMMARS[2], None] * 2)
    ]
    taken: dict[str, int] = {}
    real = Masks.take

    def take(self: Masks, tokens: Sequence[tuple[GrammarMatcher, int]]) -> None:
        left = sum(m._ahead != token for m, token in tokens)
        taken[threading.current_thread().name] = taken.get(threading.current_thread().name, 0) + left
        real(self, tokens)

    monkeypatch.setattr(Masks, "take", take)
    answers(core, mixed)
    assert {name.rpartition("_")[0] for name, count in taken.items() if count} == {"masks"}
    assert sum(taken.values()) >= 2 * 12


def test_steps_that_fail_when_they_are_read_are_drawn_again(checkpoint: Path, core: EngineCore) -> None:
    """Grammars have taken what they drew, and go back."""
    submits = submits_for(random.Random(9), 10)
    expected = answers(core, submits)
    again = make_core(checkpoint)
    flaky = FlakyRunner(again._runner)  # type: ignore[arg-type]
    again._runner = flaky
    for submit in submits:
        again.add(submit)
    tokens: dict[str, list[int]] = {submit.id: [] for submit in submits}
    turn = 0
    while again.has_work:
        turn += 1
        if turn % 9 == 6:
            flaky.fail.add("read")
        step = again.step()
        for output in step.outputs if step else ():
            tokens[output.id] += output.tokens
    assert flaky.resets >= 4
    assert tokens == {id: found for id, (found, _) in expected.items()}


def test_an_answer_that_ends_under_a_queued_step_leaves_no_token_to_others(checkpoint: Path, core: EngineCore) -> None:
    """The step behind a grammar's end draws for the ended request too: that goes into no other request's row."""
    tight = make_core(checkpoint, max_running_requests=7)  # so that the last row is the table's last line
    params = SamplingParams(max_new_tokens=60, temperature=1.0, seed=4, ignore_eos=True)
    others = [Submit(f"other{i}", [7, 9, i + 3], 3, params, priority=1) for i in range(6)]
    ends = SamplingParams(max_new_tokens=60, seed=1, grammar=Grammar("regex", "[ab]{2,4}"))
    expected = answers(core, others)
    for number in range(6):
        first = Submit(f"first{number}", [5, 6, number + 3], 3, msgspec.structs.replace(ends, seed=number))
        tight.add(first)
        while not tight.stats.num_running:  # it has the first row, and the others the last
            tight.step()
        for other in others:
            tight.add(other)
        found = rest_of(tight, [first, *others])
        assert {other.id: found[other.id] for other in others} == expected


def test_masks_are_begun_as_tokens_are_read_and_sent_once(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the draw only a request's first mask is left to make, and the device hears of each mask once."""
    runner = core._runner
    assert isinstance(runner, MlxModelRunner)
    assert core._grammars._compiler is not None
    maker, late = core._grammars._compiler._filler(), 0
    real = Masks.fill

    def fill(self: Masks, matchers: dict[int, GrammarMatcher]) -> Any:
        nonlocal late
        before = self.computed
        found = real(self, matchers)
        late += self.computed - before
        return found

    monkeypatch.setattr(Masks, "fill", fill)
    runner._masks.reset()
    sent, computed = runner._masks.sent, maker.computed
    grammars = [Grammar("regex", r"[^a]{40,60}"), Grammar("regex", r"[^b]{40,60}"), None]
    params = [SamplingParams(max_new_tokens=20, seed=i, grammar=grammars[i % 3]) for i in range(9)]
    found = answers(core, [Submit(f"r{i}", [5, 6, i + 3], 3, p) for i, p in enumerate(params)])
    assert {len(tokens) for tokens, _ in found.values()} == {20}
    assert maker.computed - computed >= 6 * 20
    assert late == 6
    assert runner._masks.sent - sent <= 12
