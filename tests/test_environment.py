"""What ``pippin env`` prints, with MLX and without."""

from __future__ import annotations

import pytest

from pippin import __version__, environment
from pippin.backend import NoBackendError


def test_says_what_is_installed_and_where_it_runs() -> None:
    facts = environment.describe()
    assert facts["pippin"] == __version__
    assert facts["mlx"][0].isdigit()
    assert facts["memory"].endswith(" GiB")
    assert float(facts["memory"].split()[0]) > 0
    assert "rows" in facts["attention backends"]


def test_without_a_backend_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare() -> None:
        raise NoBackendError("install pippin[cpu]")

    monkeypatch.setattr(environment, "prepare", prepare)
    facts = environment.describe()
    assert facts["device"] == "none: install pippin[cpu]"
    assert "memory" not in facts


def test_a_package_that_is_not_there() -> None:
    assert environment.package_version("no-such-package-anywhere") == "not installed"
