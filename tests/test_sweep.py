"""The table of docs/models.md is of every architecture that mlx-lm has, and none of it is silently different."""

from __future__ import annotations

from pathlib import Path

from sweep_models import CHECKS, Outcome, architectures, check, table

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
