"""Token log-probabilities on a GPU, tile by tile over the vocabulary, with sums and gradients in Triton.

Tiles run over the vocabulary, not over the tokens: the gradient of a tile of the head is then complete when the tile is done, and
only the small gradient of the hidden states is added up. The products are the library's, bfloat16 in and float32 out. The
backward computes the logits again; LOGIT_BYTES bounds what is held at once, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from rorqual.kernels.logprobs import kept_rows, token_logprobs_plain

LOGIT_BYTES = 128 << 20
"""Float32 logits held at once."""
ROWS = 1 << 15
"""Tokens of one tile at most."""


class Sums(NamedTuple):
    """Running sums of each row over the tiles seen, float32 [N] each."""

    top: Tensor
    total: Tensor
    """sum exp(z - top)."""
    mean: Tensor
    """sum z exp(z - top): the entropy is log-sum-exp less its share of total."""
    taken: Tensor
    """The target's z."""


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


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperature: Tensor, kept: Kept | None, bias: Tensor | None,
        return_entropy: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        sums = Sums(*(torch.full_like(temperature, value) for value in (-torch.inf, 0, 0, -torch.inf)))
        for rows, columns in tiles(len(hidden), len(head)):
            logits = tile_logits(hidden, head, kept, bias, rows, columns)
            add_tile(logits, targets[rows], temperature[rows], columns.start, Sums(*(part[rows] for part in sums)))
        lse = sums.top + sums.total.log()
        logprobs = torch.where(targets < 0, 0.0, sums.taken - lse)
        entropy = lse - sums.mean / sums.total
        ctx.save_for_backward(hidden, head, targets, temperature, bias, lse, entropy, logprobs)
        ctx.kept, ctx.return_entropy = kept, return_entropy
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, targets, temperature, bias, lse, entropy, logprobs = ctx.saved_tensors
        grad = torch.where((targets < 0) | (logprobs == -torch.inf), 0.0, grad.float())
        grad_entropy = grad_entropy.float().contiguous() if ctx.return_entropy else torch.zeros_like(grad)
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        grad_head = torch.empty_like(head)
        several = len(hidden) > ROWS
        total = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if several else None
        for rows, columns in tiles(len(hidden), len(head)):
            logits = tile_logits(hidden, head, ctx.kept, bias, rows, columns)
            tile = tile_gradient(
                logits, targets[rows], temperature[rows], columns.start, lse[rows], entropy[rows], grad[rows], grad_entropy[rows],
                hidden.dtype,
            )  # fmt: skip
            del logits
            add_product(grad_hidden[rows], tile, head[columns])
            if total is None:
                grad_head[columns] = product(tile.t(), hidden[rows]).to(head.dtype)
            else:
                add_product(total[columns], tile.t(), hidden[rows])
        grad_head = grad_head if total is None else total.to(head.dtype)
        return grad_hidden.to(hidden.dtype), grad_head, None, None, None, None, None


def tiles(N: int, V: int) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) of tiles within LOGIT_BYTES; all columns of one slice of rows before the next."""
    height = min(N, ROWS)
    width = max(128, LOGIT_BYTES // (4 * max(height, 1)) // 128 * 128)
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


def tile_logits(hidden: Tensor, head: Tensor, kept: Kept | None, bias: Tensor | None, rows: slice, columns: slice) -> Tensor:
    """Logits of a tile before temperature, float32 [n, v], -inf where not kept."""
    logits = product(hidden[rows], head[columns].t())
    if bias is not None:
        logits += bias[columns].float()
    return logits if kept is None else logits.masked_fill_(kept.dropped(rows, columns), -torch.inf)


def add_tile(logits: Tensor, targets: Tensor, temperature: Tensor, first: int, sums: Sums) -> None:
    """One more tile of logits, columns from `first` on, into the running sums."""
    n, v = logits.shape
    add_kernel[(n,)](logits, targets, temperature, *sums, v, first, B=min(4096, triton.next_power_of_2(v)), num_warps=8)


@triton.jit
def add_kernel(LOGITS, TARGETS, TEMPERATURE, TOP, TOTAL, MEAN, TAKEN, V, first, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    inverse = 1.0 / tl.load(TEMPERATURE + row)
    top, total, mean = tl.load(TOP + row), tl.load(TOTAL + row), tl.load(MEAN + row)
    lane = tl.arange(0, B)
    for start in range(0, V, B):
        z = tl.load(LOGITS + row * V + start + lane, mask=start + lane < V, other=float("-inf")) * inverse
        larger = tl.maximum(top, tl.max(z, 0))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        shrink = tl.exp(top - shift)
        weight = tl.exp(z - shift)
        total = total * shrink + tl.sum(weight, 0)
        mean = mean * shrink + tl.sum(tl.where(weight > 0, weight * tl.where(weight > 0, z, 0.0), 0.0), 0)
        top = larger
    tl.store(TOP + row, top)
    tl.store(TOTAL + row, total)
    tl.store(MEAN + row, mean)
    at = tl.load(TARGETS + row) - first
    if (at >= 0) & (at < V):
        tl.store(TAKEN + row, tl.load(LOGITS + row * V + at) * inverse)


def tile_gradient(
    logits: Tensor, targets: Tensor, temperature: Tensor, first: int, lse: Tensor, entropy: Tensor, grad: Tensor,
    grad_entropy: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The gradient of a tile's logits [n, v] in `dtype`: (grad (1[target] - p) - grad_entropy p (log p + H)) / temperature."""
    n, v = logits.shape
    out = torch.empty(n, v, dtype=dtype, device=logits.device)
    block = min(4096, triton.next_power_of_2(v))
    gradient_kernel[(triton.cdiv(v, block), n)](
        logits, out, targets, temperature, lse, entropy, grad, grad_entropy, v, first, B=block, num_warps=8
    )
    return out


@triton.jit
def gradient_kernel(LOGITS, OUT, TARGETS, TEMPERATURE, LSE, ENTROPY, GRAD, GRAD_ENTROPY, V, first, B: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    inverse = 1.0 / tl.load(TEMPERATURE + row)
    column = tl.program_id(0) * B + tl.arange(0, B)
    z = tl.load(LOGITS + row * V + column, mask=column < V, other=float("-inf")) * inverse
    log_p = z - tl.load(LSE + row)
    p = tl.exp(log_p)
    p = tl.where(p > 0, p, 0.0)
    hit = tl.where(column + first == tl.load(TARGETS + row), 1.0, 0.0)
    surprise = tl.where(p > 0, log_p, 0.0) + tl.load(ENTROPY + row)
    g = tl.load(GRAD + row) * (hit - p) - tl.load(GRAD_ENTROPY + row) * p * surprise
    tl.store(OUT + row * V + column, (g * inverse).to(OUT.dtype.element_ty), mask=column < V)
