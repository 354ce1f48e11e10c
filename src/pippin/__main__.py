"""``python -m pippin`` is the ``pippin`` command."""

from __future__ import annotations

from typing import NoReturn

from pippin.interrupts import silent


def main() -> NoReturn:
    """The console script."""
    with silent():
        from pippin import cli

    cli.main()


if __name__ == "__main__":
    main()
