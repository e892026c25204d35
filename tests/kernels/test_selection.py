"""Selection: exact top-k, ties to the lowest position, the same set under any tiling, chunking or batch."""

from __future__ import annotations

import pytest
import torch

from rorqual.kernels import index_score, select_tokens, selection


def best(scores: torch.Tensor, topk: int, starts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Brute force, row by row: a stable sort by descending score, NaN and -inf counted as the lowest finite number."""
    lowest = torch.finfo(scores.dtype).min
    rows = []
    for row, start, end in zip(scores.nan_to_num(nan=lowest, neginf=lowest), starts.tolist(), ends.tolist(), strict=True):
        order = sorted(range(start, end), key=lambda s, row=row: (-row[s].item(), s))[:topk]
        rows.append(sorted(order) + [-1] * (topk - len(order)))
    return torch.tensor(rows, dtype=torch.int32).view(len(scores), topk)


def causal(T: int, S: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(T, dtype=torch.long), torch.arange(S - T + 1, S + 1)


def inputs(T, S, I, C, generator, tied: bool = False):
    q, k, w = (torch.randn(*shape, generator=generator) for shape in ((T, I, C), (S, C), (T, I)))
    return (q.sign(), k.sign(), w.sign()) if tied else (q, k, w)


@pytest.mark.parametrize("tied", (False, True), ids=("distinct", "tied"))
@pytest.mark.parametrize(
    "T, S, topk", ((1, 1, 1), (9, 9, 4), (17, 40, 1), (40, 64, 16), (33, 700, 64), (5, 7, 30), (1, 900, 100))
)
def test_selection_equals_brute_force(T, S, topk, tied, generator) -> None:
    q, k, w = inputs(T, S, 3, 8, generator, tied)
    expected = best(index_score(q, k, w), topk, *causal(T, S))
    assert torch.equal(select_tokens(q, k, w, topk), expected)


@pytest.mark.parametrize("tied", (False, True), ids=("distinct", "tied"))
def test_rows_choose_within_their_ranges(tied, generator) -> None:
    T, S, topk = 60, 333, 20
    q, k, w = inputs(T, S, 2, 8, generator, tied)
    starts = torch.randint(0, S, (T,), generator=generator)
    ends = (starts + torch.randint(-S, S, (T,), generator=generator)).clamp(0, S)
    chosen = select_tokens(q, k, w, topk, starts.int(), ends.int())
    assert torch.equal(chosen, best(index_score(q, k, w), topk, starts, ends.maximum(starts)))
    assert (chosen[ends <= starts] == -1).all() and (ends <= starts).any()


def test_thousands_of_exact_ties_go_to_the_lowest_position(generator) -> None:
    """Negative dots make exact zeros: the tail of the selection is all ties."""
    S, topk = 6000, 1000
    q, k, w = torch.ones(3, 1, 4), -torch.rand(S, 4, generator=generator), torch.tensor([[1.0], [-1.0], [0.0]])
    above = torch.randperm(S, generator=generator)[:300]
    k[above] *= -1
    starts, ends = torch.zeros(3, dtype=torch.long), torch.full((3,), S)
    chosen = select_tokens(q, k, w, topk, starts, ends)
    zero = [s for s in range(S) if s not in set(above.tolist())]
    assert chosen[0].tolist() == sorted(above.tolist() + zero[: topk - 300])
    assert chosen[1].tolist() == zero[:topk]
    assert chosen[2].tolist() == list(range(topk))


@pytest.mark.parametrize("tied", (False, True), ids=("distinct", "tied"))
@pytest.mark.parametrize("I, C", ((8, 64), (3, 16)))
def test_set_and_scores_are_bitwise_the_same_under_any_chunk_batch_and_tile(I, C, tied, generator, monkeypatch) -> None:
    T = S = 700
    topk = 48
    q, k, w = inputs(T, S, I, C, generator, tied)
    whole, scores = select_tokens(q, k, w, topk, return_scores=True)
    assert torch.equal(whole, best(index_score(q, k, w), topk, *causal(T, S)))
    for chunk in (1, 2, 7, 16, 33, 256):
        for low in range(0, T, max(chunk, 97)):
            high = min(low + chunk, T)
            some, some_scores = select_tokens(q[low:high], k[:high], w[low:high], topk, return_scores=True)
            assert torch.equal(some, whole[low:high]) and torch.equal(some_scores, scores[low:high]), chunk
    rows = torch.randperm(T, generator=generator)[:50]
    batch = select_tokens(q[rows], k, w[rows], topk, torch.zeros_like(rows), rows + 1)
    assert torch.equal(batch, whole[rows])
    for dots, held, width in ((1, 1, 16), (1 << 14, 1 << 12, 64), (1 << 30, 1 << 30, 48)):
        monkeypatch.setattr(selection, "TILE_DOTS", dots)
        monkeypatch.setattr(selection, "TILE_SCORES", held)
        monkeypatch.setattr(selection, "KEY_TILE", width)
        again, again_scores = select_tokens(q, k, w, topk, return_scores=True)
        assert torch.equal(again, whole) and torch.equal(again_scores, scores), (dots, held, width)


@pytest.mark.parametrize("rare", (0, 3), ids=("sampled columns are the best", "sampled columns are the worst"))
def test_a_threshold_guessed_wrong_changes_nothing(rare, generator) -> None:
    """Long rows are judged by every SAMPLE-th column first; here that sample misleads, both ways, and half the row is ties."""
    S, topk = 2000, 100
    k = torch.rand(S, 1, generator=generator).round(decimals=1)
    k[rare :: selection.SAMPLE] += 1
    q, w, ends = torch.ones(5, 1, 1), torch.tensor([[1.0], [-1.0], [0.5], [0.0], [2.0]]), torch.tensor([S, S, 900, S, 101])
    chosen = select_tokens(q, k, w, topk, torch.zeros(5), ends)
    assert torch.equal(chosen, best(index_score(q, k, w), topk, torch.zeros(5).long(), ends))


def test_scores_of_the_selected_are_those_of_the_tile(generator) -> None:
    q, k, w = inputs(30, 50, 4, 16, generator)
    chosen, scores = select_tokens(q, k, w, 12, return_scores=True)
    expected = index_score(q, k, w).gather(1, chosen.long().clamp_min(0)).masked_fill(chosen < 0, -torch.inf)
    assert torch.equal(scores, expected)


@pytest.mark.parametrize("bad", (float("nan"), float("-inf")))
def test_nan_and_minus_infinity_are_chosen_last_but_before_none(bad, generator) -> None:
    S, topk = 40, 30
    scores_q, k, w = torch.ones(2, 1, 1), torch.rand(S, 1, generator=generator), torch.ones(2, 1)
    spoiled = torch.tensor([0, 3, 5, 11, 17, 18, 20, 21, 22, 25, 30, 33, 39])
    k[spoiled] = bad if bad != bad else float("inf")
    if bad == bad:
        w = -w
    ends = torch.tensor([S, 35])
    chosen = select_tokens(scores_q, k, w, topk, torch.zeros(2), ends)
    assert torch.equal(chosen, best(index_score(scores_q, k, w), topk, torch.zeros(2).long(), ends))
    assert set(range(S)) - set(spoiled.tolist()) <= set(chosen[0].tolist())


def test_impossible_requests_say_what_was_expected(generator) -> None:
    q, k, w = inputs(3, 5, 2, 4, generator)
    with pytest.raises(ValueError, match="topk: expected at least 1, found 0"):
        select_tokens(q, k, w, 0)
    with pytest.raises(ValueError, match=r"starts and ends: expected shape \[3\]"):
        select_tokens(q, k, w, 2, torch.zeros(2), torch.ones(3))


def test_nothing_to_choose_from_is_no_error(generator) -> None:
    q, k, w = inputs(3, 5, 2, 4, generator)
    assert select_tokens(q[:0], k, w[:0], 4).shape == (0, 4)
    assert (select_tokens(q, k[:0], w, 4, torch.zeros(3), torch.zeros(3)) == -1).all()
