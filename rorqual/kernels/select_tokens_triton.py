"""Index scores and exact top-k selection in Triton, on any GPU that Triton serves; bfloat16, float16, float32 and FP8.

Scores of some rows are written to a buffer of bounded size (SCORE_BYTES, whatever T and S), and each row is selected from by one
program. A long row is first filtered: a threshold that a few more than `topk` scores should reach is read off a sample of
the row, and those that reach it are listed in order; the exact selection then holds the list in registers. Where the sample
misled (too many or too few reach it) the row itself is searched: the set never depends on the sample, tiling or launch.

The exact search is over float32 values as ordered integers. It narrows a bracket by counting, two probes a pass, and ends when
exactly `topk` values lie above a probe or the bracket is one value wide (ties). Probes are placed by the mean and deviation, then
by interpolation; every third step shrinks the bracket to values that occur and the next halves the integers, so the number of
passes is bounded whatever the distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.kernels.selection import row_ranges, select_tokens_plain

SCORE_BYTES = 256 << 20
"""Scores and lists held at once."""
ABSENT = tl.constexpr(-2147483648)
"""The ordered integer of no score: below that of every float32."""
DIRECT = 4096
"""A row of at most so many scores is held in registers as it is."""
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
    chunk = max(1, min(T, SCORE_BYTES // (4 * (stride + list_length(topk))))) if keys.S else 0
    buffer = torch.empty(chunk, stride, dtype=torch.float32, device=q.device)
    for first in range(0, T if keys.S else 0, max(chunk, 1)):
        rows = slice(first, min(first + chunk, T))
        tile = buffer[: rows.stop - first]
        write_scores(q[rows], keys, w[rows], starts[rows], ends[rows], tile, first)
        select_rows(tile[:, : keys.S], topk, starts[rows], ends[rows], indices[rows], None if scores is None else scores[rows])
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
    block, warps, span = tuning.get("block", 64), tuning.get("warps", 4), tuning.get("span", 4096 if t >= 256 else 1024)
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
                slot = tl.load(
                    TABLE + (first_row + tl.program_id(1)).to(tl.int64) * table_stride + s // PAGE, mask=s < high, other=0
                ).to(tl.int64)
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


def list_length(topk: int) -> int:
    """Places of a row's list: twice topk, a power of two."""
    return max(1024, triton.next_power_of_2(2 * topk))


def select_rows(scores: Tensor, topk: int, starts: Tensor, ends: Tensor, indices: Tensor, chosen: Tensor | None) -> None:
    """The topk best of each row of scores in [starts, ends): fills indices (all -1 before) and, if given, chosen scores.

    scores [t, S], rows 16 bytes apart or a multiple of it, at least S rounded up to 4 scores.
    """
    t, S = scores.shape
    whole = max(DIRECT, topk) >= S
    length = triton.next_power_of_2(S) if whole else list_length(topk)
    positions, found = (starts, starts) if whole else _filtered(scores, topk, starts, ends, length)
    select_kernel[(t,)](
        scores, positions, found, starts, ends, indices, indices if chosen is None else chosen, scores.stride(0), topk,
        N=length, LISTED=not whole, SCORES=chosen is not None, num_warps=max(4, min(32, length // 512)),
        **_registers(scores.device, 64 if length >= 2048 else None),
    )  # fmt: skip


def _registers(device: torch.device, limit: int | None) -> dict[str, int]:
    """A limit of registers per thread: several programs of a processor then hide each other's barriers."""
    return {"maxnreg": limit} if limit and device.type == "cuda" and torch.version.hip is None else {}


def _filtered(scores: Tensor, topk: int, starts: Tensor, ends: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Lists of the positions [t, length] whose scores reach a sampled threshold, in order, and for each row (t, 2):

    the threshold as an ordered integer, and how many reach it (-1: the row is no longer than a list, and is not listed).
    """
    t, S = scores.shape
    positions = torch.empty(t, length, dtype=torch.int32, device=scores.device)
    found = torch.empty(t, 2, dtype=torch.int32, device=scores.device)
    sample = max(1024, min(8192, triton.next_power_of_2(S) // 16))
    filter_kernel[(t,)](
        scores, starts, ends, positions, found, scores.stride(0), topk, LENGTH=length, SAMPLE=sample, N=2048,
        num_warps=4, **_registers(scores.device, 96),
    )  # fmt: skip
    return positions, found


@triton.jit
def _ordered(x):
    """float32 -> int32 in the same order; both zeros are one, NaN and -inf the lowest finite number."""
    x = tl.where((x != x) | (x == float("-inf")), -3.4028234663852886e38, x + 0.0)
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value(key):
    """The float32 of an ordered integer."""
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _middle(a, b):
    """(a + b) / 2 of two int32, rounded down, without overflow."""
    return (a >> 1) + (b >> 1) + (a & b & 1)


@triton.jit
def _quantile(upper):
    """About how many deviations above the mean a share `upper` of a normal distribution lies (Abramowitz and Stegun, 26.2.22)."""
    tail = tl.maximum(tl.minimum(upper, 1.0 - upper), 1e-6)
    t = tl.sqrt(-2.0 * tl.log(tail))
    z = t - (2.30753 + 0.27061 * t) / (1.0 + t * (0.99229 + 0.04481 * t))
    return tl.where(upper < 0.5, z, -z)


@triton.jit
def _between(rank, low, high, most, least):
    """Where, between the values of low and high - 1, about `rank` values lie above, if most do above low and least above high."""
    a, b = _value(low), _value(high - 1)
    rank = tl.maximum(tl.minimum(rank, most - 0.5), least)
    return _ordered(a + (b - a) * ((most - rank) / tl.maximum(most - least, 1.0)))


@triton.jit
def _threshold(key, count, topk):
    """The ordered integers low < high where at least topk keys are >= low and fewer than topk are >= high.

    Either exactly topk keys are >= low, or high = low + 1: then low itself is tied. Also the number of keys >= high.
    key [N], ABSENT where there is no score; count > topk of them are present, at most 32,768.
    """
    there = key != ABSENT
    low = tl.min(tl.where(there, key, 2147483647), 0)
    high = tl.max(key, 0) + 1
    above_low, above_high = count, count * 0
    x = tl.where(there, _value(key), 0.0)
    mean = tl.sum(x, 0) / count
    deviation = tl.sqrt(tl.maximum(tl.sum(x * x, 0) / count - mean * mean, 0.0))
    share = topk / count.to(tl.float32)
    step = count * 0
    while (low + 1 < high) & (above_low != topk):
        step += 1
        if step % 3 == 0:
            low = tl.min(tl.where(key >= low, key, 2147483647), 0)
            high = tl.max(tl.where(key < high, key, ABSENT), 0) + 1
        if low + 1 < high:
            most, least = above_low.to(tl.float32), above_high.to(tl.float32)
            if step == 1:
                first = _ordered(mean + deviation * _quantile(1.25 * share))
                second = _ordered(mean + deviation * _quantile(0.8 * share))
            elif (step % 3 == 0) | (most > 4 * least):
                second = _middle(low, high)
                first = _middle(low, second)
            else:
                margin = 0.25 * tl.sqrt(most - least)
                first = _between(topk + margin, low, high, most, least)
                second = _between(topk - margin, low, high, most, least)
            first = tl.minimum(tl.maximum(first, low + 1), high - 1)
            second = tl.minimum(tl.maximum(second, first), high - 1)
            both = tl.sum((key >= first).to(tl.int32) + ((key >= second).to(tl.int32) << 16), 0)  # two counts in one sum
            above_first, above_second = both & 0xFFFF, (both >> 16) & 0xFFFF
            enough_first, enough_second = above_first >= topk, above_second >= topk
            low = tl.where(enough_second, second, tl.where(enough_first, first, low))
            above_low = tl.where(enough_second, above_second, tl.where(enough_first, above_first, above_low))
            high = tl.where(enough_first, tl.where(enough_second, high, second), first)
            above_high = tl.where(enough_first, tl.where(enough_second, above_high, above_second), above_first)
    return low, high, above_high


@triton.jit
def _row_block(X, block, lane, start, end):
    """Ordered integers of a block of a row, ABSENT outside [start, end), and their columns."""
    column = tl.multiple_of(block, 4) + lane
    x = tl.load(X + column, mask=column // 4 * 4 < end, other=0.0)  # four at a time: a row is padded to that
    return tl.where((column >= start) & (column < end), _ordered(x), ABSENT), column


@triton.jit
def filter_kernel(X, STARTS, ENDS, POSITIONS, FOUND, stride, topk, LENGTH: tl.constexpr, SAMPLE: tl.constexpr, N: tl.constexpr):
    """Grid (rows): lists what reaches a threshold read off SAMPLE scores at uneven steps; see _filtered."""
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(STARTS + row), tl.load(ENDS + row)
    X += row * stride
    POSITIONS += row * LENGTH
    count = end - start
    threshold, reach = start * 0 + ABSENT + 1, start * 0 - 1
    if count > LENGTH:
        i, step = tl.arange(0, SAMPLE), count // SAMPLE
        sample = _ordered(tl.load(X + start + i * step + (((i * 40503) & 0x7FFF) * step >> 15)))
        expected = SAMPLE * (topk / count.to(tl.float32))
        rank = (expected + 4.5 * tl.sqrt(expected) + 4).to(tl.int32)
        if rank < SAMPLE:
            threshold, _, _ = _threshold(sample, count * 0 + SAMPLE, rank)
        # NaN and -inf, which rank lowest, never reach the bar: enough scores do without them, or the list is not used.
        bar = _value(threshold)
        lane = tl.arange(0, N)
        reach += 1
        for block in range(start // 4 * 4, end, N):
            column = tl.multiple_of(block, 4) + lane
            x = tl.load(X + column, mask=column // 4 * 4 < end, other=0.0)
            taken = (x >= bar) & (column >= start) & (column < end)
            place = reach - 1 + tl.cumsum(taken.to(tl.int32), 0)
            tl.store(POSITIONS + place, column, mask=taken & (place < LENGTH))
            reach += tl.sum(taken.to(tl.int32), 0)
    tl.store(FOUND + row * 2, threshold)
    tl.store(FOUND + row * 2 + 1, reach)


@triton.jit
def _row_threshold(X, start, end, topk, threshold, N: tl.constexpr):
    """As _threshold, for a row in memory, one probe a pass: for rows whose sample misled, and rows full of ties.

    The sample's threshold is tried first: where most of a row is one value, that is it.
    """
    lane = tl.arange(0, N)
    reach, exceed = start * 0, start * 0
    for block in range(start // 4 * 4, end, N):
        key, _ = _row_block(X, block, lane, start, end)
        reach += tl.sum((key >= threshold).to(tl.int32), 0)
        exceed += tl.sum((key > threshold).to(tl.int32), 0)
    low, high, above_high = start * 0 + ABSENT + 1, start * 0 + 2147483647, start * 0
    if reach >= topk:
        low = threshold
        if exceed < topk:
            high, above_high = threshold + 1, exceed
    else:
        high, above_high = threshold, reach
    step, exact = start * 0, start < 0
    while (low + 1 < high) & (exact == 0):
        step += 1
        if step % 4 == 0:  # shrink to values that occur
            least, greatest = 2147483647, ABSENT
            for block in range(start // 4 * 4, end, N):
                key, _ = _row_block(X, block, lane, start, end)
                least = tl.minimum(least, tl.min(tl.where(key >= low, key, 2147483647), 0))
                greatest = tl.maximum(greatest, tl.max(tl.where(key < high, key, ABSENT), 0))
            low, high = least, greatest + 1
        if low + 1 < high:
            probe = _middle(low, high)
            above = step * 0
            for block in range(start // 4 * 4, end, N):
                key, _ = _row_block(X, block, lane, start, end)
                above += tl.sum((key >= probe).to(tl.int32), 0)
            enough = above >= topk
            low = tl.where(enough, probe, low)
            high = tl.where(enough, high, probe)
            above_high = tl.where(enough, above_high, above)
            exact = above == topk
    return low, high, above_high


@triton.jit
def _take(key, low, high, wanted, sure_before, tied_before):
    """Which keys are taken (all >= high, and the first `wanted` of [low, high)), each one's place, and the running counts.

    Two prefix sums in one: a block holds at most 32,768 keys.
    """
    sure, tied = key >= high, (key >= low) & (key < high)
    ahead = tl.cumsum(sure.to(tl.int32) + (tied.to(tl.int32) << 16), 0)
    sure_ahead = sure_before + (ahead & 0xFFFF) - sure.to(tl.int32)
    tied_ahead = tied_before + ((ahead >> 16) & 0xFFFF) - tied.to(tl.int32)
    taken = sure | (tied & (tied_ahead < wanted))
    return taken, sure_ahead + tl.minimum(tied_ahead, wanted), sure, tied


@triton.jit
def select_kernel(
    X, POSITIONS, FOUND, STARTS, ENDS, INDICES, CHOSEN, stride, topk,
    N: tl.constexpr, LISTED: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """Grid (rows): the topk best of a row, by ascending position. LISTED: of the row's list, where that holds them all."""
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(STARTS + row), tl.load(ENDS + row)
    X += row * stride
    INDICES += row * topk
    CHOSEN += row * topk
    lane = tl.arange(0, N)
    if LISTED:
        threshold, reach = tl.load(FOUND + row * 2), tl.load(FOUND + row * 2 + 1)
        if reach < 0:
            _write_selection(X, start + lane, end - start, INDICES, CHOSEN, topk, N, SCORES)
        elif (reach <= N) & (reach >= topk):
            column = tl.load(POSITIONS + row * N + lane, mask=lane < reach, other=0)
            _write_selection(X, column, reach, INDICES, CHOSEN, topk, N, SCORES)
        else:
            _write_row_selection(X, start, end, INDICES, CHOSEN, topk, threshold, N, SCORES)
    else:
        _write_selection(X, start + lane, end - start, INDICES, CHOSEN, topk, N, SCORES)


@triton.jit
def _write_selection(X, column, count, INDICES, CHOSEN, topk, N: tl.constexpr, SCORES: tl.constexpr):
    """The topk best of a row's scores at `count` columns, given in ascending order."""
    there = tl.arange(0, N) < count
    key = tl.where(there, _ordered(tl.load(X + column, mask=there, other=0.0)), ABSENT)
    low, high, above = count * 0 + ABSENT + 1, count * 0 + ABSENT + 1, count
    if count > topk:
        low, high, above = _threshold(key, count, topk)
    taken, place, _, _ = _take(key, low, high, topk - above, 0, 0)
    tl.store(INDICES + place, column, mask=taken)
    if SCORES:
        tl.store(CHOSEN + place, _value(key), mask=taken)


@triton.jit
def _write_row_selection(X, start, end, INDICES, CHOSEN, topk, threshold, N: tl.constexpr, SCORES: tl.constexpr):
    """The topk best of a whole row, block by block."""
    lane = tl.arange(0, N)
    low, high, above = _row_threshold(X, start, end, topk, threshold, N)
    sure_before, tied_before = start * 0, start * 0
    for block in range(start // 4 * 4, end, N):
        key, column = _row_block(X, block, lane, start, end)
        taken, place, sure, tied = _take(key, low, high, topk - above, sure_before, tied_before)
        tl.store(INDICES + place, column, mask=taken)
        if SCORES:
            tl.store(CHOSEN + place, _value(key), mask=taken)
        sure_before += tl.sum(sure.to(tl.int32), 0)
        tied_before += tl.sum(tied.to(tl.int32), 0)
