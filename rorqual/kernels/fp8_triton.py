"""Block FP8 in Triton: quantise, multiply, and the 8-bit conversions that other kernels share.

The conversions are integer arithmetic on the float's bits, so they run on GPUs without FP8 units too and in the interpreter, and
round exactly as PyTorch does (to nearest, ties to even).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power_of_two_scale(blocks):
    """The UE8M0 scale of each row of blocks float32 [B, 128]: max(|x|, 1e-4) / 448 rounded up to a power of two -> [B].

    A NaN or an infinity makes the scale infinite, so that what is read back is not finite either.
    """
    size = tl.where(blocks == blocks, tl.abs(blocks), float("inf"))
    bits = tl.div_rn(tl.maximum(tl.max(size, 1), 1e-4), 448.0).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def to_e4m3(x):
    """float32 -> the bits of e4m3 (uint8), clamped to +-448, to nearest, ties to even; NaN to NaN."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(x), 448.0)
    wide = size.to(tl.int32, bitcast=True)
    normal = ((wide + 0x7FFFF + ((wide >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the step is 2^-9, the last bit of 16384: the addition rounds.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(x == x, code, 0x7F)
    return (((bits >> 24) & 0x80) | code).to(tl.uint8)


@triton.jit
def from_e4m3(code):
    """The bits of e4m3 (uint8) -> float32, exactly. As float16 the bits shifted by one mean 2^-8 of the value."""
    wide = code.to(tl.int16)
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
