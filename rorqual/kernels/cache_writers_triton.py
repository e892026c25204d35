"""The cache writers in Triton: one kernel each from a layer's projection to the stored bytes, one program a row.

They round where the model does (after the norm, after the turn), so that a cache holds the same entries whoever wrote it. The
8-bit values are made by integer arithmetic (`fp8_triton`), so that any GPU can keep an FP8 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.kernels.fp8_triton import power_of_two_scale, to_e4m3


@torch.no_grad()
def write_latents(cache: Tensor, slots: Tensor, projected: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> None:
    """The contract is that of `rorqual.kernels.write_latents`."""
    N, L, R, packed = len(slots), len(weight), 2 * cos.shape[1], cache.dtype == torch.uint8
    require_entries(cache, L + L // 32 + 2 * R if packed else L + R)
    if not N:
        return
    flat = cache.view(-1)
    scales, rope = (flat.view(torch.float32), flat.view(torch.bfloat16)) if packed else (flat, flat)
    latent_kernel[(N,)](
        projected.contiguous(), slots, weight, cos.contiguous(), sin.contiguous(), flat, scales, rope, eps,
        L=L, R=R, LP=max(128, triton.next_power_of_2(L)), RP=triton.next_power_of_2(R), PACKED=packed, num_warps=2,
    )  # fmt: skip


@torch.no_grad()
def write_index_keys(
    cache: Tensor, slots: Tensor, projected: Tensor, weight: Tensor, bias: Tensor, eps: float, cos: Tensor, sin: Tensor,
    *, interleaved: bool = False, hadamard: bool = False,
) -> None:  # fmt: skip
    """The contract is that of `rorqual.kernels.write_index_keys`."""
    N, C, packed = len(slots), projected.shape[1], cache.dtype == torch.uint8
    require_entries(cache, C + 4 if packed else C)
    if hadamard and C & (C - 1):
        raise ValueError(f"hadamard: expected a power of two of dims, found {C}")
    if not N:
        return
    flat = cache.view(-1)
    index_key_kernel[(N,)](
        projected.contiguous(), slots, weight, bias, cos.contiguous(), sin.contiguous(),
        flat, flat.view(torch.float32) if packed else flat, eps, cache.shape[1] if cache.dim() == 3 else 1,
        C=C, R=2 * cos.shape[1], CP=triton.next_power_of_2(C), STEPS=(C - 1).bit_length() if hadamard else 0,
        INTERLEAVED=interleaved, PACKED=packed, num_warps=1,
    )  # fmt: skip


def require_entries(cache: Tensor, expected: int) -> None:
    if cache.shape[-1] != expected:
        raise ValueError(f"cache: expected entries of {expected} for {cache.dtype}, found {cache.shape[-1]}")


@triton.jit
def _turned(own, other, column, COS, SIN, R: tl.constexpr, INTERLEAVED: tl.constexpr, there):
    """Each dim turned, from its own value and its partner's: a cos - b sin is the first of a pair, b cos + a sin the second."""
    pair = column // 2 if INTERLEAVED else column % (R // 2)
    is_first = column % 2 == 0 if INTERLEAVED else column < R // 2
    cos = tl.load(COS + pair, mask=there, other=0.0)
    sin = tl.load(SIN + pair, mask=there, other=0.0)
    return own * cos + tl.where(is_first, -other, other) * sin


@triton.jit
def latent_kernel(
    X, SLOTS, WEIGHT, COS, SIN, CACHE, SCALES, ROPE, eps,
    L: tl.constexpr, R: tl.constexpr, LP: tl.constexpr, RP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One row: CACHE, and in the packed layout the same bytes as float32 (SCALES) and as bfloat16 (ROPE)."""
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(SLOTS + n).to(tl.int64)
    if slot >= 0:
        dtype: tl.constexpr = X.dtype.element_ty
        column, r = tl.arange(0, LP), tl.arange(0, RP)
        row = X + n * (L + R)
        x = tl.load(row + column, mask=column < L, other=0.0).to(tl.float32)
        weight = tl.load(WEIGHT + column, mask=column < L, other=0.0).to(tl.float32)
        latent = (x / tl.sqrt_rn(tl.sum(x * x, 0) / L + eps) * weight).to(dtype)
        own = tl.load(row + L + r, mask=r < R, other=0.0).to(tl.float32)
        other = tl.load(row + L + (r ^ 1), mask=r < R, other=0.0).to(tl.float32)
        rope = _turned(own, other, r, COS + n * (R // 2), SIN + n * (R // 2), R, True, r < R).to(dtype)
        if PACKED:
            BYTES: tl.constexpr = L + L // 32 + 2 * R
            blocks = tl.reshape(latent.to(tl.float32), [LP // 128, 128])
            scale = power_of_two_scale(blocks)
            block = tl.arange(0, LP // 128)
            tl.store(CACHE + slot * BYTES + column, tl.reshape(to_e4m3(blocks / scale[:, None]), [LP]), mask=column < L)
            tl.store(SCALES + (slot * BYTES + L) // 4 + block, scale, mask=block < L // 128)
            tl.store(ROPE + (slot * BYTES + L + L // 32) // 2 + r, rope.to(tl.bfloat16), mask=r < R)
        else:
            out: tl.constexpr = CACHE.dtype.element_ty
            tl.store(CACHE + slot * (L + R) + column, latent.to(out), mask=column < L)
            tl.store(CACHE + slot * (L + R) + L + r, rope.to(out), mask=r < R)


@triton.jit
def _normalised(X, WEIGHT, BIAS, column, mean, deviation, there):
    """The layer norm's output at some dims, rounded to X's dtype as the model rounds it, in float32."""
    x = tl.load(X + column, mask=there, other=0.0).to(tl.float32)
    weight = tl.load(WEIGHT + column, mask=there, other=0.0).to(tl.float32)
    bias = tl.load(BIAS + column, mask=there, other=0.0).to(tl.float32)
    return ((x - mean) / deviation * weight + bias).to(X.dtype.element_ty).to(tl.float32)


@triton.jit
def index_key_kernel(
    X, SLOTS, WEIGHT, BIAS, COS, SIN, CACHE, SCALES, eps, page,
    C: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, STEPS: tl.constexpr, INTERLEAVED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One row: CACHE, and in the packed layout the same bytes as float32 (SCALES)."""
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(SLOTS + n).to(tl.int64)
    if slot >= 0:
        dtype: tl.constexpr = X.dtype.element_ty
        column = tl.arange(0, CP)
        there = column < C
        x = tl.load(X + n * C + column, mask=there, other=0.0).to(tl.float32)
        mean = tl.sum(x, 0) / C
        centred = tl.where(there, x - mean, 0.0)
        deviation = tl.sqrt_rn(tl.sum(centred * centred, 0) / C + eps)
        own = _normalised(X + n * C, WEIGHT, BIAS, column, mean, deviation, there)
        partner = column ^ 1 if INTERLEAVED else tl.where(column < R // 2, column + R // 2, column - R // 2)
        turns = column < R
        other = _normalised(X + n * C, WEIGHT, BIAS, partner, mean, deviation, turns)
        turned = _turned(own, other, column, COS + n * (R // 2), SIN + n * (R // 2), R, INTERLEAVED, turns)
        key = tl.where(turns, turned, own).to(dtype)
        if STEPS > 0:
            key = _hadamard(key.to(tl.float32), C, STEPS).to(dtype)
        if PACKED:
            whole = tl.reshape(key.to(tl.float32), [1, CP])
            scale = power_of_two_scale(whole)
            base = slot // page * page * (C + 4)
            tl.store(CACHE + base + slot % page * C + column, tl.reshape(to_e4m3(whole / scale[:, None]), [CP]), mask=there)
            tl.store(SCALES + (base + page * C) // 4 + slot % page + tl.arange(0, 1), scale)
        else:
            tl.store(CACHE + slot * C + column, key.to(CACHE.dtype.element_ty), mask=there)


@triton.jit
def _hadamard(x, C: tl.constexpr, STEPS: tl.constexpr):
    """The orthonormal Walsh-Hadamard transform of x [C], C = 2^STEPS, in the order of the plain form."""
    for step in tl.static_range(STEPS):
        pairs = tl.reshape(x, [C >> (step + 1), 2, 1 << step])
        a, b = tl.split(tl.permute(pairs, (0, 2, 1)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), [C])
    return x * (C**-0.5)
