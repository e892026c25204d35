"""The small integer work of a step on a GPU, one kernel where plain operations would be dozens: the router's choice, the order of
(token, expert) pairs, and slots of positions. For inference: nothing is differentiated. Safe inside a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_PAIRS = 1 << 15
"""(Pairs) x (experts) that one program puts in order."""


def route(
    logits: Tensor, bias: Tensor, n_groups: int, n_limited: int, count: int, scale: float, normed: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The choice of `rorqual.model.router`: logits float32 [N, E], bias float32 [E] -> scores float32 [N, E], experts int64
    [N, count] ascending, gates float32 [N, count]. Ties go to the lower index."""
    N, E = logits.shape
    scores, gates = torch.empty_like(logits), logits.new_empty(N, count)
    experts = torch.empty(N, count, dtype=torch.int64, device=logits.device)
    if N:
        route_kernel[(N,)](
            logits.contiguous(), bias, scores, experts, gates, scale, eps, E=E, EP=triton.next_power_of_2(E), GROUPS=n_groups,
            GP=triton.next_power_of_2(n_groups), LIMITED=n_limited, K=count, NORMED=normed, num_warps=1,
        )  # fmt: skip
    return scores, experts, gates


@triton.jit
def _best(x, taken, index, none):
    """The lowest index of the greatest x that is not taken."""
    x = tl.where(taken, float("-inf"), x)
    return tl.min(tl.where((x == tl.max(x, 0)) & (taken == 0), index, none), 0)


@triton.jit
def route_kernel(
    LOGITS, BIAS, SCORES, EXPERTS, GATES, scale, eps, E: tl.constexpr, EP: tl.constexpr, GROUPS: tl.constexpr,
    GP: tl.constexpr, LIMITED: tl.constexpr, K: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Grid (rows,)."""
    n, e = tl.program_id(0).to(tl.int64), tl.arange(0, EP)
    x = tl.load(LOGITS + n * E + e, mask=e < E, other=0.0)
    score = 1 / (1 + tl.exp(-x))
    tl.store(SCORES + n * E + e, score, mask=e < E)
    choice = score + tl.load(BIAS + e, mask=e < E, other=0.0)
    choice = tl.where(choice == choice, choice, -3.0e38)  # a row of NaN (idle rows may be) chooses the first experts
    out = e >= E
    if LIMITED < GROUPS:
        group, g = e // (E // GROUPS), tl.arange(0, GP)
        sums = tl.full([GP], float("-inf"), tl.float32)
        for each in tl.static_range(GROUPS):
            foreign = out | (group != each)
            first = _best(choice, foreign, e, EP - 1)
            total = tl.sum(tl.where(e == first, choice, 0.0), 0)
            if E // GROUPS > 1:
                second = _best(choice, foreign | (e == first), e, EP - 1)
                total += tl.sum(tl.where(e == second, choice, 0.0), 0)
            sums = tl.where(g == each, total, sums)
        closed, kept = g >= GROUPS, e < 0
        for _ in tl.static_range(LIMITED):
            best = _best(sums, closed, g, GP - 1)
            closed = closed | (g == best)
            kept = kept | (group == best)
        out = out | (kept == 0)
    taken = e < 0
    for _ in tl.static_range(K):
        taken = taken | (e == _best(choice, out | taken, e, EP - 1))
    gate = score
    if NORMED:
        gate = gate / (tl.sum(tl.where(taken, score, 0.0), 0) + eps)
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(EXPERTS + n * K + place, e.to(tl.int64), mask=taken)
    tl.store(GATES + n * K + place, gate * scale, mask=taken)


def few_pairs(chosen: Tensor, E: int) -> bool:
    """Whether `order_pairs` takes this."""
    return chosen.numel() > 0 and triton.next_power_of_2(chosen.numel()) * triton.next_power_of_2(E + 1) <= MOST_PAIRS


def order_pairs(chosen: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `experts_triton.plan`: chosen integer [N, K] -> order int64 [N K], place int32 [N, K], ends int32 [E]."""
    count = chosen.numel()
    order = torch.empty(count, dtype=torch.int64, device=chosen.device)
    place = torch.empty(chosen.shape, dtype=torch.int32, device=chosen.device)
    ends = torch.empty(E, dtype=torch.int32, device=chosen.device)
    pairs = triton.next_power_of_2(count)
    order_kernel[(1,)](
        chosen.contiguous(), order, place, ends, count, E=E, EP=triton.next_power_of_2(E + 1), P=pairs,
        num_warps=max(4, min(16, pairs * E // 1024)),
    )  # fmt: skip
    return order, place, ends


@triton.jit
def order_kernel(CHOSEN, ORDER, PLACE, ENDS, count, E: tl.constexpr, EP: tl.constexpr, P: tl.constexpr):
    """One program. A pair's place: the pairs of lower experts, and those of its own before it; without an expert, last."""
    i, e = tl.arange(0, P), tl.arange(0, EP)
    expert = tl.load(CHOSEN + i, mask=i < count, other=-1).to(tl.int32)
    expert = tl.where((expert < 0) | (expert >= E), E, expert)
    mine = ((expert[:, None] == e[None, :]) & (i < count)[:, None]).to(tl.int32)  # [P, EP]
    counts = tl.sum(mine, 0)
    ends = tl.cumsum(counts, 0)
    ahead = tl.cumsum(mine, 0) - 1 + (ends - counts)[None, :]
    place = tl.sum(mine * ahead, 1)
    tl.store(PLACE + i, place, mask=i < count)
    tl.store(ORDER + place, i.to(tl.int64), mask=i < count)
    tl.store(ENDS + e, ends, mask=e < E)


def slots_of(table: Tensor, positions: Tensor | None, ends: Tensor, block_size: int, count: int) -> Tensor:
    """Slots of positions in paged caches: table int32 [B, P] of blocks, positions int32 or int64 [B, count] or None: the first
    `count` of each row; ends int32 [B] -> int32 [B, count], -1 for positions that are negative or not below their row's end."""
    B = len(table)
    slots = torch.empty(B, count, dtype=torch.int32, device=table.device)
    slot_kernel[(B, triton.cdiv(count, 1024))](
        table, ends if positions is None else positions, ends, slots, count, table.shape[1], block_size,
        LISTED=positions is None, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return slots


@triton.jit
def slot_kernel(TABLE, POSITIONS, ENDS, SLOTS, count, pages, block_size, LISTED: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (rows, blocks of columns)."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = column
    if not LISTED:
        position = tl.load(POSITIONS + row * count + column, mask=column < count, other=-1).to(tl.int32)
    there = (position >= 0) & (position < tl.load(ENDS + row)) & (column < count)
    block = tl.load(TABLE + row * pages + position // block_size, mask=there, other=0)
    slot = tl.where(there, block * block_size + position % block_size, -1)
    tl.store(SLOTS + row * count + column, slot, mask=column < count)
