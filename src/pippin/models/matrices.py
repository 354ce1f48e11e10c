"""The matrices of a model whose products can be computed in several ways, for ``kernels.measure_products``."""

from __future__ import annotations

import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU

from pippin.kernels import Weights
from pippin.models.joined import wholes
from pippin.models.seam import takes_pairs, weights_of


def matrices(model: nn.Module) -> list[Weights]:
    """Of quantized layers, those that are joined as one, and of layers of experts."""
    layers = [*wholes(model), *(module for _, module in model.named_modules())]
    found = [weights_of(m) for m in layers if isinstance(m, (nn.QuantizedLinear, nn.QuantizedEmbedding))]
    for module in layers:
        if isinstance(module, SwitchGLU):
            experts = (module.up_proj, module.gate_proj, module.down_proj)
            found += [weights_of(layer) for layer in experts if takes_pairs(layer)]
    return found
