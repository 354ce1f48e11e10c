"""One thread for torch: its threads wait by spinning, which beside MLX's on few cores takes ten times as long."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
