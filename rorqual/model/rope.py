"""Rotary positions (RoPE), their extension (YaRN), and the softmax scale that goes with it: spec of the release, section 1.4.

Two layouts stand side by side, and to mix them up is the published demo's bug: MLA rotates INTERLEAVED pairs (x0, x1),
(x2, x3), ...; the indexer rotates HALF-SPLIT pairs (x_i, x_{i + R/2}).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.kernels.rowwise import turn_half_split, turn_interleaved
from rorqual.model.config import ModelConfig, YarnConfig


@dataclass(frozen=True)
class Rotation:
    """cos and sin of each row's angles, float32 [N, R/2]."""

    cos: Tensor
    sin: Tensor


def rotation(positions: Tensor, config: ModelConfig) -> Rotation:
    """The angles of `positions` [N] (any integer or float dtype), in float32."""
    angles = positions.float()[:, None] * frequencies(config, positions.device)  # [N, R/2]
    magnitude = rope_magnitude(config)
    return Rotation(angles.cos() * magnitude, angles.sin() * magnitude)


def frequencies(config: ModelConfig, device: torch.device | str | None = None) -> Tensor:
    """Radians per position, float32 [R/2]: theta^(-2i/R), stretched by YaRN where the config has it."""
    dims = config.qk_rope_head_dim
    plain = 1.0 / config.rope_theta ** (torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims)
    return plain if config.yarn is None else _stretched(plain, config.rope_theta, dims, config.yarn)


def _stretched(plain: Tensor, theta: float, dims: int, yarn: YarnConfig) -> Tensor:
    """YaRN: fast dims keep their frequency, slow dims are divided by the factor, a linear ramp lies between."""
    low = max(math.floor(_turning_dim(yarn.beta_fast, theta, dims, yarn)), 0)
    high = min(math.ceil(_turning_dim(yarn.beta_slow, theta, dims, yarn)), dims - 1)
    span = max(high - low, 0.001)
    ramp = ((torch.arange(dims // 2, dtype=torch.float32, device=plain.device) - low) / span).clamp(0, 1)
    return plain * (1 - ramp) + plain / yarn.factor * ramp


def _turning_dim(turns: float, theta: float, dims: int, yarn: YarnConfig) -> float:
    """The (fractional) dim that makes `turns` turns over the original context."""
    return dims * math.log(yarn.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))


def softmax_scale(config: ModelConfig) -> float:
    """qk_head_dim^-0.5, times m^2 where YaRN is on; m = 0.1 mscale_all_dim ln(factor) + 1."""
    scale = config.qk_head_dim**-0.5
    return scale * _mscale(config.yarn, config.yarn.mscale_all_dim) ** 2 if config.yarn else scale


def rope_magnitude(config: ModelConfig) -> float:
    """The factor on cos and sin: m(mscale) / m(mscale_all_dim), which is 1 in the release."""
    yarn = config.yarn
    return _mscale(yarn, yarn.mscale) / _mscale(yarn, yarn.mscale_all_dim) if yarn else 1.0


def _mscale(yarn: YarnConfig, mscale: float) -> float:
    return 0.1 * mscale * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0


def rotate_interleaved(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the pairs (x0, x1), (x2, x3), ... of x [N, ..., R], in float32, back to x's dtype."""
    return turn_interleaved(x, rotation.cos, rotation.sin)


def rotate_half_split(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the pairs (x_i, x_{i + R/2}) of x [N, ..., R], in float32, back to x's dtype."""
    return turn_half_split(x, rotation.cos, rotation.sin)
