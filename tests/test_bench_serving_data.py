"""Datasets: seeded, of the lengths asked for, with prefixes that are really shared; files in ShareGPT's form."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.bench.serving_data import Conversation, Ruler, make_dataset
from pippin.bench.serving_options import DATASETS, DatasetOptions
from pippin.errors import ConfigError
from pippin.text.tokenizer import demo_path, load_tokenizer


class Words:
    """A codec whose tokens are words."""

    def __init__(self) -> None:
        self.known: list[str] = []

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.known += [w for w in text.split() if w not in self.known]
        return [self.known.index(w) for w in text.split()]

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.known[t] + " " for t in tokens)


rulers = st.sampled_from([Ruler(1.0), Ruler(codec=Words()), Ruler(vocab_size=4096)])
SIZES: dict[str, Any] = {
    "random_input_len": 20, "random_output_len": 9, "gsp_num_groups": 3, "gsp_prompts_per_group": 4,
    "gsp_system_prompt_len": 12, "gsp_question_len": 5, "num_documents": 3, "document_len": 30,
    "questions_per_document": 2, "question_len": 4, "num_turns": 3,
}  # fmt: skip


def options(name: str, **others: Any) -> DatasetOptions:
    return DatasetOptions(dataset_name=name, **(SIZES | others))


def length(ruler: Ruler, prompt: str | list[int]) -> int:
    return ruler.tokens(prompt) if isinstance(prompt, str) else len(prompt)


def prompts(made: list[Conversation]) -> list[Any]:
    return [turn.prompt for one in made for turn in one.turns]


@given(st.sampled_from(["random", "generated-shared-prefix", "long-document", "multi-turn"]), rulers, st.integers())
def test_a_seed_gives_the_same_again(name: str, ruler: Ruler, seed: int) -> None:
    made = make_dataset(options(name), 6, seed, ruler)
    assert made == make_dataset(options(name), 6, seed, ruler)
    assert made != make_dataset(options(name), 6, seed + 1, ruler)


@given(rulers, st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers())
def test_random_lengths_are_in_their_range(ruler: Ruler, asked: int, answer: int, ratio: float, seed: int) -> None:
    chosen = options("random", random_input_len=asked, random_output_len=answer, random_range_ratio=ratio)
    for one in make_dataset(chosen, 8, seed, ruler):
        (turn,) = one.turns
        assert max(1, int(asked * ratio)) <= length(ruler, turn.prompt) <= asked
        assert max(1, int(answer * ratio)) <= turn.output_len <= answer
        assert not turn.warm


def test_lengths_by_a_real_tokenizer() -> None:
    tokenizer = load_tokenizer(demo_path())
    ruler, rng = Ruler(codec=tokenizer), random.Random(0)
    found = [(n, ruler.tokens(str(ruler.prompt(rng, n)))) for n in (1, 7, 100, 512)]
    assert all(abs(n - tokens) <= 2 for n, tokens in found), found


@given(rulers, st.integers(), st.integers(1, 4), st.integers(1, 5))
def test_groups_share_their_beginning_and_no_more(ruler: Ruler, seed: int, groups: int, each: int) -> None:
    chosen = options("generated-shared-prefix", gsp_num_groups=groups, gsp_prompts_per_group=each)
    made = make_dataset(chosen, 1, seed, ruler)
    assert len(made) == groups * each
    beginnings: dict[object, set[object]] = {}
    for one in made:
        (turn,) = one.turns
        assert turn.output_len == chosen.gsp_output_len
        words = turn.prompt.split() if isinstance(turn.prompt, str) else turn.prompt
        assert len(words) == chosen.gsp_system_prompt_len + chosen.gsp_question_len
        beginnings.setdefault(one.group, set()).add(tuple(words[: chosen.gsp_system_prompt_len]))
    assert [len(b) for b in beginnings.values()] == [1] * groups
    assert len(set.union(*beginnings.values())) == groups
    assert sum(one.turns[0].warm for one in made) == groups * (each - 1)


@given(rulers, st.integers())
def test_documents_are_all_cold_and_then_all_warm(ruler: Ruler, seed: int) -> None:
    made = make_dataset(options("long-document"), 1, seed, ruler)
    assert [one.turns[0].warm for one in made] == [False] * 3 + [True] * 3
    for cold, warm in zip(made[:3], made[3:], strict=True):
        cut = 30 if isinstance(cold.turns[0].prompt, list) else len(" ".join(str(cold.turns[0].prompt).split()[:30]))
        assert cold.turns[0].prompt[:cut] == warm.turns[0].prompt[:cut]
        assert cold.turns[0].prompt != warm.turns[0].prompt


@given(st.integers(), st.integers(1, 5), st.sampled_from([0.0, 0.5, 3.0]))
def test_chats_have_their_turns_and_pauses(seed: int, turns: int, think: float) -> None:
    made = make_dataset(options("multi-turn", num_turns=turns, think_time=think), 4, seed, Ruler(1.0))
    assert [len(one.turns) for one in made] == [turns] * 4
    for one in made:
        assert [t.warm for t in one.turns] == [False] + [True] * (turns - 1)
        assert one.turns[0].pause == 0
        assert all((t.pause > 0) == (think > 0) for t in one.turns[1:])


SHAREGPT = [
    {"id": "a", "conversations": [
        {"from": "human", "value": "one two three"}, {"from": "gpt", "value": "four five"},
        {"from": "human", "value": "six"}, {"from": "gpt", "value": "seven eight nine ten"}]},
    {"id": "only a system prompt", "conversations": [{"from": "system", "value": "x"}]},
    {"id": "no answer", "conversations": [{"from": "human", "value": "hello"}]},
    {"id": "empty", "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "y"}]},
    {"messages": [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "yes"}]},
    {"id": "strange", "conversations": "none"}, 7,
]  # fmt: skip


@pytest.mark.parametrize("lines", [False, True])
def test_a_file_in_sharegpts_form(tmp_path: Path, lines: bool) -> None:
    path = tmp_path / "chats.json"
    path.write_text("\n".join(map(json.dumps, SHAREGPT)) if lines else json.dumps(SHAREGPT))
    ruler = Ruler(1.0)
    made = make_dataset(options("sharegpt", dataset_path=str(path)), 4, 0, ruler)
    assert sorted({(str(t.prompt), t.output_len) for one in made for t in one.turns}) == [
        ("hi there", 1),
        ("one two three", 2),
    ]
    chats = make_dataset(options("multi-turn", dataset_path=str(path), num_turns=9), 2, 0, ruler)
    assert sorted([(str(t.prompt), t.output_len) for t in one.turns] for one in chats) == [
        [("hi there", 1)],
        [("one two three", 2), ("six", 4)],
    ]
    short = make_dataset(options("sharegpt", dataset_path=str(path), sharegpt_context_len=4), 3, 0, ruler)
    assert set(prompts(short)) == {"hi there"}
    fixed = make_dataset(options("sharegpt", dataset_path=str(path), sharegpt_output_len=5), 3, 0, ruler)
    assert {t.output_len for one in fixed for t in one.turns} == {5}


@pytest.mark.parametrize("content", ["", "[]", "{", '[{"conversations": []}]', "\x00\xff", "[[[1]]]"])
def test_a_file_with_nothing_to_ask_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(os.fsencode(content))
    with pytest.raises(ConfigError, match="--dataset-path"):
        make_dataset(options("sharegpt", dataset_path=str(path)), 4, 0, Ruler(1.0))
    with pytest.raises(ConfigError, match="can't be read"):
        make_dataset(options("sharegpt", dataset_path=str(tmp_path / "none")), 4, 0, Ruler(1.0))


def test_every_dataset_is_made(tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    path.write_text(json.dumps(SHAREGPT))
    for name in DATASETS:
        assert make_dataset(options(name, dataset_path=str(path)), 2, 0, Ruler(1.0))


@pytest.mark.parametrize("name", ["multi-turn", "sharegpt"])
def test_token_ids_are_for_datasets_of_random_words(name: str) -> None:
    with pytest.raises(ConfigError, match="--tokenize-prompt"):
        make_dataset(options(name, tokenize_prompt=True, dataset_path="x"), 4, 0, Ruler(vocab_size=100))
