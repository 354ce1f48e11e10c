"""``python -m pippin.launch_server`` is ``pippin serve``, under the name that SGLang has for it."""

from __future__ import annotations

import sys

from pippin.interrupts import silent

if __name__ == "__main__":
    with silent():
        from pippin.cli import serve_from_args

    sys.exit(serve_from_args(sys.argv[1:]))
