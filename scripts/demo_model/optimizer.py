"""Muon for the matrices inside the blocks, AdamW for the embedding and the norms.

Muon: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from demo_model.network import Network


def orthogonalize(matrices: Tensor) -> Tensor:
    """[count, rows, columns] -> near-orthogonal ones of the same row and column spaces (Newton-Schulz, 5 steps)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    flipped = x.shape[1] > x.shape[2]
    x = x.mT if flipped else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if flipped else x


class Muon:
    """Steps along the orthogonalized momentum; matrices of one shape go through it together."""

    def __init__(self, matrices: Iterable[nn.Parameter], momentum: float = 0.95, decay: float = 0.02) -> None:
        groups = defaultdict(list)
        for matrix in matrices:
            groups[matrix.shape].append(matrix)
        self.groups = list(groups.values())
        self.velocities = [torch.stack([torch.zeros_like(p) for p in group]) for group in self.groups]
        self.momentum, self.decay = momentum, decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for group, velocity in zip(self.groups, self.velocities, strict=True):
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            velocity.lerp_(gradient, 1 - self.momentum)
            update = orthogonalize(gradient.lerp(velocity, self.momentum)).float()
            rows, columns = group[0].shape
            torch._foreach_mul_(group, 1 - rate * self.decay)
            torch._foreach_add_(group, list(update), alpha=-rate * max(1.0, rows / columns) ** 0.5)


class Optimizer:
    """Both, with one schedule: ``step(scale)`` multiplies each one's own rate."""

    def __init__(self, network: Network, muon_rate: float = 0.02, adam_rate: float = 0.002) -> None:
        matrices = [p for p in network.layers.parameters() if p.ndim == 2]
        others = [p for p in network.parameters() if all(p is not m for m in matrices)]
        self.muon, self.muon_rate = Muon(matrices), muon_rate
        self.adam_rate = adam_rate
        fused = others[0].is_cuda
        self.adam = torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)

    def step(self, scale: float) -> None:
        self.muon.step(self.muon_rate * scale)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_rate * scale
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        for matrices in self.muon.groups:
            for matrix in matrices:
                matrix.grad = None
