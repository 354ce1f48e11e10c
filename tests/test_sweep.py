"""The table of docs/models.md is of every architecture that mlx-lm has, and none of it is silently different."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from sweep_models import CHECKS, Outcome, _margin, architectures, check, table

PAGE = Path(__file__).parents[1] / "docs" / "models.md"


def test_every_architecture_is_in_the_table_and_none_differs() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    listed = {row.split(" | ")[0].removeprefix("| ") for row in rows}
    assert set(architectures()) <= listed
    assert "differs" not in PAGE.read_text().partition("sweep: begin")[2]


def test_an_outcome_says_what_differs_and_what_was_refused() -> None:
    fine = Outcome("a", "rows", checks=dict.fromkeys(CHECKS, True))
    wrong = Outcome("b", "solo", state_bytes=12, checks=dict.fromkeys(CHECKS, True) | {"chunked": False})
    text = table([Outcome("c", refusal="it is odd"), wrong, fine])
    assert text.startswith("2 architectures served, 1 not.")
    assert [line.split(" | ")[0] for line in text.splitlines()[-3:]] == ["| a", "| b", "| c"]
    assert text.count("**differs**") == 1
    assert "it is odd" in text


def test_an_architecture_goes_through_every_check() -> None:
    outcome = check("mamba2")
    assert (outcome.backend, outcome.refusal) == ("solo", "")
    assert outcome.checks == dict.fromkeys(CHECKS, True)
    assert outcome.state_bytes > 0


class Router:
    """Chooses two of four experts for each token, by scores that are given, and tokens by a margin of 0.5."""

    def __init__(self, scores: list[float], kth: int) -> None:
        self.scores, self.kth = mx.array([scores]), kth

    def make_cache(self) -> list[object]:
        return []

    def __call__(self, tokens: mx.array, cache: object) -> mx.array:
        mx.argpartition(self.scores, kth=self.kth, axis=-1)
        return mx.broadcast_to(mx.array([1.0, 3.5, 3.0]), (*tokens.shape, 3))


@pytest.mark.parametrize(
    ("scores", "kth", "margin"),
    [
        ([-0.9, -0.5, -0.49, -0.1], 1, 0.01),
        ([0.9, 0.5, 0.49, 0.1], -2, 0.01),
        ([0.9, 0.89, 0.1, 0.0], -2, 0.5),
        ([0.9, 0.5, 0.5, 0.1], -2, 0.5),
    ],
)
def test_the_nearest_choice_is_found(scores: list[float], kth: int, margin: float) -> None:
    partition = mx.argpartition
    assert _margin(Router(scores, kth), [5, 6], [7, 8, 9]) == pytest.approx(margin, abs=1e-6)
    assert mx.argpartition is partition
