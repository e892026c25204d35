"""Sparse MLA attention over the FP8 latent cache on Hopper (sm_90), in Gluon: 656-byte entries, heads in groups of 64.

The consumers are those of `sparse_attention_gluon`; the producer differs. It loads 16 bytes a thread, two quarters of a block
ahead, widens them to bfloat16 and stores them where the bf16 form's asynchronous copies would have put them. Widening costs nine
instructions for four numbers: e4m3's bits, moved to the low end of bfloat16's exponent, mean 2^-120 of the value (subnormals
too), so one packed product with 2^120 times the entry's scale gives the number exactly. That factor is finite for scales up to
2^7: entries up to 57,344 in size; larger ones come out infinite. No fence stands in the producer: its loads would have to arrive
before each one, and the consumers have one on the way from every barrier to their products.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from rorqual.kernels.sparse_attention_gluon import (
    GATHER,
    TILE,
    VECTOR,
    _barriers,
    _consume_even,
    _consume_odd,
    _gather,
    _load_query,
)

WORDS = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))
"""A quarter of 64 entries as int32: 16 bytes a thread, four threads a row, so that eight threads that store together (the even or
the odd 16-byte chunks of two rows) meet in no bank of the swizzled tile."""
PAIRS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))
"""TILE's bytes seen as pairs of bfloat16."""
WIDEN = gl.constexpr("""{
.reg .b32 l, h, t;
shl.b32 l, $2, 4;
shr.u32 h, $2, 4;
and.b32 l, l, 0xf0f0f0f0;
and.b32 h, h, 0x07070707;
lop3.b32 h, $2, 0x80808080, h, 0xea;
prmt.b32 t, l, h, 0x5140;
prmt.b32 l, l, h, 0x7362;
mul.rn.bf16x2 t, t, $3;
mul.rn.bf16x2 l, l, $3;
mov.b32 $0, t;
mov.b32 $1, l;
}""")
"""Four e4m3 codes ($2) and 2^120 times their scale (two bfloat16 in $3) to four bfloat16 ($0, $1)."""


@gluon.jit
def _fetch(KV, index, QUARTER: gl.constexpr):
    """The words [64, 32] of a quarter of the selected entries; zeros where the index is negative."""
    row = gl.maximum(index, 0).to(gl.int64) * 164 + QUARTER * 32
    word = gl.arange(0, 32, layout=gl.SliceLayout(0, WORDS))
    return gl.load(KV + row[:, None] + word[None, :], mask=(index >= 0)[:, None], other=0)


@gluon.jit
def _scale(SCALES, index, QUARTER: gl.constexpr):
    """The scales [64] of a quarter; zeros where the index is negative."""
    return gl.load(SCALES + gl.maximum(index, 0).to(gl.int64) * 164 + 128 + QUARTER, mask=index >= 0, other=0.0)


@gluon.jit
def _widen(codes, scale, half, QUARTER: gl.constexpr):
    """Store a quarter as bfloat16 into its place of a half [64, 256] of the block's buffer."""
    bits = (scale * 1.329227995784916e36).to(gl.int32, bitcast=True)  # a power of two: its upper half is the bfloat16
    factor = bits | (bits >> 16)
    first, second = gl.inline_asm_elementwise(
        WIDEN, "=r,=r,r,r", [codes, factor[:, None]], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    half.slice(QUARTER % 2 * 64, 64, dim=1).store(gl.join(first, second).reshape([64, 64]))


@gluon.jit
def _hand_over(barrier):
    gl.thread_barrier()
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def _produce_widened(keys, barriers, KV, SCALES, ROPE, indices, blocks, topk):
    """Fill each block's buffer as `_produce` does, left and right halves apart; loads run two quarters ahead."""
    left, right, rope = keys
    full_left, full_right, free_left, free_right = barriers
    left = left._reinterpret(gl.int32, [2, 64, 128], PAIRS)
    right = right._reinterpret(gl.int32, [2, 64, 128], PAIRS)
    lane = gl.arange(0, 64, layout=gl.SliceLayout(1, WORDS))
    rope_lane = gl.arange(0, 64, layout=gl.SliceLayout(1, GATHER))
    last = gl.minimum(topk, blocks * 64)
    index = gl.load(indices + lane, mask=lane < last, other=-1)
    row = gl.load(indices + rope_lane, mask=rope_lane < last, other=-1)
    codes0 = _fetch(KV, index, 0)
    codes1 = _fetch(KV, index, 1)
    scale0 = _scale(SCALES, index, 0)
    for block in range(blocks):
        buffer = block & 1
        phase = ((block >> 1) & 1) ^ 1
        ahead = (block + 1) * 64 + lane
        following = gl.load(indices + ahead, mask=ahead < last, other=-1)
        codes2 = _fetch(KV, index, 2)
        scale1 = _scale(SCALES, index, 1)
        mbarrier.wait(free_left.index(buffer), phase)
        _widen(codes0, scale0, left.index(buffer), 0)
        codes3 = _fetch(KV, index, 3)
        scale2 = _scale(SCALES, index, 2)
        _widen(codes1, scale1, left.index(buffer), 1)
        _hand_over(full_left.index(buffer))
        codes0 = _fetch(KV, following, 0)
        scale3 = _scale(SCALES, index, 3)
        mbarrier.wait(free_right.index(buffer), phase)
        _gather(rope.index(buffer), ROPE + 264, gl.maximum(row, 0).to(gl.int64) * 328, row >= 0, 64)
        async_copy.mbarrier_arrive(full_right.index(buffer), increment_count=False)
        _widen(codes2, scale2, right.index(buffer), 2)
        codes1 = _fetch(KV, following, 1)
        scale0 = _scale(SCALES, following, 0)
        _widen(codes3, scale3, right.index(buffer), 3)
        _hand_over(full_right.index(buffer))
        row = gl.load(indices + (block + 1) * 64 + rope_lane, mask=(block + 1) * 64 + rope_lane < last, other=-1)
        index = following
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["zero", "topk", "pairs"])
def packed_forward_kernel(
    Q, KV, SCALES, ROPE, INDICES, OUT, LSE, scale_log2, zero, topk, pairs, H: gl.constexpr, OUT_WIDE: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """As `sparse_attention_gluon.forward_kernel`, over entries of 656 bytes: KV as int32, and the same memory as float32
    (SCALES) and as bfloat16 (ROPE)."""
    first_head = gl.program_id(0) * 64
    query_row = gl.program_id(1).to(gl.int64)
    share = gl.program_id(2)
    dtype: gl.constexpr = gl.bfloat16
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
    # The right half is full when each thread's copy of rope keys has arrived (128) and the widened bytes stand (1).
    barriers = (_barriers(1), _barriers(129), _barriers(1), _barriers(1))
    _load_query(query, Q + (query_row * H + first_head) * 576)
    skipped = share * pairs * 128
    indices = INDICES + query_row * topk + skipped
    left_over = topk - skipped
    row = (share.to(gl.int64) * gl.num_programs(1) + query_row) * H + first_head
    out = OUT + row * 512
    lse = LSE + row
    gl.warp_specialize(
        [
            (_produce_widened, (keys, barriers, KV, SCALES, ROPE, indices, pairs * 2, left_over)),
            (_consume_even, (query, keys, barriers, exchange, out, lse, indices, pairs, left_over, scale_log2, zero, OUT_WIDE)),
            (_consume_odd, (query, keys, barriers, exchange, out, lse, indices, pairs, left_over, scale_log2, zero, OUT_WIDE)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )
