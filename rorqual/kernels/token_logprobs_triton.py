"""Token log-probabilities on a GPU: the head's logits exist only within a program of the matrix product, never in memory.

The forward multiplies tiles of hidden states and head in Triton and keeps running sums over a strip of the vocabulary; the strips
of a row are then added. The backward computes the logits again and turns each tile into its gradient where it stands, in the
inputs' dtype; two library products give the gradients of hidden states and head. Its tiles run over the vocabulary, not over
the tokens: the gradient of a slice of the head is then complete when the slice is done, and only the small gradient of the
hidden states is added up. TILE_BYTES bounds what is held at once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from rorqual.kernels.logprobs import kept_rows, token_logprobs_plain

TILE_BYTES = 128 << 20
"""The gradient of a tile of logits, and a tile's mask where tokens are kept."""
ROWS = 1 << 15
"""Tokens of one tile of the backward at most."""
STRIP = 4096
"""Tokens of the vocabulary whose sums one program runs over."""
LOG2E = tl.constexpr(1.4426950408889634)


def token_logprobs(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    kept: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    *,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The contract is that of `rorqual.kernels.logprobs`; bfloat16, float16 and float32, others run the plain form."""
    if hidden.dtype != head.dtype or hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return token_logprobs_plain(hidden, head, targets, temperature, kept, bias, return_entropy=return_entropy)
    N, V = len(hidden), len(head)
    # Inside a CUDA graph nothing is read back to the host: values are not checked, and padding is computed for nothing.
    is_captured = hidden.is_cuda and torch.cuda.is_current_stream_capturing()
    if isinstance(temperature, Tensor):
        is_positive = is_captured or bool((temperature > 0).all())
        temperature = temperature.to(hidden.device, torch.float32).expand(N).contiguous()
    else:
        is_positive = temperature > 0
        temperature = torch.full((N,), temperature, dtype=torch.float32, device=hidden.device)
    if not is_positive:
        raise ValueError("temperature: expected above 0 (greedy choice has no log-probability), found 0 or less")
    if targets.shape != (N,) or not (is_captured or bool((targets < V).all())):
        raise ValueError(f"targets: expected [{N}] ids below {V}, found {list(targets.shape)} up to {int(targets.max())}")
    rows = targets if is_captured else (targets >= 0).nonzero()[:, 0]  # padding costs nothing and is never read
    whole = len(rows) == N
    if not whole:
        hidden, targets, temperature = hidden[rows], targets[rows], temperature[rows]
        kept = None if kept is None else kept_rows(*kept, rows)
    allowed = None if kept is None else Kept.of(*kept, len(rows), hidden.device)
    results = _TokenLogprobs.apply(
        hidden.contiguous(), head.contiguous(), targets.int(), temperature.contiguous(), allowed, bias, return_entropy
    )
    if not whole:
        results = tuple(part.new_zeros(N).index_copy(0, rows, part) for part in results)
    return results if return_entropy else results[0]


class Kept(NamedTuple):
    """A sampling mask, ordered by token: entry i keeps tokens[i] in row rows[i]."""

    tokens: Tensor
    rows: Tensor
    restricted: Tensor
    """bool [N]: rows with a kept set; the others keep the whole vocabulary."""

    @staticmethod
    def of(tokens: Tensor, offsets: Tensor, N: int, device: torch.device) -> Kept:
        counts = offsets.to(device).long().diff()
        rows = torch.repeat_interleave(torch.arange(N, device=device), counts)
        tokens, order = tokens.to(device).long().sort(stable=True)
        return Kept(tokens, rows[order], counts > 0)

    def dropped(self, rows: slice, columns: slice) -> Tensor:
        """bool [n, v]: what a tile must not use."""
        tile = self.restricted[rows, None].expand(-1, columns.stop - columns.start).clone()
        low, high = torch.searchsorted(self.tokens, torch.tensor([columns.start, columns.stop], device=tile.device)).tolist()
        at = self.rows[low:high] - rows.start
        inside = (at >= 0) & (at < len(tile))
        tile[at[inside], self.tokens[low:high][inside] - columns.start] = False
        return tile


@functools.cache
def tiling(dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """Rows, columns and depth of one program's product, its warps and stages; float32 is multiplied without tensor cores."""
    if dtype == torch.float32 or device.type == "cpu":
        return {"BM": 32, "BN": 32, "BD": 32, "num_warps": 4, "num_stages": 2}
    if torch.cuda.get_device_properties(device).shared_memory_per_block_optin < 160 << 10:
        return {"BM": 128, "BN": 128, "BD": 32, "num_warps": 8, "num_stages": 3}
    return {"BM": 128, "BN": 256, "BD": 64, "num_warps": 8, "num_stages": 3}


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperature: Tensor, kept: Kept | None, bias: Tensor | None,
        return_entropy: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        lse, taken, mean = row_sums(hidden, head, targets, temperature, kept, bias, return_entropy)
        logprobs = torch.where(targets < 0, 0.0, taken - lse)
        entropy = lse - mean
        ctx.save_for_backward(hidden, head, targets, temperature, bias, lse, entropy, logprobs)
        ctx.kept, ctx.return_entropy = kept, return_entropy
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, targets, temperature, bias, lse, entropy, logprobs = ctx.saved_tensors
        grad = torch.where((targets < 0) | (logprobs == -torch.inf), 0.0, grad.float())
        grad_entropy = grad_entropy.float().contiguous() if ctx.return_entropy else None
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        grad_head = torch.empty_like(head)
        several = len(hidden) > ROWS
        total = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if several else None
        buffer = None
        for rows, columns in tiles(hidden, len(head)):
            n, v = rows.stop - rows.start, columns.stop - columns.start
            if buffer is None:  # the first tile is the largest
                buffer = torch.empty(n * triton.cdiv(v, 8) * 8, dtype=hidden.dtype, device=hidden.device)
            tile = buffer[: n * triton.cdiv(v, 8) * 8].view(n, -1)[:, :v]
            write_tile_gradient(
                hidden, head, targets, temperature, ctx.kept, bias, lse, entropy, grad, grad_entropy, rows, columns, tile
            )
            add_product(grad_hidden[rows], tile, head[columns])
            if total is None:
                grad_head[columns].copy_(product(tile.t(), hidden[rows]))
            else:
                add_product(total[columns], tile.t(), hidden[rows])
        grad_head = grad_head if total is None else total.to(head.dtype)
        return grad_hidden.to(hidden.dtype), grad_head, None, None, None, None, None


def tiles(hidden: Tensor, V: int) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) of tiles within TILE_BYTES; all columns of one slice of rows before the next."""
    N = len(hidden)
    height = min(N, ROWS)
    width = max(128, TILE_BYTES // (hidden.element_size() * max(height, 1)) // 256 * 256)
    for top in range(0, N, max(height, 1)):
        for left in range(0, V, width):
            yield slice(top, min(top + height, N)), slice(left, min(left + width, V))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, total float32."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def row_sums(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: Tensor, kept: Kept | None, bias: Tensor | None, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row, float32 [N]: the log-sum-exp, the target's logit after temperature, the mean logit under the distribution."""
    N, V = len(hidden), len(head)
    strips = triton.cdiv(V, STRIP)
    sums = torch.empty(3 if entropy else 2, strips, N, dtype=torch.float32, device=hidden.device)
    taken = torch.full((N,), -torch.inf, dtype=torch.float32, device=hidden.device)
    sizes = tiling(hidden.dtype, hidden.device)
    for rows, columns in strip_tiles(N, V) if kept else [(slice(0, N), slice(0, V))] * min(N, 1):
        dropped = None if kept is None else kept.dropped(rows, columns)
        n, first = rows.stop - rows.start, columns.start
        sum_kernel[(triton.cdiv(n, sizes["BM"]), triton.cdiv(columns.stop - first, STRIP))](
            hidden[rows], head, targets[rows], temperature[rows], hidden if bias is None else bias,
            hidden if dropped is None else dropped, sums[0, first // STRIP, rows.start :], taken[rows], n, V, first,
            columns.stop - first, N, N * strips, **_flags(hidden, bias, dropped, entropy), STRIP=STRIP, **sizes,
        )  # fmt: skip
    top = sums[0].amax(0)
    weight = torch.exp2(sums[0] - top)
    total = (sums[1] * weight).sum(0)
    lse = (top + total.log2()) / LOG2E.value
    mean = (sums[2] * weight).sum(0) / total / LOG2E.value if entropy else lse
    return lse, taken / LOG2E.value, mean


def strip_tiles(N: int, V: int) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) of tiles one strip wide whose masks keep within TILE_BYTES."""
    height = max(1, TILE_BYTES // STRIP)
    for top in range(0, N, height):
        for left in range(0, V, STRIP):
            yield slice(top, min(top + height, N)), slice(left, min(left + STRIP, V))


def _flags(hidden: Tensor, bias: Tensor | None, dropped: Tensor | None, entropy: bool) -> dict[str, Any]:
    return {
        "D": hidden.shape[1], "ENTROPY": entropy, "BIASED": bias is not None, "MASKED": dropped is not None,
        "PRECISION": "ieee" if hidden.dtype == torch.float32 else "tf32",
    }  # fmt: skip


def write_tile_gradient(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: Tensor, kept: Kept | None, bias: Tensor | None, lse: Tensor,
    entropy: Tensor, grad: Tensor, grad_entropy: Tensor | None, rows: slice, columns: slice, out: Tensor,
) -> None:  # fmt: skip
    """The gradient of a tile's logits into out [n, v]: (grad (1[target] - p) - grad_entropy p (log p + H)) / temperature."""
    n, v = rows.stop - rows.start, columns.stop - columns.start
    dropped = None if kept is None else kept.dropped(rows, columns)
    sizes = tiling(hidden.dtype, hidden.device)
    by_entropy = grad if grad_entropy is None else grad_entropy
    gradient_kernel[(triton.cdiv(n, sizes["BM"]), triton.cdiv(v, sizes["BN"]))](
        hidden[rows], head, targets[rows], temperature[rows], hidden if bias is None else bias,
        hidden if dropped is None else dropped, lse[rows], entropy[rows], grad[rows], by_entropy[rows], out, n, columns.stop,
        columns.start, v, out.stride(0), **_flags(hidden, bias, dropped, grad_entropy is not None), **sizes,
    )  # fmt: skip


@triton.jit
def _logits(
    HIDDEN, HEAD, BIAS, DROPPED, row, column, n, V, first, mask_stride,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits [BM, BN] before temperature, -inf where dropped. What lies beyond n or V repeats the last row or column."""
    d = tl.arange(0, BD)
    a = HIDDEN + tl.minimum(row, n - 1).to(tl.int64)[:, None] * D + d[None, :]
    b = HEAD + tl.minimum(column, V - 1).to(tl.int64)[None, :] * D + d[:, None]
    x = tl.zeros([BM, BN], tl.float32)
    for low in range(0, D, BD):
        if D % BD == 0:
            x = tl.dot(tl.load(a), tl.load(b), x, input_precision=PRECISION)
        else:
            inside = d < D - low
            rows, columns = tl.load(a, mask=inside[None, :], other=0.0), tl.load(b, mask=inside[:, None], other=0.0)
            x = tl.dot(rows, columns, x, input_precision=PRECISION)
        a += BD
        b += BD
    if BIASED:
        x += tl.load(BIAS + column, mask=column < V, other=0.0).to(tl.float32)[None, :]
    if MASKED:
        at = row.to(tl.int64)[:, None] * mask_stride + (column - first)[None, :]
        dropped = tl.load(DROPPED + at, mask=(row < n)[:, None] & (column < V)[None, :], other=0)
        x = tl.where(dropped != 0, float("-inf"), x)
    return x


@triton.jit
def sum_kernel(
    HIDDEN, HEAD, TARGETS, TEMPERATURE, BIAS, DROPPED, SUMS, TAKEN, n, V, first, mask_stride, sums_stride, part_stride,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, STRIP: tl.constexpr, ENTROPY: tl.constexpr,
    BIASED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, strips): of z = logits / temperature in units of ln 2, the maximum over a strip and sum 2^(z - maximum).

    For the entropy also sum z 2^(z - maximum); and the target's z, from the strip that holds it.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    there = row < n
    scale = LOG2E / tl.load(TEMPERATURE + row, mask=there, other=1.0)
    target = tl.load(TARGETS + row, mask=there, other=-1)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    mean = tl.zeros([BM], tl.float32)
    low = first + tl.program_id(1) * STRIP
    for start in range(low, tl.minimum(low + STRIP, V), BN):
        column = start + tl.arange(0, BN)
        x = _logits(HIDDEN, HEAD, BIAS, DROPPED, row, column, n, V, first, mask_stride, D, BM, BN, BD, BIASED, MASKED, PRECISION)
        z = x * scale[:, None]
        if start + BN > V:
            z = tl.where((column < V)[None, :], z, float("-inf"))
        own = (target >= start) & (target < start + BN)
        if tl.max(own.to(tl.int32), 0) > 0:
            tl.store(TAKEN + row, tl.max(tl.where(column[None, :] == target[:, None], z, float("-inf")), 1), mask=there & own)
        larger = tl.maximum(top, tl.max(z, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        shrink = tl.exp2(top - shift)
        weight = tl.exp2(z - shift[:, None])
        total = total * shrink + tl.sum(weight, 1)
        if ENTROPY:
            mean = mean * shrink + tl.sum(weight * tl.where(weight > 0, z, 0.0), 1)
        top = larger
    at = SUMS + tl.program_id(1).to(tl.int64) * sums_stride + row
    tl.store(at, top, mask=there)
    tl.store(at + part_stride, total, mask=there)
    if ENTROPY:
        tl.store(at + 2 * part_stride, mean, mask=there)


@triton.jit
def gradient_kernel(
    HIDDEN, HEAD, TARGETS, TEMPERATURE, BIAS, DROPPED, LSE, ENTROPIES, GRAD, GRAD_ENTROPY, OUT, n, V, first, mask_stride, stride,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ENTROPY: tl.constexpr, BIASED: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, column blocks): the gradient of the logits of columns [first, V); see write_tile_gradient."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    start = first + tl.program_id(1) * BN
    column = start + tl.arange(0, BN)
    there = row < n
    x = _logits(HIDDEN, HEAD, BIAS, DROPPED, row, column, n, V, first, mask_stride, D, BM, BN, BD, BIASED, MASKED, PRECISION)
    inverse = 1.0 / tl.load(TEMPERATURE + row, mask=there, other=1.0)
    lse = tl.load(LSE + row, mask=there, other=0.0)
    grad = tl.load(GRAD + row, mask=there, other=0.0) * inverse
    target = tl.load(TARGETS + row, mask=there, other=-1)
    log2_p = x * (inverse * LOG2E)[:, None] - (lse * LOG2E)[:, None]
    p = tl.exp2(log2_p)
    if ENTROPY:
        grad_entropy = tl.load(GRAD_ENTROPY + row, mask=there, other=0.0) * inverse
        surprise = tl.where(p > 0, log2_p / LOG2E, 0.0) + tl.load(ENTROPIES + row, mask=there, other=0.0)[:, None]
        g = -p * (grad[:, None] + grad_entropy[:, None] * surprise)
    else:
        g = -p * grad[:, None]
    if tl.max(((target >= start) & (target < start + BN)).to(tl.int32), 0) > 0:
        g += tl.where(column[None, :] == target[:, None], grad[:, None], 0.0)
    at = OUT + row.to(tl.int64)[:, None] * stride + (column - first)[None, :]
    tl.store(at, g.to(OUT.dtype.element_ty), mask=there[:, None] & (column < V)[None, :])
