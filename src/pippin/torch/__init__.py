"""What needs PyTorch: the reference runner, the tensor bridge, norms by MLX for torch tensors, ``.bin`` checkpoints.

torch comes with the extra ``torch`` and is imported by the modules of this package alone, never by the package itself.
"""

from __future__ import annotations

from importlib.util import find_spec

from pippin.errors import ConfigError


def require_torch(option: str) -> None:
    """Raises ConfigError, naming the extra, if torch is not installed; ``option`` is what asked for it."""
    if find_spec("torch") is None:
        raise ConfigError("this needs PyTorch, which is not installed: pip install 'pippin[torch]'", option)
