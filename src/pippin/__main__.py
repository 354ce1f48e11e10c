"""``python -m pippin`` is the ``pippin`` command."""

from pippin.cli import main

if __name__ == "__main__":
    main()
