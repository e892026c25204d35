"""One token for each row of logits, drawn on the GPU: one program a row, in one kernel, safe inside a CUDA graph.

The definition is `rorqual.engine.sampler.sample_rows`: temperature, top-k, top-p and min-p, each on the distribution the one
before left, ties at an edge to the lowest ids, a draw over ids ascending. Weights are float32 here and float64 there, so a
number that falls within rounding of a token's edge may give the neighbour; a row's result never depends on other rows.

Nothing is sorted: the edge of a truncation is a value, found by bisection over float32 as ordered integers, each pass a sum or
a count over the row (which stays in L2).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 8192
"""Logits of a row that one program reads at once..."""
MAX_WHOLE = 1 << 13
"""...but a row of at most so many stays in its registers."""


def draw_tokens(
    logits: Tensor,
    noise: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    out: Tensor,
    tokens: Tensor,
    kept: Tensor | None = None,
    step: Tensor | None = None,
) -> None:
    """logits float32 [B, V], contiguous; noise float64 [n, B] in [0, 1); temperature, top_p, min_p float32 [B], top_k int32 [B].

    Fills out float64 [n, 3, B] at [step]: the token, its log-prob under the distribution sampled from, its log-prob under the raw
    model (not finite where the logits are no numbers); tokens int64 [B]: the token again; and, if given, kept uint8
    [n, B, ceil(V / 8)] at [step]: bit i of byte j is set where id 8 j + i was kept. step int64 [1] on the device; None: 0.
    """
    B, V = logits.shape
    whole = V <= MAX_WHOLE
    block = max(128, triton.next_power_of_2(V)) if whole else MAX_BLOCK
    draw_kernel[(B,)](
        logits, noise, temperature, top_k, top_p, min_p, out, tokens, out if kept is None else kept,
        tokens if step is None else step, B, V, RECORD=kept is not None, STEP=step is not None, BLOCK=block, WHOLE=whole,
        num_warps=min(16, max(4, block // 512)),
    )  # fmt: skip


@triton.jit
def _ordered(x):
    """float32 -> int32 in the same order; both zeros are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _scaled(X, id, V, top, temperature):
    """(logit - top) / temperature, -inf beyond the vocabulary."""
    x = tl.load(X + id, mask=id < V, other=float("-inf"))
    return (x - top) / temperature


@triton.jit
def _mass(row, X, V, top, temperature, edge, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """The count and the mass of the weights whose logarithm is at least `edge` (as an ordered integer). row: all logarithms,
    where they are held."""
    count, mass = edge * 0, edge.to(tl.float64) * 0
    for low in range(0, V, BLOCK):
        x = row if WHOLE else _scaled(X, low + tl.arange(0, BLOCK), V, top, temperature)
        there = (_ordered(x) >= edge) & (x > float("-inf"))
        count += tl.sum(there.to(tl.int32), 0)
        mass += tl.sum(tl.where(there, tl.exp(x), 0.0), 0).to(tl.float64)
    return count, mass


@triton.jit
def _edge(row, X, V, top, temperature, low, low_count, low_mass, count, mass, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """The greatest edge >= low that at least `count` weights reach, of at least `mass` together.

    Returns an edge, count and mass of the weights that reach it, and of those above its tie. Either one weight alone lies between
    the edge and those above, or the edge is the value of all that do.
    """
    high, above, above_mass = low * 0 + 1, low * 0, mass * 0  # logarithms are at most 0: none reaches the integer 1
    while (low + 1 < high) & (low_count - above > 1):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        reached, reached_mass = _mass(row, X, V, top, temperature, middle, BLOCK, WHOLE)
        enough = (reached >= count) & (reached_mass >= mass)
        low = tl.where(enough, middle, low)
        low_count = tl.where(enough, reached, low_count)
        low_mass = tl.where(enough, reached_mass, low_mass)
        high = tl.where(enough, high, middle)
        above = tl.where(enough, above, reached)
        above_mass = tl.where(enough, above_mass, reached_mass)
    return low, low_count, low_mass, above, above_mass


@triton.jit
def draw_kernel(
    X, NOISE, TEMPERATURE, TOP_K, TOP_P, MIN_P, OUT, TOKENS, KEPT, AT, B, V,
    RECORD: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Grid (B,)."""
    row = tl.program_id(0).to(tl.int64)
    step = row * 0
    if STEP:
        step += tl.load(AT)
    X += row * V
    top, best = row.to(tl.float32) * 0 + float("-inf"), row.to(tl.int32) * 0
    for low in range(0, V, BLOCK):
        id = low + tl.arange(0, BLOCK)
        x = tl.load(X + id, mask=id < V, other=float("-inf"))
        larger = tl.max(x, 0)
        first = tl.min(tl.where(x == larger, id, 2147483647), 0)
        best = tl.where(larger > top, first, best)
        top = tl.maximum(top, larger)
    warm = tl.load(TEMPERATURE + row)
    greedy = warm == 0
    temperature = tl.where(greedy, 1.0, warm)
    edge, ties = best * 0 - 2139095041, best * 0 + 2147483647  # the ordered integer of -inf: every weight reaches it
    held = _scaled(X, tl.arange(0, BLOCK if WHOLE else 16), V, top, top * 0 + 1.0)
    _, plain = _mass(held, X, V, top, top * 0 + 1.0, edge, BLOCK, WHOLE)
    held = held / temperature
    count, total = _mass(held, X, V, top, temperature, edge, BLOCK, WHOLE)
    top_k, top_p, min_p = tl.load(TOP_K + row), tl.load(TOP_P + row), tl.load(MIN_P + row)
    if (greedy == 0) & (top_k > 0) & (top_k < count):
        edge, reach, mass, above, above_mass = _edge(
            held, X, V, top, temperature, edge, count, total, top_k, total * 0, BLOCK, WHOLE
        )
        ties = top_k - above
        tied = above_mass + ties.to(tl.float64) * tl.exp(_value(edge)).to(tl.float64)
        count, total = top_k, tl.where(reach - above > 1, tied, mass)
    if (greedy == 0) & (top_p < 1):
        line = top_p.to(tl.float64) * total
        # Below top-k's edge nothing counts: the search begins there.
        reached, reach, mass, above, above_mass = _edge(
            held, X, V, top, temperature, edge, count, total, top_k * 0 + 1, line, BLOCK, WHOLE
        )
        each = tl.exp(_value(reached)).to(tl.float64)
        wanted = tl.maximum(tl.ceil((line - above_mass) / each).to(tl.int32), 1)
        wanted = tl.where(reach - above > 1, wanted, 1)
        ties = tl.where(reached == edge, tl.minimum(ties, wanted), wanted)
        edge = reached
    if (greedy == 0) & (min_p > 0):
        bar = _ordered(tl.log(min_p))
        ties = tl.where(bar > edge, 2147483647, ties)
        edge = tl.maximum(edge, bar)
    kept = KEPT + (step * B + row) * ((V + 7) // 8)
    token, mass = _draw(
        held, X, NOISE + step * B + row, kept, V, top, temperature, edge, ties, greedy, best, RECORD, BLOCK, WHOLE
    )
    token = tl.where(greedy, best, token)
    x = tl.load(X + token)
    logprob = tl.where(greedy, 0.0, ((x - top) / temperature).to(tl.float64) - tl.log(mass))
    OUT += step * 3 * B + row
    tl.store(OUT, token.to(tl.float64))
    tl.store(OUT + B, logprob)
    tl.store(OUT + 2 * B, (x - top).to(tl.float64) - tl.log(plain))
    tl.store(TOKENS + row, token.to(tl.int64))


@triton.jit
def _value(key):
    """The float32 of an ordered integer."""
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _kept(row, X, id, V, top, temperature, edge, ties, tied_before, WHOLE: tl.constexpr):
    """The weights of a block that stay, whether they do, and how many ties have been met."""
    x = row if WHOLE else _scaled(X, id, V, top, temperature)
    key = _ordered(x)
    tied = (key == edge) & (x > float("-inf"))
    rank = tied_before + tl.cumsum(tied.to(tl.int32), 0)
    stays = ((key > edge) | (tied & (rank <= ties))) & (x > float("-inf"))
    return tl.where(stays, tl.exp(x), 0.0), stays, tied_before + tl.sum(tied.to(tl.int32), 0)


@triton.jit
def _draw(
    row, X, NOISE, KEPT, V, top, temperature, edge, ties, greedy, best,
    RECORD: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The token at the noise's place among the kept weights, ids ascending, and their mass; writes the kept set."""
    mass, tied = top.to(tl.float64) * 0, edge * 0
    for low in range(0, V, BLOCK):
        id = low + tl.arange(0, BLOCK)
        weight, stays, tied = _kept(row, X, id, V, top, temperature, edge, ties, tied, WHOLE)
        mass += tl.sum(weight, 0).to(tl.float64)
        if RECORD:
            stays = tl.where(greedy, id == best, stays)
            bits = tl.reshape(stays.to(tl.int32) << (id % 8), [BLOCK // 8, 8])
            byte = low // 8 + tl.arange(0, BLOCK // 8)
            tl.store(KEPT + byte, tl.sum(bits, 1).to(tl.uint8), mask=byte < (V + 7) // 8)
    target = tl.load(NOISE) * mass
    token, last, before, tied = best * 0 - 1, best * 0, top.to(tl.float64) * 0, edge * 0
    for low in range(0, V, BLOCK):
        id = low + tl.arange(0, BLOCK)
        weight, _, tied = _kept(row, X, id, V, top, temperature, edge, ties, tied, WHOLE)
        here = tl.sum(weight, 0).to(tl.float64)
        last = tl.maximum(last, tl.max(tl.where(weight > 0, id, 0), 0))
        if (token < 0) & (before + here > target):
            reached = (tl.cumsum(weight, 0).to(tl.float64) + before > target) & (weight > 0)
            token = tl.min(tl.where(reached, id, V), 0)
            token = tl.where(token == V, -1, token)
        before += here
    return tl.where(token < 0, last, token), mass
