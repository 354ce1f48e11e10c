"""``python -m pippin.check_env`` is ``pippin env``, under the name that SGLang has for it."""

from __future__ import annotations

import sys

from pippin.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command(["env", *sys.argv[1:]]))
