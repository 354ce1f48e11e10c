"""The correctness test finds what differs, and says where; what is right passes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.checkpoint import SMALL, make_checkpoint
from pippin.bench.correctness import PROMPTS, Difference, differences
from pippin.bench.runner import Prompts, Timing
from pippin.bench.sides import Measured, Side, open_ours, peer
from pippin.cli import run_command
from pippin.config import EngineConfig
from pippin.flight import Flight
from pippin.messages import ModelInfo
from pippin.types import Batch

Lines = pytest.CaptureFixture[str]
answers = st.lists(st.integers(0, 5), max_size=5)


@given(st.lists(st.tuples(answers, answers), max_size=4))
def test_differences_are_the_first_ones(pairs: list[tuple[list[int], list[int]]]) -> None:
    found = {d.prompt: d for d in differences([a for a, _ in pairs], [b for _, b in pairs])}
    assert set(found) == {i for i, (a, b) in enumerate(pairs) if a != b}
    for d in found.values():
        a, b = pairs[d.prompt]
        assert a[: d.at] == b[: d.at]
        assert a[d.at : d.at + 1] == ([] if d.ours is None else [d.ours])
        assert b[d.at : d.at + 1] == ([] if d.theirs is None else [d.theirs])
        assert d.ours != d.theirs


def test_an_answer_that_ends_early_differs_at_its_end() -> None:
    assert list(differences([[1, 2]], [[1]])) == [Difference(0, 1, 2, None)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("correct") / "model", SMALL)


def test_ours_and_mlx_lm_agree(capfd: Lines) -> None:
    command = "bench one-batch --correctness-test --vs mlx-lm --output-len 24 --chunked-prefill-size 5 --page-size 4"
    assert run_command(command.split()) == 0
    captured = capfd.readouterr()
    result = json.loads(captured.out)
    assert result["kind"] == "correctness"
    assert result["settings"]["dtype"] == "float32"
    assert result["figures"] == {"prompts": len(PROMPTS), "equal": len(PROMPTS), "first_difference": None}
    assert f"pippin and mlx-lm: {len(PROMPTS)} of {len(PROMPTS)} answers of 24 tokens are equal" in captured.err


@pytest.mark.parametrize("cut", [0, 1, 4, 99])
def test_a_cut_prompt_is_computed_in_two_steps_and_answered_alike(checkpoint: Path, cut: int) -> None:
    ours = open_ours(EngineConfig(str(checkpoint), max_total_tokens=100, max_running_requests=3), lambda _: None)
    prompts = [[5, 9, 300, 41, 7], [11], [8, 2]]
    expected = ours.side.run(prompts, 6).timing.tokens
    works: list[list[tuple[int, int]]] = []
    launch = ours.runner.launch

    class Noting:
        """Passes on, and notes what each step computes."""

        def launch(self, batch: Batch) -> Flight:
            works.append([(w.start, w.end) for w in batch.works])
            return launch(batch)

        def reset(self) -> None:
            ours.runner.reset()

    with ours.engine.cutting(cut), ours.engine.over(Noting()):
        assert ours.side.run(prompts, 6).timing.tokens == expected
    starts = {0: [[(0, 5), (0, 1), (0, 2)]], 1: [[(0, 1), (0, 1)], [(1, 5), (0, 1), (1, 2)]]}
    four = [[(0, 4), (0, 1)], [(4, 5), (0, 1), (1, 2)]]
    assert works[: 2 if cut else 1] == starts.get(cut, four)


class Wrong:
    """A side that gives another's answers, with one token changed."""

    name = "wrong"

    def __init__(self, right: Side, prompt: int, at: int) -> None:
        self._right, self._left, self._at = right, prompt, at

    def run(self, prompts: Prompts, output_len: int) -> Measured:
        tokens = self._right.run(prompts, output_len).timing.tokens
        tokens[0][self._at] += self._left == 0
        self._left -= 1
        return Measured(Timing(1.0, [1.0], tokens), None, 1)


def test_one_wrong_token_is_named_and_status_1(
    checkpoint: Path, tmp_path: Path, capfd: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def wrong(name: str, config: EngineConfig, info: ModelInfo) -> Iterator[Side]:
        with peer(name, config, info) as side:
            yield Wrong(side, 1, 3)

    monkeypatch.setattr("pippin.bench.correctness.peer", wrong)
    file, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    file.write_text("bafito kelo\n\n  mun\n")
    command = ["--correctness-test", "--prompt-filename", str(file), "--result-filename", str(out), "--vs", "mlx-lm"]
    assert run_command(["bench", "one-batch", "--model-path", str(checkpoint), "--output-len", "6", *command]) == 1
    assert json.loads(out.read_text())["figures"] == {"prompts": 2, "equal": 1, "first_difference": [1, 3]}
    said = capfd.readouterr().err
    assert "prompt 2, token 4 of the answer" in said
    assert "pippin and wrong: 1 of 2 answers of 6 tokens are equal" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "can't be read"), (" \n\n", "holds no prompt"), ("a " * 9000, "the context has 8192")],
)
def test_prompts_that_can_t_be_used_are_one_line_and_status_2(
    checkpoint: Path, tmp_path: Path, content: str | None, said: str, capsys: Lines
) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_text(content)
    command = ["bench", "one-batch", "--correctness-test", "--model-path", str(checkpoint)]
    assert run_command([*command, "--prompt-filename", str(file)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("pippin: --prompt-filename: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1
