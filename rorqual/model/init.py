"""How weights are drawn before training.

Every matrix is normal with standard deviation init_std (0.006 in DeepSeek-V3's pre-training), norms are 1, biases 0. The
report does not say how the indexer begins; it is drawn like the rest, so its scores start near zero and without a preference.
"""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def init_weights(model: nn.Module, std: float, seed: int) -> None:
    """Draw all weights, in the order in which the model names them, from `seed` alone; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    for buffer in model.buffers():
        buffer.zero_()
