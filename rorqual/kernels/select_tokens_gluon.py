"""Selection's listing and finishing kernels in Gluon, on any NVIDIA GPU: the functions of `select_tokens_triton`, over a layout.

WIDE neighbouring scores belong to a thread: a prefix sum is then one pass over the lanes for a block, and the scattered stores go
out from where the scores were loaded.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rorqual.kernels.select_tokens_triton import _finish, _list


@gluon.jit
def list_kernel(
    X, STARTS, ENDS, LISTS, BARS, REACH, stride,
    LENGTH: gl.constexpr, N: gl.constexpr, WIDE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Grid (rows): see _list_row."""
    lane = gl.arange(0, N, layout=gl.BlockedLayout([WIDE], [32], [num_warps], [0]))
    _list(X, STARTS, ENDS, LISTS, BARS, REACH, stride, lane, LENGTH)


@gluon.jit
def finish_kernel(
    X, STARTS, ENDS, LISTS, MISLED, REACH, INDICES, CHOSEN, stride, topk,
    LENGTH: gl.constexpr, BLOCK: gl.constexpr, LISTED: gl.constexpr, SCORES: gl.constexpr, N: gl.constexpr,
    WIDE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Grid (rows): see _finish."""
    lane = gl.arange(0, N, layout=gl.BlockedLayout([WIDE], [32], [num_warps], [0]))
    _finish(X, STARTS, ENDS, LISTS, MISLED, REACH, INDICES, CHOSEN, stride, topk, lane, LENGTH, BLOCK, LISTED, SCORES)
