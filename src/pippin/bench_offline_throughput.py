"""``python -m pippin.bench_offline_throughput`` is ``pippin bench offline``, under the name that SGLang has for it."""

from __future__ import annotations

import sys

from pippin.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command(["bench", "offline", *sys.argv[1:]]))
