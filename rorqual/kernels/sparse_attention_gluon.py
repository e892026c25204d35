"""Sparse MLA attention on Hopper (sm_90), in Gluon: latent 512, rope 64, heads in groups of 64.

Triton's own scheduling gives every warpgroup the whole 64 x 512 accumulator's work, or spills it. Here the roles are
written out. One program owns 64 heads of one query (and, in decode, one share of its keys) and holds four parts of a warpgroup
each: a producer that gathers key rows with cp.async, and consumers whose matrix products run asynchronously. The plain form
for every other GPU and shape is `sparse_attention_triton`.

Every run of a shared buffer index through `zero` (a run-time 0) keeps wgmma descriptors out of loop-invariant registers: with
constants the compiler hoists dozens of them and spills.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LATENT, ROPE, HEADS = 512, 64, 64
"""The released shape, and the heads of one program (the rows of one wgmma)."""
LOG2E = 1.4426950408889634
FLOOR = gl.constexpr(-1e30)
"""The running maximum before any key: finite, so that masked scores (-inf) less it are -inf and never NaN."""

# Layouts: scores [64 heads, 64 keys], accumulators [64 heads, 256 columns], gathers of 64 rows, vectors by head.
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
WIDE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
GATHER = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0]))
TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
VECTOR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
BY_HEAD = gl.constexpr(gl.SliceLayout(1, SCORES.value))
BY_KEY = gl.constexpr(gl.SliceLayout(0, SCORES.value))
BY_HEAD_WIDE = gl.constexpr(gl.SliceLayout(1, WIDE.value))


@gluon.jit
def _gather(smem, base, rows, there, WIDTH: gl.constexpr):
    """Start copying WIDTH columns of 64 rows, whose element offsets are `rows`, into shared memory; zeros where not `there`."""
    columns = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, GATHER))
    async_copy.async_copy_global_to_shared(smem, base + rows[:, None] + columns[None, :], mask=there[:, None])


@gluon.jit
def _produce(keys, barriers, KV, indices, blocks, topk):
    """Gather the key rows of each block of 64 into its buffer, left and right halves apart, as soon as consumers free them."""
    left, right, rope = keys
    full_left, full_right, free_left, free_right = barriers
    lane = gl.arange(0, 64, layout=gl.SliceLayout(1, GATHER))
    index = gl.load(indices + lane, mask=lane < topk, other=-1)
    for block in range(blocks):
        buffer = block & 1
        phase = ((block >> 1) & 1) ^ 1
        rows = gl.maximum(index, 0).to(gl.int64) * 576
        there = index >= 0  # a foreign row is never read: it may hold NaN
        ahead = (block + 1) * 64 + lane
        index = gl.load(indices + ahead, mask=ahead < topk, other=-1)
        mbarrier.wait(free_left.index(buffer), phase)
        _gather(left.index(buffer), KV, rows, there, 256)
        async_copy.mbarrier_arrive(full_left.index(buffer), increment_count=False)
        mbarrier.wait(free_right.index(buffer), phase)
        _gather(right.index(buffer), KV + 256, rows, there, 256)
        _gather(rope.index(buffer), KV + 512, rows, there, 64)
        async_copy.mbarrier_arrive(full_right.index(buffer), increment_count=False)
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit
def _score(query, keys, barriers, own, zero, phase):
    """Scores [64, 64] of the block in buffer `own`; the left half's product starts before the right half has arrived."""
    query_left, query_right, query_rope = query
    left, right, rope = keys
    full_left, full_right, _free_left, _free_right = barriers
    x = gl.zeros([64, 64], gl.float32, layout=SCORES)
    mbarrier.wait(full_left.index(own), phase)
    fence_async_shared()
    x = warpgroup_mma(query_left.index(zero), left.index(zero + own).permute((1, 0)), x, use_acc=False, is_async=True)
    mbarrier.wait(full_right.index(own), phase)
    fence_async_shared()
    x = warpgroup_mma(query_right.index(zero), right.index(zero + own).permute((1, 0)), x, is_async=True)
    x = warpgroup_mma(query_rope.index(zero), rope.index(zero + own).permute((1, 0)), x, is_async=True)
    return warpgroup_mma_wait(0, deps=[x])


@gluon.jit
def _masked(x, indices, first, topk, scale_log2):
    lane = first + gl.arange(0, 64, layout=BY_KEY)
    index = gl.load(indices + lane, mask=lane < topk, other=-1)
    return gl.where((index >= 0)[None, :], x * scale_log2, float("-inf"))


@gluon.jit
def _rescaled(acc, factor):
    return acc * gl.convert_layout(factor, BY_HEAD_WIDE)[:, None]


@gluon.jit
def _publish(probabilities, maximum, block, maxima, own: gl.constexpr, barrier):
    """Hand a block's probabilities (written over its rope keys, needed no more) and the running maximum to the other consumer."""
    gl.thread_barrier()  # every warp has read the rope keys
    block.store(probabilities)
    maxima.index(own).store(maximum)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(barrier.index(own), count=1)


@gluon.jit
def _value_product(probabilities, values, acc, freed):
    acc = warpgroup_mma(probabilities, values, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    gl.thread_barrier()
    mbarrier.arrive(freed, count=1)
    return acc


@gluon.jit
def _store_half(acc, total, staging, out, OUT_WIDE: gl.constexpr):
    """Normalise 256 value columns and write them; out points at this program's first head and column."""
    o = acc * gl.convert_layout(1.0 / total, BY_HEAD_WIDE)[:, None]
    column = gl.arange(0, 256, layout=gl.SliceLayout(0, WIDE))
    if OUT_WIDE:  # float32 partial of one share of the keys
        head = gl.arange(0, 64, layout=gl.SliceLayout(1, WIDE))
        gl.store(out + head[:, None] * 512 + column[None, :], o)
    else:
        staging.store(o.to(staging.dtype))
        gl.thread_barrier()
        head = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
        column = gl.arange(0, 256, layout=gl.SliceLayout(0, ROWS))
        gl.store(out + head[:, None] * 512 + column[None, :], staging.load(ROWS))


@gluon.jit
def _consume_even(query, keys, barriers, exchange, OUT, LSE, indices, pairs, topk, scale_log2, zero, OUT_WIDE: gl.constexpr):
    """Scores the even blocks; owns value columns 0..255."""
    left, _right, rope = keys
    _full_left, _full_right, free_left, _free_right = barriers
    maxima, sums, ready, summed = exchange
    m = gl.full([64], FLOOR, gl.float32, layout=BY_HEAD)
    l = gl.full([64], 0.0, gl.float32, layout=BY_HEAD)
    acc = gl.zeros([64, 256], gl.float32, layout=WIDE)
    for pair in range(pairs):
        phase = pair & 1
        even = pair * zero
        odd = even + 1
        x = _score(query, keys, barriers, 0, even, phase)
        x = _masked(x, indices, pair * 128, topk, scale_log2)
        m_even = gl.maximum(m, gl.max(x, 1))
        p = gl.exp2(x - m_even[:, None])
        shrink = gl.exp2(m - m_even)
        l = l * shrink + gl.sum(p, 1)
        _publish(p.to(rope.dtype), m_even, rope.index(even), maxima, 0, ready)
        acc = _value_product(rope.index(even), left.index(even), _rescaled(acc, shrink), free_left.index(0))
        mbarrier.wait(ready.index(1), phase)
        fence_async_shared()
        m = maxima.index(1).load(BY_HEAD)
        shrink = gl.exp2(m_even - m)
        l = l * shrink
        acc = _value_product(rope.index(odd), left.index(odd), _rescaled(acc, shrink), free_left.index(1))
    sums.index(0).store(l)
    gl.thread_barrier()
    mbarrier.arrive(summed.index(0), count=1)
    mbarrier.wait(summed.index(1), 0)
    total = l + sums.index(1).load(BY_HEAD)
    head = gl.arange(0, 64, layout=BY_HEAD)
    gl.store(LSE + head, gl.where(total > 0.0, (m + gl.log2(total)) * 0.6931471805599453, float("-inf")))
    _store_half(acc, gl.where(total > 0.0, total, 1.0), left.index(0), OUT, OUT_WIDE)


@gluon.jit
def _consume_odd(query, keys, barriers, exchange, OUT, LSE, indices, pairs, topk, scale_log2, zero, OUT_WIDE: gl.constexpr):
    """Scores the odd blocks; owns value columns 256..511."""
    _left, right, rope = keys
    _full_left, _full_right, _free_left, free_right = barriers
    maxima, sums, ready, summed = exchange
    m = gl.full([64], FLOOR, gl.float32, layout=BY_HEAD)
    l = gl.full([64], 0.0, gl.float32, layout=BY_HEAD)
    acc = gl.zeros([64, 256], gl.float32, layout=WIDE)
    for pair in range(pairs):
        phase = pair & 1
        even = pair * zero
        odd = even + 1
        x = _score(query, keys, barriers, 1, even, phase)
        x = _masked(x, indices, pair * 128 + 64, topk, scale_log2)
        largest = gl.max(x, 1)
        mbarrier.wait(ready.index(0), phase)
        fence_async_shared()
        m_even = maxima.index(0).load(BY_HEAD)
        shrink_even = gl.exp2(m - m_even)
        acc = warpgroup_mma(rope.index(even), right.index(even), _rescaled(acc, shrink_even), is_async=True)
        m = gl.maximum(m_even, largest)
        p = gl.exp2(x - m[:, None])
        shrink = gl.exp2(m_even - m)
        l = l * (shrink_even * shrink) + gl.sum(p, 1)
        _publish(p.to(rope.dtype), m, rope.index(odd), maxima, 1, ready)
        acc = warpgroup_mma_wait(0, deps=[acc])
        gl.thread_barrier()
        mbarrier.arrive(free_right.index(0), count=1)
        acc = _value_product(rope.index(odd), right.index(odd), _rescaled(acc, shrink), free_right.index(1))
    sums.index(1).store(l)
    gl.thread_barrier()
    mbarrier.arrive(summed.index(1), count=1)
    mbarrier.wait(summed.index(0), 0)
    total = l + sums.index(0).load(BY_HEAD)
    _store_half(acc, gl.where(total > 0.0, total, 1.0), right.index(1), OUT + 256, OUT_WIDE)


@gluon.jit
def _load_query(query, base):
    left, right, rope = query
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, GATHER)) * 576
    there = rows >= 0
    _gather(left.index(0), base, rows, there, 256)
    _gather(right.index(0), base + 256, rows, there, 256)
    _gather(rope.index(0), base + 512, rows, there, 64)
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _barriers(COUNT: gl.constexpr):
    pair = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(pair.index(i), count=COUNT)
    return pair


@gluon.jit(do_not_specialize=["zero", "topk", "pairs"])
def forward_kernel(
    Q, KV, INDICES, OUT, LSE, scale_log2, zero, topk, pairs, H: gl.constexpr, OUT_WIDE: gl.constexpr, REGISTERS: gl.constexpr
):
    """Grid (H / 64, T, shares); share i takes `pairs` blocks of 128 indices. OUT [shares, T, H, 512], LSE [shares, T, H]."""
    first_head = gl.program_id(0) * 64
    query_row = gl.program_id(1).to(gl.int64)
    share = gl.program_id(2)
    dtype: gl.constexpr = Q.dtype.element_ty
    query = (
        gl.allocate_shared_memory(dtype, [1, 64, 256], TILE),
        gl.allocate_shared_memory(dtype, [1, 64, 256], TILE),
        gl.allocate_shared_memory(dtype, [1, 64, 64], TILE),
    )
    keys = (
        gl.allocate_shared_memory(dtype, [2, 64, 256], TILE),
        gl.allocate_shared_memory(dtype, [2, 64, 256], TILE),
        gl.allocate_shared_memory(dtype, [2, 64, 64], TILE),
    )
    exchange = (
        gl.allocate_shared_memory(gl.float32, [2, 64], VECTOR),
        gl.allocate_shared_memory(gl.float32, [2, 64], VECTOR),
        _barriers(1),
        _barriers(1),
    )
    barriers = (_barriers(128), _barriers(128), _barriers(1), _barriers(1))
    _load_query(query, Q + (query_row * H + first_head) * 576)
    skipped = share * pairs * 128
    indices = INDICES + query_row * topk + skipped
    left_over = topk - skipped
    row = (share.to(gl.int64) * gl.num_programs(1) + query_row) * H + first_head
    out = OUT + row * 512
    lse = LSE + row
    gl.warp_specialize(
        [
            (_produce, (keys, barriers, KV, indices, pairs * 2, left_over)),
            (_consume_even, (query, keys, barriers, exchange, out, lse, indices, pairs, left_over, scale_log2, zero, OUT_WIDE)),
            (_consume_odd, (query, keys, barriers, exchange, out, lse, indices, pairs, left_over, scale_log2, zero, OUT_WIDE)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )


# Backward. The latent is held in four quarters of 128 columns, so that a consumer frees the left half of a block while it still
# works on the right one: there is room for a single buffer of keys beside the queries and the output gradients.
QUARTER = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))


@gluon.jit
def _gather_quarters(latent, first: gl.constexpr, count: gl.constexpr, base, rows, there):
    for i in gl.static_range(count):
        _gather(latent.index(first + i), base + (first + i) * 128, rows, there, 128)


@gluon.jit
def _produce_once(keys, barriers, KV, indices, blocks, topk):
    """As _produce, with one buffer, each half refilled as soon as both consumers have freed it."""
    latent, rope = keys
    full_left, full_right, free_left, free_right = barriers
    lane = gl.arange(0, 64, layout=gl.SliceLayout(1, GATHER))
    index = gl.load(indices + lane, mask=lane < topk, other=-1)
    for block in range(blocks):
        phase = (block & 1) ^ 1
        rows = gl.maximum(index, 0).to(gl.int64) * 576
        there = index >= 0  # a foreign row is never read: it may hold NaN
        ahead = (block + 1) * 64 + lane
        index = gl.load(indices + ahead, mask=ahead < topk, other=-1)
        mbarrier.wait(free_left, phase)
        _gather_quarters(latent, 0, 2, KV, rows, there)
        async_copy.mbarrier_arrive(full_left, increment_count=False)
        mbarrier.wait(free_right, phase)
        _gather_quarters(latent, 2, 2, KV, rows, there)
        _gather(rope.index(0), KV + 512, rows, there, 64)
        async_copy.mbarrier_arrive(full_right, increment_count=False)
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit
def _product_with_keys(rows, latent, full_left, full_right, zero, phase):
    """rows [64, 512] times the block's latents: [64, 64], still in flight."""
    x = gl.zeros([64, 64], gl.float32, layout=SCORES)
    mbarrier.wait(full_left, phase)
    fence_async_shared()
    x = warpgroup_mma(rows.index(zero), latent.index(zero).permute((1, 0)), x, use_acc=False, is_async=True)
    x = warpgroup_mma(rows.index(zero + 1), latent.index(zero + 1).permute((1, 0)), x, is_async=True)
    mbarrier.wait(full_right, phase)
    fence_async_shared()
    x = warpgroup_mma(rows.index(zero + 2), latent.index(zero + 2).permute((1, 0)), x, is_async=True)
    return warpgroup_mma(rows.index(zero + 3), latent.index(zero + 3).permute((1, 0)), x, is_async=True)


@gluon.jit
def _write_tile(tile, out, topk, first):
    """A [64 heads, 64 keys] tile from shared memory to rows of `topk` numbers."""
    head = gl.arange(0, 64, layout=gl.SliceLayout(1, GATHER))
    key = first + gl.arange(0, 64, layout=gl.SliceLayout(0, GATHER))
    gl.store(out + head[:, None] * topk + key[None, :], tile.load(GATHER), mask=(key < topk)[None, :])


@gluon.jit
def _write_quarter(acc, staging, out, WIDTH: gl.constexpr):
    staging.store(acc.to(staging.dtype))
    gl.thread_barrier()
    head = gl.arange(0, 64, layout=gl.SliceLayout(1, GATHER))
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, GATHER))
    gl.store(out + head[:, None] * 576 + column[None, :], staging.load(GATHER))
    gl.thread_barrier()


@gluon.jit
def _consume_probabilities(query, keys, tiles, barriers, ready, indices, P, DQ, lse, blocks, topk, scale_log2, zero):
    """Recomputes the probabilities; owns dq columns 0..127 and 256..383."""
    query_latent, query_rope = query
    latent, rope = keys
    p_tile, ds_tile = tiles
    full_left, full_right, free_left, free_right = barriers
    p_ready, ds_ready = ready
    dq_left = gl.zeros([64, 128], gl.float32, layout=QUARTER)
    dq_right = gl.zeros([64, 128], gl.float32, layout=QUARTER)
    log2_sum = gl.load(lse + gl.arange(0, 64, layout=BY_HEAD)) * 1.4426950408889634
    for block in range(blocks):
        phase = block & 1
        o = block * zero
        x = _product_with_keys(query_latent, latent, full_left, full_right, o, phase)
        x = warpgroup_mma(query_rope.index(o), rope.index(o).permute((1, 0)), x, is_async=True)
        x = warpgroup_mma_wait(0, deps=[x])
        lane = block * 64 + gl.arange(0, 64, layout=BY_KEY)
        index = gl.load(indices + lane, mask=lane < topk, other=-1)
        p = gl.where((index >= 0)[None, :], gl.exp2(x * scale_log2 - log2_sum[:, None]), 0.0)
        p_tile.store(p.to(p_tile.dtype))
        gl.thread_barrier()
        mbarrier.arrive(p_ready, count=1)
        _write_tile(p_tile, P, topk, block * 64)
        mbarrier.wait(ds_ready, phase)
        dq_left = warpgroup_mma(ds_tile.index(o), latent.index(o), dq_left, is_async=True)
        dq_right = warpgroup_mma(ds_tile.index(o), latent.index(o + 2), dq_right, is_async=True)
        dq_left = warpgroup_mma_wait(1, deps=[dq_left])
        gl.thread_barrier()
        mbarrier.arrive(free_left, count=1)
        dq_right = warpgroup_mma_wait(0, deps=[dq_right])
        gl.thread_barrier()
        mbarrier.arrive(free_right, count=1)
    _write_quarter(dq_left, latent.index(0), DQ, 128)
    _write_quarter(dq_right, latent.index(0), DQ + 256, 128)


@gluon.jit
def _consume_gradients(output_gradient, keys, tiles, barriers, ready, indices, DS, DQ, delta, blocks, topk, scale, zero):
    """Turns the gradient of the probabilities into that of the scores; owns dq columns 128..255, 384..511 and the rope's."""
    latent, rope = keys
    p_tile, ds_tile = tiles
    full_left, full_right, free_left, free_right = barriers
    p_ready, ds_ready = ready
    dq_left = gl.zeros([64, 128], gl.float32, layout=QUARTER)
    dq_right = gl.zeros([64, 128], gl.float32, layout=QUARTER)
    dq_rope = gl.zeros([64, 64], gl.float32, layout=SCORES)
    mean = gl.load(delta + gl.arange(0, 64, layout=BY_HEAD))
    for block in range(blocks):
        phase = block & 1
        o = block * zero
        y = _product_with_keys(output_gradient, latent, full_left, full_right, o, phase)
        y = warpgroup_mma_wait(0, deps=[y])
        mbarrier.wait(p_ready, phase)
        ds = p_tile.load(SCORES).to(gl.float32) * (y - mean[:, None]) * scale
        ds_tile.index(0).store(ds.to(ds_tile.dtype))
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(ds_ready, count=1)
        dq_left = warpgroup_mma(ds_tile.index(o), latent.index(o + 1), dq_left, is_async=True)
        dq_right = warpgroup_mma(ds_tile.index(o), latent.index(o + 3), dq_right, is_async=True)
        dq_rope = warpgroup_mma(ds_tile.index(o), rope.index(o), dq_rope, is_async=True)
        _write_tile(ds_tile.index(0), DS, topk, block * 64)
        dq_left = warpgroup_mma_wait(2, deps=[dq_left])
        gl.thread_barrier()
        mbarrier.arrive(free_left, count=1)
        dq_right, dq_rope = warpgroup_mma_wait(0, deps=[dq_right, dq_rope])
        gl.thread_barrier()
        mbarrier.arrive(free_right, count=1)
    _write_quarter(dq_left, latent.index(1), DQ + 128, 128)
    _write_quarter(dq_right, latent.index(1), DQ + 384, 128)
    _write_quarter(dq_rope, rope.index(0), DQ + 512, 64)


@gluon.jit(do_not_specialize=["zero", "first_query"])
def backward_kernel(
    Q, KV, INDICES, DO, LSE, DELTA, PDS, DQ, first_query, topk, scale, scale_log2, zero, H: gl.constexpr, REGISTERS: gl.constexpr
):
    """Grid (H / 64, queries of the chunk): dq, and the probabilities and score gradients of each selected key.

    PDS [chunk, 2 H, topk]: rows 0..H-1 the probabilities, rows H..2H-1 the score gradients (0 where the index is -1).
    """
    first_head = gl.program_id(0) * 64
    place = gl.program_id(1).to(gl.int64)
    query_row = place + first_query
    dtype: gl.constexpr = Q.dtype.element_ty
    query = (gl.allocate_shared_memory(dtype, [4, 64, 128], TILE), gl.allocate_shared_memory(dtype, [1, 64, 64], TILE))
    gradient = gl.allocate_shared_memory(dtype, [4, 64, 128], TILE)
    keys = (gl.allocate_shared_memory(dtype, [4, 64, 128], TILE), gl.allocate_shared_memory(dtype, [1, 64, 64], TILE))
    tiles = (gl.allocate_shared_memory(dtype, [64, 64], TILE), gl.allocate_shared_memory(dtype, [1, 64, 64], TILE))
    full = _barriers(128)
    free = _barriers(2)
    ready = _barriers(1)
    row = query_row * H + first_head
    lane = gl.arange(0, 64, layout=gl.SliceLayout(1, GATHER))
    _gather_quarters(query[0], 0, 4, Q + row * 576, lane * 576, lane >= 0)
    _gather(query[1].index(0), Q + row * 576 + 512, lane * 576, lane >= 0, 64)
    _gather_quarters(gradient, 0, 4, DO + row * 512, lane * 512, lane >= 0)
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()
    gl.thread_barrier()
    barriers = (full.index(0), full.index(1), free.index(0), free.index(1))
    exchange = (ready.index(0), ready.index(1))
    indices = INDICES + query_row * topk
    blocks = (topk + 63) // 64
    p_out = PDS + (place * 2 * H + first_head) * topk
    ds_out = p_out + (place * 0 + H) * topk
    dq = DQ + row * 576
    gl.warp_specialize(
        [
            (_produce_once, (keys, barriers, KV, indices, blocks, topk)),
            (
                _consume_probabilities,
                (query, keys, tiles, barriers, exchange, indices, p_out, dq, LSE + row, blocks, topk, scale_log2, zero),
            ),
            (
                _consume_gradients,
                (gradient, keys, tiles, barriers, exchange, indices, ds_out, dq, DELTA + row, blocks, topk, scale, zero),
            ),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )
