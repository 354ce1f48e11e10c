"""``python -m pippin.bench_one_batch`` is ``pippin bench one-batch``, under the name that SGLang has for it."""

from __future__ import annotations

import sys

from pippin.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command(["bench", "one-batch", *sys.argv[1:]]))
