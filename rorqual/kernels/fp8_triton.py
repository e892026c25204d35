"""Block FP8 in Triton: quantise, multiply, and the 8-bit conversions that other kernels share.

The conversions are integer arithmetic on the float's bits, so they run on GPUs without FP8 units too and in the interpreter, and
round exactly as PyTorch does (to nearest, ties to even).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rorqual.kernels.dispatch import capability
from rorqual.kernels.fp8 import BLOCK, FP8


def quantize_activation(x: Tensor, power_of_two: bool = True, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """The contract is that of `rorqual.kernels.quantize_activation`. Scales lie block by block, as products read them."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    N, K = rows.shape
    values = torch.empty(N, K, dtype=torch.uint8, device=x.device)
    scale = torch.empty(triton.cdiv(K, block), N, dtype=torch.float32, device=x.device)
    if N and K:
        row_quantize_kernel[(triton.cdiv(N, 32), triton.cdiv(K, block))](
            rows, values, scale, N, K, BLOCK=block, BP=triton.next_power_of_2(block), POWER=power_of_two, ROWS=32, num_warps=4
        )
    by_row = scale.t()
    return values.view(FP8).view(x.shape), by_row if x.dim() == 2 else by_row.reshape(*x.shape[:-1], len(scale))


def quantize_weight(weight: Tensor, power_of_two: bool = True, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """The contract is that of `rorqual.kernels.quantize_weight`."""
    *batch, M, K = weight.shape
    matrices = weight.reshape(-1, M, K).contiguous()
    counts = triton.cdiv(M, block), triton.cdiv(K, block)
    values = torch.empty(len(matrices), M, K, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(len(matrices), *counts, dtype=torch.float32, device=weight.device)
    if weight.numel():
        block_quantize_kernel[(counts[1], counts[0], len(matrices))](
            matrices, values, scale, M, K, BLOCK=block, BP=triton.next_power_of_2(block), POWER=power_of_two, num_warps=8
        )
    return values.view(FP8).view(weight.shape), scale.view(*batch, *counts)


def fp8_matmul(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The contract is that of `rorqual.kernels.fp8_matmul`: the library's product where it takes the layout, else Triton's."""
    form = scaled_matmul if library_takes(a, b, dtype) else triton_matmul
    return form(a, a_scale, b, b_scale, dtype)


def library_takes(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch._scaled_mm multiplies blocks of 1 x 128 with blocks of 128 x 128 here: Hopper, CUDA 12.9 or later, terms in
    multiples of four blocks, columns in multiples of 16, a bfloat16 result. It was the faster form at every size tried."""
    version = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    shaped = a.shape[1] % (4 * BLOCK) == 0 and b.shape[0] % ROWS == 0 and a.numel() > 0 and dtype == torch.bfloat16
    return shaped and a.is_cuda and capability(a.device) == (9, 0) and version >= (12, 9)


ROWS = 16
"""Rows of a and of b that the library multiplies come in multiples of this; a's are padded."""


def scaled_matmul(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """By torch._scaled_mm, which wants the scales of a column by column."""
    N = len(a)
    if N % ROWS:
        a = F.pad(a.view(torch.uint8), (0, 0, 0, -N % ROWS)).view(FP8)
        a_scale = F.pad(a_scale, (0, 0, 0, -N % ROWS), value=1.0)
    by_column = a_scale.t().contiguous().t()
    return torch._scaled_mm(a, b.t(), by_column, b_scale.contiguous().t(), out_dtype=dtype)[:N]


def triton_matmul(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype = torch.float32, **tuning: int
) -> Tensor:
    """By `matmul_kernel`. A GPU without FP8 units (capability below 8.9) widens both to float16 first, which is exact."""
    (N, K), M = a.shape, len(b)
    out = torch.empty(N, M, dtype=dtype, device=a.device)
    native = a.is_cuda and capability(a.device) >= (8, 9)
    rows, columns = tuning.get("rows", 64 if N <= 64 else 128), tuning.get("columns", 64 if N <= 128 else 128)
    warps, stages = tuning.get("warps", 4 if rows * columns <= 8192 else 8), tuning.get("stages", 4 if native else 2)
    if out.numel():
        matmul_kernel[(triton.cdiv(N, rows) * triton.cdiv(M, columns),)](
            *((x.contiguous() if native else x.contiguous().view(torch.uint8)) for x in (a, b)), a_scale, b_scale, out, N, M, K,
            *a_scale.stride(), *b_scale.stride(), BN=rows, BM=columns, NATIVE=native, EVEN=K % BLOCK == 0,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


@triton.jit
def row_quantize_kernel(X, VALUES, SCALE, N, K, BLOCK: tl.constexpr, BP: tl.constexpr, POWER: tl.constexpr, ROWS: tl.constexpr):
    """Grid (row tiles, blocks of columns): VALUES [N, K] codes, SCALE [blocks, N]."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1).to(tl.int64)
    within = tl.arange(0, BP)
    column = block * BLOCK + within
    at = n.to(tl.int64)[:, None] * K + column[None, :]
    there = (n < N)[:, None] & ((within < BLOCK) & (column < K))[None, :]
    x = tl.load(X + at, mask=there, other=0.0).to(tl.float32)
    scale = power_of_two_scale(x) if POWER else tl.maximum(tl.max(tl.abs(x), 1), 1e-4) / 448.0
    tl.store(SCALE + block * N + n, scale, mask=n < N)
    tl.store(VALUES + at, to_e4m3(tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))), mask=there)


@triton.jit
def block_quantize_kernel(X, VALUES, SCALE, M, K, BLOCK: tl.constexpr, BP: tl.constexpr, POWER: tl.constexpr):
    """Grid (column blocks, row blocks, matrices): VALUES [B, M, K] codes, SCALE [B, row blocks, column blocks]."""
    within = tl.arange(0, BP)
    row, column = tl.program_id(1) * BLOCK + within, tl.program_id(0) * BLOCK + within
    batch = tl.program_id(2).to(tl.int64)
    at = (batch * M + row)[:, None] * K + column[None, :]
    there = ((within < BLOCK) & (row < M))[:, None] & ((within < BLOCK) & (column < K))[None, :]
    x = tl.load(X + at, mask=there, other=0.0).to(tl.float32)
    largest = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1)
    whole = tl.reshape(largest, [1, BP])
    scale = power_of_two_scale(whole) if POWER else tl.maximum(tl.max(whole, 1), 1e-4) / 448.0
    place = (batch * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(SCALE + place + tl.arange(0, 1), scale)
    tl.store(VALUES + at, to_e4m3(tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))), mask=there)


@triton.jit
def matmul_kernel(
    A, B, A_SCALE, B_SCALE, OUT, N, M, K, a_row, a_block, b_row, b_block,
    BN: tl.constexpr, BM: tl.constexpr, NATIVE: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr = 8,
):  # fmt: skip
    """OUT [N, M] = A [N, K] times B [M, K] transposed: each 128-wide block of K in the matrix unit's accumulator, then times both
    scales into a second float32 one. Programs that share rows of A run near each other, for the cache."""
    row_tiles, column_tiles = tl.cdiv(N, BN), tl.cdiv(M, BM)
    group = tl.program_id(0) // (GROUP * column_tiles)
    tall = tl.minimum(row_tiles - group * GROUP, GROUP)
    inside = tl.program_id(0) % (GROUP * column_tiles)
    first_row, first_column = (group * GROUP + inside % tall) * BN, inside // tall * BM
    n, m, k = first_row + tl.arange(0, BN), first_column + tl.arange(0, BM), tl.arange(0, 128)
    a_at = A + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    b_at = B + tl.minimum(m, M - 1).to(tl.int64)[:, None] * K + k[None, :]
    a_scales = A_SCALE + tl.minimum(n, N - 1).to(tl.int64) * a_row
    b_scales = B_SCALE + (first_column // 128).to(tl.int64) * b_row
    acc = tl.zeros([BN, BM], tl.float32)
    for block in range(tl.cdiv(K, 128)):
        if EVEN:
            a, b = tl.load(a_at), tl.load(b_at)
        else:
            inner = (block * 128 + k < K)[None, :]
            a, b = tl.load(a_at, mask=inner, other=0.0), tl.load(b_at, mask=inner, other=0.0)
        if not NATIVE:
            a, b = from_e4m3(a).to(tl.float16), from_e4m3(b).to(tl.float16)
        scale = tl.load(a_scales + block * a_block) * tl.load(b_scales + block * b_block)
        acc += tl.dot(a, b.T) * scale[:, None]
        a_at += 128
        b_at += 128
    there = (n < N)[:, None] & (m < M)[None, :]
    tl.store(OUT + n.to(tl.int64)[:, None] * M + m[None, :], acc.to(OUT.dtype.element_ty), mask=there)


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
