"""Whether a model can be served, found out in a process aside: who asks serves another meanwhile.

The process reads the model's configuration and the headers of its files, downloads what is missing, and plans its
memory. It computes nothing.
"""

from __future__ import annotations

import asyncio
import pkgutil
import sys
from asyncio.subprocess import PIPE
from collections.abc import Callable

import msgspec

from pippin.backend import leave_torch_out
from pippin.config import EngineConfig
from pippin.errors import ConfigError, EngineError, ModelError, PippinError
from pippin.logs import configure
from pippin.messages import Fatal

ESTIMATE = "pippin.estimate:estimate"
"""What the process calls, which loads MLX."""


async def check(config: EngineConfig) -> None:
    """Raises ModelError or ConfigError where the model can't be served, EngineError if that can't be found out.

    What runs on torch is looked at when it is loaded, and not here.
    """
    if config.device.startswith("torch"):
        return
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "pippin.preflight", stdin=PIPE, stdout=PIPE
    )
    try:
        said, _ = await process.communicate(msgspec.json.encode(config))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise EngineError(f"the model can't be looked at: that process ended with status {process.returncode}")
    verdict = msgspec.json.decode(said, type=Fatal | None)
    if verdict is not None:
        raise {"ModelError": ModelError, "ConfigError": ConfigError}.get(verdict.kind, EngineError)(verdict.message)


def verdict_on(config: EngineConfig) -> Fatal | None:
    """Why a model can't be served; None if nothing speaks against it."""
    estimate: Callable[[EngineConfig], object] = pkgutil.resolve_name(ESTIMATE)
    try:
        estimate(config)
    except PippinError as error:
        return Fatal(type(error).__name__, str(error))
    return None


def main() -> None:
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    leave_torch_out()
    configure("warning", text="%(levelname)s: %(name)s: %(message)s")
    sys.stdout.buffer.write(msgspec.json.encode(verdict_on(config)))


if __name__ == "__main__":
    main()
