"""Log-probabilities of given tokens straight from hidden states: the head's logits exist only a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rorqual.kernels.dispatch import triton_form
from rorqual.kernels.linear import MIN_ROWS, accumulator, row_product

CHUNK_LOGITS = 1 << 22
"""Logits held at once: 16 MiB of float32."""


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
    """log softmax((hidden head^T + bias) / temperature)[targets], natural log.

    hidden [N, D], head [V, D], targets integer [N], temperature a number or [N], above 0, bias [V] -> float32 [N] (float64 for
    float64 inputs). A negative target (padding) gives 0, costs nothing, and its hidden state is never read.

    kept = (tokens [sum], offsets [N + 1]), integer: row t's softmax is over tokens[offsets[t]:offsets[t + 1]] alone, the sampling
    mask to replay (`rorqual.policy.KeptTokens`); an empty row keeps the whole vocabulary. A target outside its kept set has
    -inf and no gradient.
    return_entropy: also the entropy of each row's distribution in nats, [N].

    Differentiable with respect to hidden and head, through both results; temperature, kept and bias get none. The mean of
    the negative is the cross-entropy. On CPU a row is bitwise the same in any batch. 16-bit inputs are multiplied and summed in
    float32. Holds CHUNK_LOGITS logits, never [N, V], and on CPU a float32 copy of a 16-bit head.
    """
    form = triton_form("token_logprobs", hidden, head, targets) or token_logprobs_plain
    return form(hidden, head, targets, temperature, kept, bias, return_entropy=return_entropy)


def token_logprobs_plain(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    kept: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    *,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    N, V = len(hidden), len(head)
    temperature = torch.as_tensor(temperature, dtype=accumulator(hidden, head), device=hidden.device).expand(N)
    if not bool((temperature > 0).all()):
        raise ValueError("temperature: expected above 0 (greedy choice has no log-probability), found 0 or less")
    if targets.shape != (N,) or not bool((targets < V).all()):
        raise ValueError(f"targets: expected [{N}] ids below {V}, found {list(targets.shape)} up to {int(targets.max())}")
    rows = (targets >= 0).nonzero()[:, 0]
    whole = len(rows) == N
    tokens, offsets = (None, None) if kept is None else kept if whole else kept_rows(*kept, rows)
    inputs = (hidden, targets, temperature) if whole else (hidden[rows], targets[rows], temperature[rows])
    results = _TokenLogprobs.apply(inputs[0], head, *inputs[1:], tokens, offsets, bias, return_entropy)
    if not whole:
        results = tuple(part.new_zeros(N).index_copy(0, rows, part) for part in results)
    return results if return_entropy else results[0]


def kept_rows(tokens: Tensor, offsets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The ragged sets of some rows: the tokens [sum] and offsets [n + 1] of `rows` [n] alone."""
    offsets = offsets.to(rows.device)
    counts = offsets.diff()[rows]
    bounds = F.pad(counts.cumsum(0), (1, 0))
    shift = torch.repeat_interleave(offsets[rows] - bounds[:-1], counts)
    return tokens.to(rows.device)[torch.arange(len(shift), device=rows.device) + shift], bounds


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        temperature: Tensor,
        tokens: Tensor | None,
        offsets: Tensor | None,
        bias: Tensor | None,
        return_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs, lse, entropy = (torch.zeros_like(temperature).contiguous() for _ in range(3))
        wide_head = head.to(temperature.dtype)
        for rows in row_chunks(len(hidden), len(head)):
            logits = kept_logits(hidden, wide_head, temperature, tokens, offsets, bias, rows)  # [n, V]
            lse[rows] = torch.logsumexp(logits, 1)
            logprobs[rows] = logits.gather(1, targets[rows, None].long()).squeeze(1) - lse[rows]
            if return_entropy:
                logits.sub_(lse[rows, None])
                entropy[rows] = -(logits.exp() * logits.masked_fill(logits == -torch.inf, 0)).sum(1)
        ctx.save_for_backward(hidden, head, targets, temperature, tokens, offsets, bias, lse, entropy, logprobs)
        ctx.return_entropy = return_entropy
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, targets, temperature, tokens, offsets, bias, lse, entropy, logprobs = ctx.saved_tensors
        dtype = temperature.dtype
        grad = grad.masked_fill(logprobs == -torch.inf, 0) / temperature
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=dtype)
        wide_head = head.to(dtype)
        for rows in row_chunks(len(hidden), len(head)):
            logs = kept_logits(hidden, wide_head, temperature, tokens, offsets, bias, rows).sub_(lse[rows, None])  # [n, V]
            if ctx.return_entropy:  # dH / dlogit = -p (log p + H)
                drift = torch.where(logs == -torch.inf, 0, logs + entropy[rows, None])
                factor = drift.mul_((grad_entropy / temperature)[rows, None]).add_(grad[rows, None]).neg_()
            else:
                factor = -grad[rows, None]
            grad_logits = logs.exp_().mul_(factor).scatter_add_(1, targets[rows, None].long(), grad[rows, None])
            grad_hidden[rows] = (grad_logits @ wide_head).to(hidden.dtype)
            grad_head.addmm_(grad_logits.t(), hidden[rows].to(dtype))
        return grad_hidden, grad_head.to(head.dtype), None, None, None, None, None, None


def row_chunks(N: int, V: int) -> Iterator[slice]:
    size = max(MIN_ROWS, CHUNK_LOGITS // V)
    for low in range(0, N, size):
        yield slice(low, min(low + size, N))


def kept_logits(
    hidden: Tensor,
    head: Tensor,
    temperature: Tensor,
    tokens: Tensor | None,
    offsets: Tensor | None,
    bias: Tensor | None,
    rows: slice,
) -> Tensor:
    """Logits of a chunk after bias, temperature and kept set: [n, V], -inf where not kept.

    head is of temperature's dtype, so that 16-bit states and heads are multiplied in float32, as the model does where it samples.
    """
    dtype = temperature.dtype
    logits = row_product(hidden[rows].to(dtype), head)
    if bias is not None:
        logits.add_(bias.to(dtype))
    logits.div_(temperature[rows, None])
    if tokens is None or offsets is None:
        return logits
    bounds = offsets[rows.start : rows.stop + 1].to(logits.device)
    counts = bounds.diff()
    row = torch.repeat_interleave(torch.arange(len(logits), device=logits.device), counts)
    dropped = (counts > 0)[:, None].expand_as(logits).clone()
    dropped[row, tokens[int(bounds[0]) : int(bounds[-1])].to(logits.device, torch.long)] = False
    return logits.masked_fill_(dropped, -torch.inf)
