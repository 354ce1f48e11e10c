"""``python -m pippin.bench_serving`` is ``pippin bench serving``, under the name that SGLang has for it."""

from __future__ import annotations

import sys

from pippin.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command(["bench", "serving", *sys.argv[1:]]))
