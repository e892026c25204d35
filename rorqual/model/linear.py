"""The linear map and the norms of the model, whose every row is the same bits whatever rows stand beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rorqual.kernels.linear import MAX_TERMS, MIN_ROWS, invariant_linear
from rorqual.kernels.rowwise import layer_norm, rms_norm


class Linear(nn.Linear):
    """y = x W^T without bias; weight [out, in]. In float32 on CPU a row's bits do not depend on the number of rows."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: the model draws all its weights itself (init.py)."""

    def forward(self, x: Tensor) -> Tensor:
        return invariant_linear(x, self.weight)


class RMSNorm(nn.Module):
    """w x / sqrt(mean(x^2) + eps) over the last dim, in float32, back to x's dtype."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """The indexer's key norm: with weight and bias, eps 1e-6, in float32, back to x's dtype."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, H, A] times weight [H, A, B] for each head: [N, H, B]. Rows are as independent of each other as in Linear."""
    x = x.transpose(0, 1)  # [H, N, A]
    if x.is_cuda:
        return torch.bmm(x, weight).transpose(0, 1)
    rows, columns = x.shape[1], weight.shape[2]
    if rows < MIN_ROWS or columns < MIN_ROWS:
        x, weight = F.pad(x, (0, 0, 0, max(MIN_ROWS - rows, 0))), F.pad(weight, (0, max(MIN_ROWS - columns, 0)))
    product = torch.bmm(x[..., :MAX_TERMS], weight[:, :MAX_TERMS])
    for low in range(MAX_TERMS, x.shape[2], MAX_TERMS):
        product = product + torch.bmm(x[..., low : low + MAX_TERMS], weight[:, low : low + MAX_TERMS])
    return product[:, :rows, :columns].transpose(0, 1)
