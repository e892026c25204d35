"""Matrix products whose bits do not depend on how many rows stand beside a row.

Measured on CPU in float32 with one and two threads (torch 2.13 on AMD, 2.11 on Intel): a product of fewer than 16 rows or columns
may take another code path and give other bits, and on Intel one of more than some 576 terms is split over threads and blocks in
ways that depend on its shape. Within those bounds each element is the same bits whatever the number of rows and columns, the
memory layout, and (in bmm) the batch. So every product on the model's path has at least 16 rows and columns, zero-padded below
that, and at most 512 terms: longer sums are those of blocks of 512, in order.
A sweep in tests/kernels/test_linear.py holds this to account on the machine at hand.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_ROWS = 16
MAX_TERMS = 512


def accumulator(*tensors: Tensor) -> torch.dtype:
    """The dtype in which an op sums: float64 where an input is float64, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def pad_rows(x: Tensor, rows: int = MIN_ROWS) -> Tensor:
    """x [N, D] with zero rows below it up to `rows`; x itself where it has them."""
    return x if x.shape[0] >= rows else F.pad(x, (0, 0, 0, rows - x.shape[0]))


def row_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, D] times the transpose of weight [M, D] -> [N, M]; on CPU bitwise the same for a row whatever N and M."""
    N, M = x.shape[0], weight.shape[0]
    if x.is_cuda:
        return x @ weight.t()
    if N < MIN_ROWS or M < MIN_ROWS:
        return row_product(pad_rows(x), pad_rows(weight))[:N, :M]
    product = x[:, :MAX_TERMS] @ weight[:, :MAX_TERMS].t()
    for low in range(MAX_TERMS, x.shape[1], MAX_TERMS):
        product = product + x[:, low : low + MAX_TERMS] @ weight[:, low : low + MAX_TERMS].t()
    return product


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, batch-invariant: x [..., D], weight [M, D], bias [M] -> [..., M], all of one dtype.

    On CPU in float32 a row's result is bitwise the same in any batch. Differentiable with respect to all three.
    On GPU it is torch's own product, whose bits may depend on the number of rows.
    """
    product = row_product(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], len(weight))
    return product if bias is None else product + bias


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, D] times the transpose of weight [M, D] -> float32 [N, M], the products summed in float32 whatever the inputs' dtype.

    Where nothing is differentiated on a GPU, 16-bit inputs are not widened first: their products are exact in float32 anyhow.
    """
    if x.is_cuda and x.dtype == weight.dtype and x.dtype.itemsize == 2 and not torch.is_grad_enabled():
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return invariant_linear(x.float(), weight.float())
