"""``python -m pippin.launch_server`` is ``pippin serve``, under the name that SGLang has for it."""

from __future__ import annotations

import sys

from pippin.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "serve")
    main()
