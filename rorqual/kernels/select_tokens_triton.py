"""Index scores and exact top-k selection in Triton, on any GPU that Triton serves; bfloat16, float16, float32 and FP8.

Scores of some rows are written to a buffer of bounded size (SCORE_BYTES, whatever T and S). Selection then reads each row once. A
bar that a few more than `topk` scores should reach is read off a sample of the row (bar_kernel); those that reach it are listed
in order (list_kernel); the list is searched for the threshold, and what reaches that is written (finish_kernel). Where rows are
many each is one warp's, so that nothing waits at a barrier. Where the sample misled (too many or too few reach the bar) the row
itself is searched (search_kernel): the set never depends on the sample, tiling or launch.

The search is over float32 values as ordered integers. It narrows a bracket by counting, two probes a pass, and ends when
exactly `topk` values lie above a probe or the bracket is one value wide (ties). The first probes suppose an exponential tail, the
next interpolate; every sixth step shrinks the bracket to values that occur and halves the integers, so the number of passes is
bounded whatever the distribution.

`lane`, the places of a block, is handed down from the kernels: select_tokens_gluon hands one whose layout it has chosen to the
same functions, since Triton's own choice converts every block through shared memory before the scattered stores.
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
LOWEST = tl.constexpr(-3.4028234663852886e38)
"""What NaN and -inf count as: the lowest finite float32..."""
LEAST = tl.constexpr(-2139095040)
"""...whose ordered integer this is."""
BEYOND = tl.constexpr(2139095041)
"""One above the ordered integer of infinity."""
MANY_ROWS = 1024
"""From so many rows on a row is listed by one warp, below it by several."""
ROW, LIST, HELD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Where scores are searched: in a row in memory, in a list of one, in registers."""
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
    row_bytes = 4 * stride + 8 * (list_length(topk) + max(list_block(1)))
    chunk = max(1, min(T, SCORE_BYTES // row_bytes)) if keys.S else 0
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
        half = 0.5 * tl.load(W + row * I + head, mask=real, other=0.0)
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
            x = (x + tl.abs(x)) * half[None, :]  # twice the ReLU, exactly: an addition is twice as fast as a maximum
            x = tl.sum(tl.reshape(x, [BK, BQ, IP]), 2)  # [BK, BQ]
            if SCALED:
                x = x * tl.load(SCALE + s, mask=s < high, other=0.0)[:, None]
            if PACKED:
                scale = (K + slot * PAGE * (C + 4) + PAGE * C + (s % PAGE) * 4).to(tl.pointer_type(tl.float32))
                x = x * tl.load(scale, mask=s < high, other=0.0)[:, None]
            tl.store(OUT + t.to(tl.int64)[None, :] * stride + s[:, None], x, mask=(s < high)[:, None] & (t < T)[None, :])


def list_length(topk: int) -> int:
    """Places of a list, twice topk, a power of two. A row of at most so many scores needs none."""
    return max(1024, triton.next_power_of_2(2 * topk))


def list_block(rows: int) -> tuple[int, int]:
    """Scores that a program lists at a time, and its warps. A list has room for a block more than its length."""
    return (512, 1) if rows >= MANY_ROWS else (2048, 8)


def sample_length(topk: int, S: int) -> int:
    """Scores of a sample: of a row of S, 128 should reach the threshold, so that lists seldom overflow."""
    return max(1024, min(1 << 15, triton.next_power_of_2(128 * S // topk), triton.next_power_of_2(S) // 4))


def select_rows(
    scores: Tensor, topk: int, starts: Tensor, ends: Tensor, indices: Tensor, chosen: Tensor | None, portable: bool = False
) -> None:
    """The topk best of each row of scores in [starts, ends): fills indices (all -1 before) and, if given, chosen scores.

    scores [t, S], rows 64 bytes apart or a multiple of it, at least S rounded up to 4 scores. portable: without Gluon.
    """
    t, S = scores.shape
    length, sample = list_length(topk), sample_length(topk, S)
    block, warps = list_block(t)
    lists = torch.empty(t if length < S else 0, length + block, dtype=torch.int64, device=scores.device)
    state = torch.empty(2, t, dtype=torch.int32, device=scores.device)  # the bar, then whether it misled; reach
    rows = scores, starts, ends
    out = indices, indices if chosen is None else chosen
    blocks = {"N": 512, "num_warps": 1} if warps == 1 else {"N": 1024, "num_warps": 4}
    listing, finishing, list_layout, finish_layout = list_kernel, finish_kernel, {}, {}
    if not portable and scores.is_cuda and torch.version.hip is None:
        from rorqual.kernels import select_tokens_gluon

        listing, finishing = select_tokens_gluon.list_kernel, select_tokens_gluon.finish_kernel
        list_layout, finish_layout = {"WIDE": 4 if warps == 1 else 8}, {"WIDE": 8}
    if length < S:
        bar_kernel[(t,)](*rows, *state, scores.stride(0), topk, LENGTH=length, N=sample, num_warps=min(16, sample // 1024))
        listing[(t,)](*rows, lists, *state, scores.stride(0), LENGTH=length, N=block, num_warps=warps, **list_layout)
    finishing[(t,)](
        *rows, lists, *state, *out, scores.stride(0), topk, LENGTH=length, BLOCK=block, LISTED=length < S,
        SCORES=chosen is not None, **blocks, **finish_layout,
    )  # fmt: skip
    if length < S:
        search_kernel[(triton.cdiv(t, 32),)](
            *rows, state[0], *out, scores.stride(0), topk, t, SCORES=chosen is not None, N=4096, ROWS=32, num_warps=16
        )


@triton.jit
def _ordered(x):
    """float32 -> int32 in the same order; both zeros are one. No NaN."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
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
def _score(entry):
    """The score of a list's entry: it stands above its column in one int64."""
    return (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _block(X, block, start, end, lane, WHERE: tl.constexpr):
    """Scores of a block from a multiple of 8 on; -inf outside [start, end), and inside LOWEST what is NaN or -inf."""
    if WHERE == HELD:
        return X
    elif WHERE == LIST:  # it ends with a block of -inf, and holds no NaN
        return _score(tl.load(X + (tl.multiple_of(block, 8) + lane)))
    else:
        column = tl.multiple_of(block, 8) + lane
        x = tl.load(X + column, mask=column // 4 * 4 < end, other=0.0)  # four at a time: a row is padded to that
        return tl.where((column >= start) & (column < end), tl.maximum(x, LOWEST), float("-inf"))


@triton.jit
def _counts(X, start, end, first, second, lane, WHERE: tl.constexpr):
    """How many scores reach the ordered integers `first` and `second`: two counts in one sum, a block being at most 32,768."""
    a, b = _value(first), _value(second)
    above_first, above_second = first * 0, first * 0
    for block in range(start // 8 * 8, end, lane.shape[0]):
        x = _block(X, block, start, end, lane, WHERE)
        both = tl.sum((x >= a).to(tl.int32) + tl.where(x >= b, 65536, 0), 0)
        above_first += both & 0xFFFF
        above_second += both >> 16
    return above_first, above_second


@triton.jit
def _mean(X, start, end, lane, WHERE: tl.constexpr):
    """The mean of the scores that are above -inf."""
    total, count = 0.0, 0.0
    for block in range(start // 8 * 8, end, lane.shape[0]):
        x = _block(X, block, start, end, lane, WHERE)
        total += tl.sum(tl.where(x >= LOWEST, x, 0.0), 0)
        count += tl.sum(tl.where(x >= LOWEST, 1.0, 0.0), 0)
    return total / count


@triton.jit
def _extent(X, start, end, low, high, lane, WHERE: tl.constexpr):
    """Of the scores whose ordered integers lie in [low, high): the least, and one above the greatest."""
    least, greatest = start * 0 + BEYOND, start * 0 + LEAST
    for block in range(start // 8 * 8, end, lane.shape[0]):
        key = _ordered(_block(X, block, start, end, lane, WHERE))
        inside = (key >= low) & (key < high)
        least = tl.minimum(least, tl.min(tl.where(inside, key, BEYOND), 0))
        greatest = tl.maximum(greatest, tl.max(tl.where(inside, key, LEAST), 0))
    return least, greatest + 1


@triton.jit
def _between(rank, low, high, most, least):
    """Where, between the values of low and high - 1, about `rank` values lie above, if most do above low and least above high."""
    a, b = _value(low), _value(high - 1)
    return _ordered(a + (b - a) * ((most - rank) / tl.maximum(most - least, 1.0)))


@triton.jit
def _tail(rank, low, mean, most):
    """Above what about `rank` of `most` values lie, if beyond low they thin out exponentially."""
    a = _value(low)
    return _ordered(a + (mean - a) * tl.log(most / rank))


@triton.jit
def _narrow(X, start, end, wanted, enough, count, low, lane, WHERE: tl.constexpr):
    """The ordered integers low <= high between which the threshold lies, and how many scores reach high.

    low = high: `wanted` to `enough` scores reach it. high = low + 1: low is tied, fewer than `wanted` reach high.
    There are `count` scores in [start, end), at least `wanted`, and all reach the `low` given (LEAST: nothing is known).
    """
    high, above_low, above_high = wanted * 0 + BEYOND, count, wanted * 0
    goal = 0.5 * (wanted + enough).to(tl.float32)
    first, second = low, low
    step = wanted * 0
    while (low + 1 < high) & (above_low > enough):
        if (step % 6 == 5) | (high == BEYOND) & ((step > 0) | (low == LEAST)):
            low, high = _extent(X, start, end, low, high, lane, WHERE)
        if low + 1 < high:
            most, least = above_low.to(tl.float32), above_high.to(tl.float32)
            if step == 0:
                mean = _mean(X, start, end, lane, WHERE)
                first, second = _tail(1.05 * goal, low, mean, most), _tail(0.95 * goal, low, mean, most)
            elif (step % 6 == 5) | (most > 4 * least):
                second = _middle(low, high)
                first = _middle(low, second)
            else:
                margin = tl.minimum(0.25 * tl.sqrt(most - least), 0.25 * (most - least))
                first = _between(tl.maximum(tl.minimum(goal + margin, most - 0.5), least), low, high, most, least)
                second = _between(tl.maximum(goal - margin, least), low, high, most, least)
            first = tl.minimum(tl.maximum(first, low + 1), high - 1)
            second = tl.minimum(tl.maximum(second, first), high - 1)
            above_first, above_second = _counts(X, start, end, first, second, lane, WHERE)
            enough_first, enough_second = above_first >= wanted, above_second >= wanted
            low = tl.where(enough_second, second, tl.where(enough_first, first, low))
            above_low = tl.where(enough_second, above_second, tl.where(enough_first, above_first, above_low))
            high = tl.where(enough_first, tl.where(enough_second, high, second), first)
            above_high = tl.where(enough_first, tl.where(enough_second, above_high, above_second), above_first)
        step += 1
    settled = above_low <= enough
    return low, tl.where(settled, low, high), tl.where(settled, above_low, above_high)


@triton.jit
def bar_kernel(X, STARTS, ENDS, BARS, REACH, stride, topk, LENGTH: tl.constexpr, N: tl.constexpr):
    """Grid (rows): the ordered integer that somewhat more than topk scores of a row should reach, for rows longer than a list.

    From a sample of N scores, runs of 8 at uneven steps: a run is a sector of memory.
    """
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(STARTS + row), tl.load(ENDS + row)
    count = end - start
    if count > LENGTH:
        lane = tl.arange(0, N)
        run, first = lane // 8, (start + 7) // 8
        step = tl.maximum((end // 8 - first) // (N // 8), 1)
        column = (first + run * step + (((run * 40503) & 0x7FFF) * step >> 15)) * 8 + lane % 8
        x = tl.load(X + row * stride + column, mask=column < end, other=LOWEST)
        expected = N * (topk / count.to(tl.float32))
        rank = tl.minimum((expected + 4.5 * tl.sqrt(expected) + 4).to(tl.int32), N)
        size, nothing = count * 0 + N, count * 0
        bar, _, _ = _narrow(tl.maximum(x, LOWEST), nothing, size, rank, rank + rank // 16, size, nothing + LEAST, lane, HELD)
        tl.store(BARS + row, bar)


@triton.jit
def _list_row(X, LIST_OF_ROW, start, end, bar, lane, LENGTH: tl.constexpr):
    """Lists the scores of a row that reach the bar, each above its column in one int64, in order; returns how many.

    A row whose list overflows is given up: some number above LENGTH.
    """
    N: tl.constexpr = lane.shape[0]
    reach = start * 0
    block = tl.multiple_of(start // 8 * 8, 8)
    column = block + lane
    x = tl.load(X + column, mask=column // 4 * 4 < end, other=0.0)
    while (block < end) & (reach <= LENGTH):
        ahead = tl.multiple_of(block + N, 8) + lane
        following = tl.load(X + ahead, mask=ahead // 4 * 4 < end, other=0.0)
        taken = x >= bar
        if (block < start) | (block + N > end):
            taken = taken & (column >= start) & (column < end)
        one = taken.to(tl.int32)
        entry = (x.to(tl.int32, bitcast=True).to(tl.int64) << 32) | column.to(tl.uint32, bitcast=True).to(tl.int64)
        tl.store(LIST_OF_ROW + ((reach - 1) + tl.cumsum(one, 0)), entry, mask=taken)
        reach += tl.sum(one, 0)
        block += N
        column = ahead
        x = following
    if reach <= LENGTH:
        tl.store(LIST_OF_ROW + reach + lane, (lane * 0 - 8388608).to(tl.int64) << 32)  # -inf
    return reach


@triton.jit
def _list(X, STARTS, ENDS, LISTS, BARS, REACH, stride, lane, LENGTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(STARTS + row), tl.load(ENDS + row)
    if end - start > LENGTH:
        bar = _value(tl.load(BARS + row))
        reach = _list_row(X + row * stride, LISTS + row * (LENGTH + lane.shape[0]), start, end, bar, lane, LENGTH)
        tl.store(REACH + row, reach)


@triton.jit
def list_kernel(X, STARTS, ENDS, LISTS, BARS, REACH, stride, LENGTH: tl.constexpr, N: tl.constexpr):
    """Grid (rows): see _list_row."""
    _list(X, STARTS, ENDS, LISTS, BARS, REACH, stride, tl.arange(0, N), LENGTH)


@triton.jit
def _write(X, start, end, low, high, wanted, INDICES, CHOSEN, lane, WHERE: tl.constexpr, SCORES: tl.constexpr):
    """Writes, by ascending column, all scores that reach high and the first `wanted` of [low, high).

    Two prefix sums in one: a block holds at most 32,768 scores.
    """
    sure_before, tied_before = start * 0, start * 0
    for block in range(start // 8 * 8, end, lane.shape[0]):
        place = tl.multiple_of(block, 8) + lane
        there = (place >= start) & (place < end)
        if WHERE == LIST:
            entry = tl.load(X + place)
            x, column = _score(entry), entry.to(tl.int32)
        else:
            x, column = _block(X, block, start, end, lane, WHERE), place
        if low == high:
            taken = (x >= _value(low)) & there
            one = taken.to(tl.int32)
            at = (sure_before - 1) + tl.cumsum(one, 0)
            sure_before += tl.sum(one, 0)
        else:
            key = _ordered(x)
            sure, tied = (key >= high) & there, (key >= low) & (key < high) & there
            both = sure.to(tl.int32) + tl.where(tied, 65536, 0)
            ahead = tl.cumsum(both, 0) - both
            tied_ahead = tied_before + (ahead >> 16)
            taken = sure | (tied & (tied_ahead < wanted))
            at = sure_before + (ahead & 0xFFFF) + tl.minimum(tied_ahead, wanted)
            total = tl.sum(both, 0)
            sure_before += total & 0xFFFF
            tied_before += total >> 16
        tl.store(INDICES + at, column, mask=taken)
        if SCORES:
            tl.store(CHOSEN + at, x, mask=taken)


@triton.jit
def _choose(X, start, end, count, low, topk, INDICES, CHOSEN, lane, WHERE: tl.constexpr, SCORES: tl.constexpr):
    """Searches, then writes. low: an ordered integer that all scores reach."""
    high, above = low, count
    if count > topk:
        low, high, above = _narrow(X, start, end, topk, topk, count, low, lane, WHERE)
    _write(X, start, end, low, high, topk - above, INDICES, CHOSEN, lane, WHERE, SCORES)


@triton.jit
def _finish(
    X, STARTS, ENDS, LISTS, MISLED, REACH, INDICES, CHOSEN, stride, topk, lane,
    LENGTH: tl.constexpr, BLOCK: tl.constexpr, LISTED: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """Selects from a row's list, or from a row no longer than that. MISLED: the bar, afterwards 1 where the list is of no use."""
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(STARTS + row), tl.load(ENDS + row)
    INDICES += row * topk
    CHOSEN += row * topk
    count = end - start
    misled = count * 0
    if count <= LENGTH:
        _choose(X + row * stride, start, end, count, count * 0 + LEAST, topk, INDICES, CHOSEN, lane, ROW, SCORES)
    elif LISTED:
        reach, bar = tl.load(REACH + row), tl.load(MISLED + row)
        misled = ((reach < topk) | (reach > LENGTH)).to(tl.int32)
        if misled == 0:
            OWN = LISTS + row * (LENGTH + BLOCK)
            _choose(OWN, count * 0, reach, reach, bar, topk, INDICES, CHOSEN, lane, LIST, SCORES)
    tl.debug_barrier()
    tl.store(MISLED + row, misled)


@triton.jit
def finish_kernel(
    X, STARTS, ENDS, LISTS, MISLED, REACH, INDICES, CHOSEN, stride, topk,
    LENGTH: tl.constexpr, BLOCK: tl.constexpr, LISTED: tl.constexpr, SCORES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Grid (rows): see _finish."""
    lane = tl.arange(0, N)
    _finish(X, STARTS, ENDS, LISTS, MISLED, REACH, INDICES, CHOSEN, stride, topk, lane, LENGTH, BLOCK, LISTED, SCORES)


@triton.jit
def search_kernel(
    X, STARTS, ENDS, MISLED, INDICES, CHOSEN, stride, topk, t, SCORES: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr
):
    """Grid (blocks of ROWS rows): the topk best of rows whose bar misled, from the row itself, with the warps of many."""
    first = tl.program_id(0) * ROWS
    mine = first + tl.arange(0, ROWS)
    if tl.max(tl.load(MISLED + mine, mask=mine < t, other=0), 0) > 0:
        lane = tl.arange(0, N)
        row = first.to(tl.int64)
        while row < tl.minimum(first + ROWS, t):
            if tl.load(MISLED + row) > 0:
                start, end = tl.load(STARTS + row), tl.load(ENDS + row)
                OWN, count = X + row * stride, end - start
                _choose(
                    OWN, start, end, count, count * 0 + LEAST, topk, INDICES + row * topk, CHOSEN + row * topk, lane, ROW, SCORES
                )
            row += 1
