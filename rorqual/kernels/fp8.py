"""Block FP8 (e4m3) as the released weights and caches use it: quantise, dequantise, multiply, pack.

Scales multiply: value = fp8 * scale. With power_of_two (UE8M0, as V3.1 and later) a scale is rounded up to a power of two, so
that dequantising is exact but for the 8-bit values themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.dispatch import triton_form

BLOCK = 128
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
MIN_AMAX = 1e-4
"""The least largest magnitude of a block that a scale is made for, as in the released code."""


def block_scale(amax: Tensor, power_of_two: bool) -> Tensor:
    """The scale of blocks of largest magnitude `amax` (float32, any shape): amax / 448, rounded up to a power of two if asked."""
    scale = amax.float().clamp_min(MIN_AMAX) / FP8_MAX
    return round_up_to_power_of_two(scale) if power_of_two else scale


def round_up_to_power_of_two(scale: Tensor) -> Tensor:
    """2^ceil(log2(scale)) for positive normal float32, exact: from the exponent field, plus one where the mantissa is not 0."""
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa 2^exponent, mantissa in [0.5, 1)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))


def quantize_activation(x: Tensor, power_of_two: bool = True, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Per row and block of 128 along the last dim: x [..., K] -> float8_e4m3fn [..., K], scale float32 [..., ceil(K / 128)]."""
    return (triton_form("quantize_activation", x, file="fp8") or quantize_activation_plain)(x, power_of_two, block)


def quantize_activation_plain(x: Tensor, power_of_two: bool = True, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    K = x.shape[-1]
    blocks = F.pad(x.float(), (0, -K % block)).unflatten(-1, (-1, block))
    scale = block_scale(blocks.abs().amax(-1), power_of_two)
    values = (blocks / scale.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX).flatten(-2)[..., :K]
    return values.to(FP8), scale


def dequantize_activation(values: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32, block: int = BLOCK) -> Tensor:
    """The inverse of `quantize_activation`: float8 [..., K], scale [..., ceil(K / 128)] -> [..., K]."""
    return (values.float() * scale.repeat_interleave(block, -1)[..., : values.shape[-1]]).to(dtype)


def quantize_weight(weight: Tensor, power_of_two: bool = True, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Blocks of 128 x 128: weight [..., M, K] -> float8_e4m3fn [..., M, K], `weight_scale_inv` float32 [..., M / 128, K / 128].

    Edge blocks are those of the zero-padded weight, so their scales count up (ceil).
    """
    return (triton_form("quantize_weight", weight, file="fp8") or quantize_weight_plain)(weight, power_of_two, block)


def quantize_weight_plain(weight: Tensor, power_of_two: bool = True, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    M, K = weight.shape[-2:]
    padded = F.pad(weight.float(), (0, -K % block, 0, -M % block))
    blocks = padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, block))  # [..., M/128, 128, K/128, 128]
    scale = block_scale(blocks.abs().amax((-3, -1)), power_of_two)  # [..., M/128, K/128]
    values = (blocks / scale[..., :, None, :, None]).clamp(-FP8_MAX, FP8_MAX)
    return values.flatten(-2).flatten(-3, -2)[..., :M, :K].to(FP8).contiguous(), scale


def dequantize_weight(values: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32, block: int = BLOCK) -> Tensor:
    """float8 [..., M, K] and its scales [..., ceil(M / 128), ceil(K / 128)] -> [..., M, K]."""
    M, K = values.shape[-2:]
    expected = (*values.shape[:-2], -(-M // block), -(-K // block))
    if scale.shape != expected:
        raise ValueError(f"scale: expected shape {list(expected)} for a weight {list(values.shape)}, found {list(scale.shape)}")
    by_row = scale.repeat_interleave(block, -2)[..., :M, :]
    return (values.float() * by_row.repeat_interleave(block, -1)[..., :K]).to(dtype)


def fp8_matmul(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The released FP8 product: a float8 [N, K] by rows and blocks, b float8 [M, K] by blocks -> a b^T [N, M].

    Each 128-wide block of K is multiplied in float32 and added, times a_scale[n, block] b_scale[m / 128, block], into a second
    float32 accumulator, in the order of the blocks.
    """
    return (triton_form("fp8_matmul", a, a_scale, b, b_scale, file="fp8") or fp8_matmul_plain)(a, a_scale, b, b_scale, dtype)


def fp8_matmul_plain(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    N, K = a.shape
    by_row = b_scale.repeat_interleave(BLOCK, 0)[: len(b)]  # [M, K/128]
    out = torch.zeros(N, len(b), dtype=torch.float32, device=a.device)
    for block, low in enumerate(range(0, K, BLOCK)):
        part = a[:, low : low + BLOCK].float() @ b[:, low : low + BLOCK].float().t()
        out.addcmul_(part, a_scale[:, block : block + 1] * by_row[:, block])
    return out.to(dtype)


def pack_index_key(key: Tensor) -> Tensor:
    """Index keys [..., C] -> uint8 [..., C + 4]: C e4m3 values and a float32 power-of-two scale (132 bytes)."""
    values, scale = quantize_activation(key, block=key.shape[-1])
    return torch.cat([values.view(torch.uint8), bytes_of(scale)], -1)


def unpack_index_key(packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `pack_index_key`, up to rounding to e4m3: uint8 [..., C + 4] -> [..., C]."""
    C = packed.shape[-1] - 4
    values = packed[..., :C].contiguous().view(FP8)
    return dequantize_activation(values, packed[..., C:].contiguous().view(torch.float32), dtype, block=C)


def pack_latent(latent: Tensor, rope: Tensor) -> Tensor:
    """A cache entry as FlashMLA lays it out: latent [..., L], rope [..., R] -> uint8 [..., L + 4 L / 128 + 2 R] (656 bytes).

    L e4m3 values, one float32 power-of-two scale per 128 of them, then R bfloat16, unquantised.
    """
    if latent.shape[-1] % BLOCK:
        raise ValueError(f"latent: expected a multiple of {BLOCK} values, found {latent.shape[-1]}")
    values, scale = quantize_activation(latent)
    return torch.cat([values.view(torch.uint8), bytes_of(scale), bytes_of(rope.to(torch.bfloat16))], -1)


def bytes_of(x: Tensor) -> Tensor:
    """x [..., D] -> uint8 [..., D * itemsize]."""
    return (
        x.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        if x.numel()
        else x.new_empty(*x.shape[:-1], x.shape[-1] * x.itemsize, dtype=torch.uint8)
    )


def unpack_latent(packed: Tensor, latent_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_latent`, up to rounding: uint8 [..., bytes] -> latent [..., latent_dim], rope [..., R]."""
    values, scale, rope = packed.split(
        [latent_dim, 4 * latent_dim // BLOCK, packed.shape[-1] - latent_dim - 4 * latent_dim // BLOCK], -1
    )
    latent = dequantize_activation(values.contiguous().view(FP8), scale.contiguous().view(torch.float32), dtype)
    return latent, rope.contiguous().view(torch.bfloat16).to(dtype)
