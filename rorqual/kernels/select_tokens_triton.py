"""Index scores and exact top-k selection in Triton, on any GPU that Triton serves; bfloat16, float16, float32 and FP8.

Scores of some rows are written to a buffer of bounded size (SCORE_BYTES, whatever T and S), and each row's selection is made by
one program that holds the row in registers. Rows wider than WIDEST are selected in segments whose choices are then selected
from again: the order (score, then lowest position) is total, so the set is the same under every tiling and launch shape.

The search for the threshold is over float32 values as ordered integers: it narrows a bracket by counting, two probes a pass, with
probes placed by the row's mean and deviation and then by interpolation, and ends when exactly `topk` values lie above a probe or
the bracket is one value wide (ties). Every third step shrinks the bracket to values that occur and halves the integers, so the
number of passes is bounded whatever the distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.kernels.selection import row_ranges, select_tokens_plain

SCORE_BYTES = 256 << 20
"""Scores held at once."""
ABSENT = tl.constexpr(-2147483648)
"""The ordered integer of no score: below that of every float32."""
WIDEST = 32768
"""Scores of one program's registers: 32 for each of 1,024 threads."""
FP8 = torch.float8_e4m3fn
SUPPORTED = (torch.bfloat16, torch.float16, torch.float32, FP8)


@torch.no_grad()
def select_tokens(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    topk: int,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    *,
    return_scores: bool = False,
    k_scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The contract is `rorqual.kernels.selection.select_tokens`'s.

    FP8: q and k float8_e4m3fn with k_scale [S] float32; q's scales are part of w, since they commute with the ReLU.
    """
    if topk < 1:
        raise ValueError(f"topk: expected at least 1, found {topk}")
    if q.dtype != k.dtype or q.dtype not in SUPPORTED or (w.dtype == torch.float64):
        return select_tokens_plain(q, k, w, topk, starts, ends, return_scores=return_scores)
    T, S = len(q), len(k)
    starts, ends = (bound.to(torch.int32) for bound in row_ranges(T, S, starts, ends, q.device))
    keys = Keys(k.contiguous(), S, k_scale)
    return _select(q.contiguous(), keys, w, topk, starts, ends, return_scores)


@torch.no_grad()
def select_cached_tokens(
    q: Tensor, cache: Tensor, block_table: Tensor, w: Tensor, topk: int, lengths: Tensor, *, return_scores: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Decode: sequence b chooses among its own cached keys, positions [0, lengths[b]) -> int32 [B, topk] as select_tokens does.

    q [B, I, C]; block_table [B, blocks] int32 names the cache block of each page of the sequence; lengths [B].
    cache is [blocks, page, C] of q's dtype, or, for an FP8 q, uint8 [blocks, page, C + 4]: in each block first the page's
    values, then its float32 scales (the layout of vLLM and SGLang).
    """
    B, blocks = block_table.shape
    page = cache.shape[1]
    keys = Keys(cache.contiguous(), blocks * page, None, block_table.to(torch.int32).contiguous(), page)
    starts = torch.zeros(B, dtype=torch.int32, device=q.device)
    return _select(q.contiguous(), keys, w, topk, starts, lengths.to(q.device, torch.int32), return_scores)


@dataclass(frozen=True)
class Keys:
    """Index keys: [S, C] in a row, or paged."""

    values: Tensor
    S: int
    """Positions a query can see at most."""
    scale: Tensor | None = None
    block_table: Tensor | None = None
    page: int = 1


def _select(
    q: Tensor, keys: Keys, w: Tensor, topk: int, starts: Tensor, ends: Tensor, return_scores: bool
) -> Tensor | tuple[Tensor, Tensor]:
    T = len(q)
    indices = torch.full((T, topk), -1, dtype=torch.int32, device=q.device)
    scores = torch.full((T, topk), -torch.inf, device=q.device) if return_scores else None
    stride = triton.cdiv(keys.S, 16) * 16 + 16  # aligned reads may run past the last key
    chunk = max(1, min(T, SCORE_BYTES // (4 * stride))) if keys.S else 0
    buffer = torch.empty(chunk, stride, dtype=torch.float32, device=q.device)
    for first in range(0, T if keys.S else 0, max(chunk, 1)):
        rows = slice(first, min(first + chunk, T))
        tile = buffer[: rows.stop - first]
        write_scores(q[rows], keys, w[rows], starts[rows], ends[rows], tile, first)
        select_rows(tile, topk, starts[rows], ends[rows], indices[rows], None if scores is None else scores[rows])
    return indices if scores is None else (indices, scores)


def write_scores(
    q: Tensor, keys: Keys, w: Tensor, starts: Tensor, ends: Tensor, out: Tensor, first_row: int = 0, **tuning: int
) -> None:
    """Index scores of each row's own keys into out [t, >= S] float32; what lies outside a row's range is left as it was."""
    t, I, C = q.shape
    paged = keys.block_table is not None
    heads, dims = triton.next_power_of_2(I), max(16, triton.next_power_of_2(C))
    queries = 1 if paged else max(1, min(tuning.get("columns", 128) // heads, triton.next_power_of_2(t)))
    heads = max(heads, 16 // queries)
    block, warps = tuning.get("block", 64), tuning.get("warps", 4)
    span = tuning.get("span", 1024)
    table = keys.block_table if paged else starts
    scale = keys.scale if keys.scale is not None else w
    score_kernel[(triton.cdiv(keys.S, span), triton.cdiv(t, queries))](
        q, keys.values, scale, w.float().contiguous(), table, starts, ends, out, t, keys.S, out.stride(0), first_row,
        table.stride(0) if paged else 0,
        I=I, C=C, IP=heads, CP=dims, BQ=queries, BK=block, SPAN=span, PAGE=keys.page if paged else 0,
        SCALED=keys.scale is not None, PACKED=paged and q.dtype == FP8,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=tuning.get("stages", 3),
    )  # fmt: skip


@triton.jit
def score_kernel(
    Q, K, SCALE, W, TABLE, STARTS, ENDS, OUT, T, S, stride, first_row, table_stride,
    I: tl.constexpr, C: tl.constexpr, IP: tl.constexpr, CP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    SPAN: tl.constexpr, PAGE: tl.constexpr, SCALED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (spans of SPAN keys, blocks of BQ queries). Keys are the rows of the product, (query, head) pairs its columns.

    So a thread holds whole columns' shares of a key's scores and the sum over heads stays within four threads of a warp.
    """
    t = tl.program_id(1) * BQ + tl.arange(0, BQ)
    low = tl.min(tl.load(STARTS + t, mask=t < T, other=2147483647), 0)
    high = tl.max(tl.load(ENDS + t, mask=t < T, other=0), 0)
    low = tl.maximum(low // BK * BK, tl.program_id(0) * SPAN)
    high = tl.minimum(high, tl.program_id(0) * SPAN + SPAN)
    if low < high:
        pair = tl.arange(0, BQ * IP)
        row, head, c = tl.program_id(1) * BQ + pair // IP, pair % IP, tl.arange(0, CP)
        real = (row < T) & (head < I)
        q = tl.load(Q + (row.to(tl.int64) * I + head)[:, None] * C + c[None, :], mask=real[:, None] & (c < C)[None, :], other=0.0)
        w = tl.load(W + row * I + head, mask=real, other=0.0)
        lane = tl.arange(0, BK)
        for start in range(low, high, BK):
            s = start + lane
            if PAGE > 0:
                slot = tl.load(TABLE + tl.program_id(1).to(tl.int64) * table_stride + s // PAGE, mask=s < high, other=0).to(
                    tl.int64
                )
                at = slot * PAGE * (C + 4) + s % PAGE * C if PACKED else (slot * PAGE + s % PAGE) * C
            else:
                at = s.to(tl.int64) * C
            values = (K + at[:, None] + c[None, :]).to(tl.pointer_type(tl.float8e4nv)) if PACKED else K + at[:, None] + c[None, :]
            k = tl.load(values, mask=(s < high)[:, None] & (c < C)[None, :], other=0.0)
            x = tl.dot(k, q.T, input_precision=PRECISION)
            x = tl.maximum(x, 0.0) * w[None, :]
            x = tl.sum(tl.reshape(x, [BK, BQ, IP]), 2)  # [BK, BQ]
            if SCALED:
                x = x * tl.load(SCALE + s, mask=s < high, other=0.0)[:, None]
            if PACKED:
                scale = (K + slot * PAGE * (C + 4) + PAGE * C + (s % PAGE) * 4).to(tl.pointer_type(tl.float32))
                x = x * tl.load(scale, mask=s < high, other=0.0)[:, None]
            tl.store(OUT + t.to(tl.int64)[None, :] * stride + s[:, None], x, mask=(s < high)[:, None] & (t < T)[None, :])


def select_rows(scores: Tensor, topk: int, starts: Tensor, ends: Tensor, indices: Tensor, chosen: Tensor | None) -> None:
    """The topk best of each row of scores in [starts, ends): fills indices (all -1 before) and, if given, chosen scores."""
    t, S = scores.shape
    width = min(WIDEST, triton.next_power_of_2(max(S, topk)))
    segments = triton.cdiv(S, width)
    outputs = (indices, chosen) if segments == 1 else _candidates(t, segments, topk, scores.device)
    _select_segments(scores, scores, starts, ends, outputs, topk, width, segments, False)
    while segments > 1:
        positions, values = (part.view(t, -1) for part in outputs)
        count = positions.shape[1]
        width = min(max(WIDEST, 2 * triton.next_power_of_2(topk)), triton.next_power_of_2(count))
        segments = triton.cdiv(count, width)
        outputs = (indices, chosen) if segments == 1 else _candidates(t, segments, topk, scores.device)
        _select_segments(values, positions, starts, ends, outputs, topk, width, segments, True)


def _candidates(t: int, segments: int, topk: int, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = (t, segments, topk)
    return torch.full(shape, -1, dtype=torch.int32, device=device), torch.empty(shape, dtype=torch.float32, device=device)


def _select_segments(
    scores: Tensor, positions: Tensor, starts: Tensor, ends: Tensor, outputs: tuple[Tensor, Tensor | None], topk: int, width: int,
    segments: int, listed: bool,
) -> None:  # fmt: skip
    indices, chosen = outputs
    select_kernel[(segments, len(scores))](
        scores, positions, starts, ends, indices, indices if chosen is None else chosen, scores.shape[1], scores.stride(0), topk,
        N=width, LISTED=listed, SCORES=chosen is not None, num_warps=max(4, min(32, width // 1024)),
    )  # fmt: skip


@triton.jit
def _ordered(x):
    """float32 -> int32 in the same order; both zeros are one, NaN and -inf the lowest finite number."""
    x = tl.where((x != x) | (x == float("-inf")), -3.4028234663852886e38, x + 0.0)
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value(key):
    """The float32 of an ordered integer."""
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _quantile(upper):
    """About how many deviations above the mean a share `upper` of a normal distribution lies (Abramowitz and Stegun, 26.2.22)."""
    tail = tl.maximum(tl.minimum(upper, 1.0 - upper), 1e-6)
    t = tl.sqrt(-2.0 * tl.log(tail))
    z = t - (2.30753 + 0.27061 * t) / (1.0 + t * (0.99229 + 0.04481 * t))
    return tl.where(upper < 0.5, z, -z)


@triton.jit
def _between(rank, low, high, above_low, above_high):
    """Where, between the values of two ordered integers, about `rank` values lie above: the ordered integer of that place."""
    a, b = _value(low), _value(high - 1)
    most, least = above_low.to(tl.float32), tl.maximum(above_high.to(tl.float32), 0.5)
    rank = tl.maximum(tl.minimum(rank, most - 0.5), least)
    curved = (tl.log(most) - tl.log(rank)) / (tl.log(most) - tl.log(least))
    share = tl.where(most > 2 * least, curved, (most - rank) / tl.maximum(most - least, 1.0))
    return _ordered(a + (b - a) * share).to(tl.int64)


@triton.jit
def _threshold(key, count, topk):
    """The ordered integers low < high where at least topk keys are >= low and fewer than topk are >= high.

    Either exactly topk keys are >= low, or high = low + 1: then low itself is tied. Also the number of keys >= high.
    """
    there = key != ABSENT
    low = tl.min(tl.where(there, key, 2147483647), 0).to(tl.int64)
    high = tl.max(key, 0).to(tl.int64) + 1
    above_low, above_high = count, count * 0
    x = tl.where(there, _value(key), 0.0)
    mean = tl.sum(x, 0) / count
    deviation = tl.sqrt(tl.maximum(tl.sum(x * x, 0) / count - mean * mean, 0.0))
    share = topk / count.to(tl.float32)
    step = count * 0
    while (high - low > 1) & (above_low != topk):
        step += 1
        narrow = step % 3 == 0
        if narrow:
            low = tl.min(tl.where(key >= low.to(tl.int32), key, 2147483647), 0).to(tl.int64)
            high = tl.max(tl.where(key <= (high - 1).to(tl.int32), key, ABSENT), 0).to(tl.int64) + 1
        if high - low > 1:
            margin = 0.25 * tl.sqrt((above_low - above_high).to(tl.float32))
            if step == 1:
                first = _ordered(mean + deviation * _quantile(1.25 * share)).to(tl.int64)
                second = _ordered(mean + deviation * _quantile(0.8 * share)).to(tl.int64)
            elif narrow & (step > 3):
                first = low + (high - low) // 3
                second = low + (high - low) * 2 // 3
            else:
                first = _between(topk + margin, low, high, above_low, above_high)
                second = _between(topk - margin, low, high, above_low, above_high)
            first = tl.minimum(tl.maximum(first, low + 1), high - 1)
            second = tl.minimum(tl.maximum(second, first), high - 1)
            # Two counts in one sum: a program holds at most 32,768 keys.
            both = tl.sum((key >= first.to(tl.int32)).to(tl.int32) + ((key >= second.to(tl.int32)).to(tl.int32) << 16), 0)
            above_first, above_second = both & 0xFFFF, (both >> 16) & 0xFFFF
            if above_second >= topk:
                low, above_low = second, above_second
            else:
                high, above_high = second, above_second
                if above_first >= topk:
                    low, above_low = first, above_first
                else:
                    high, above_high = first, above_first
    return low.to(tl.int32), high.to(tl.int32), above_high


@triton.jit
def select_kernel(
    X, POSITIONS, STARTS, ENDS, INDICES, CHOSEN, S, stride, topk, N: tl.constexpr, LISTED: tl.constexpr, SCORES: tl.constexpr
):
    """Grid (segments of N, rows): the topk best of a segment, by ascending position, to INDICES [rows, segments, topk].

    LISTED: positions are given beside the scores (negative: none); else a score's column is its position.
    """
    segment, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, end = tl.load(STARTS + row), tl.load(ENDS + row)
    lane = tl.arange(0, N)
    if LISTED:
        base, start, end = segment * N, 0, S
    else:
        base = start // 4 * 4 + segment * N  # aligned, so that four scores are one load
    if base < end:
        column = tl.multiple_of(base, 4) + lane
        x = tl.load(X + row * stride + column, mask=(column // 4 * 4 < end) & (column // 4 * 4 < stride), other=0.0)
        there = (column >= start) & (column < end)
        if LISTED:
            there = tl.load(POSITIONS + row * stride + column, mask=there, other=-1) >= 0
        count = tl.sum(there.to(tl.int32), 0)
        key = tl.where(there, _ordered(x), ABSENT)
        if count > topk:
            low, high, above = _threshold(key, count, topk)
        else:
            low, high, above = ABSENT + 1, ABSENT + 1, count
        # Two prefix sums in one: the keys surely taken, and those at the threshold, of which the first `wanted` are taken.
        sure, tied, wanted = key >= high, (key >= low) & (key < high), topk - above
        ahead = tl.cumsum(sure.to(tl.int32) + (tied.to(tl.int32) << 16), 0)
        sure_ahead = (ahead & 0xFFFF) - sure.to(tl.int32)
        tied_ahead = ((ahead >> 16) & 0xFFFF) - tied.to(tl.int32)
        taken = sure | (tied & (tied_ahead < wanted))
        at = (row * tl.num_programs(0) + segment) * topk + sure_ahead + tl.minimum(tied_ahead, wanted)
        position = tl.load(POSITIONS + row * stride + column, mask=taken, other=-1) if LISTED else column
        tl.store(INDICES + at, position, mask=taken)
        if SCORES:
            tl.store(CHOSEN + at, _value(key), mask=taken)
