"""Selection in Triton: the exact top-k, ties to the lowest position, whatever the tiling; scores against float64."""

from __future__ import annotations

import pytest
import torch

from rorqual.kernels.selection import select_tokens_plain
from tests.kernels.devices import on_each_device

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
pytest.importorskip("triton")
form = pytest.importorskip("rorqual.kernels.select_tokens_triton")


def best(scores, topk, start, end):
    """The topk best of one row in [start, end), ties to the lowest position, ascending, -1 last: by a stable sort."""
    row = torch.nan_to_num(
        scores[start:end].double(), nan=-3.4028234663852886e38, neginf=-3.4028234663852886e38, posinf=torch.inf
    )
    chosen = row.sort(descending=True, stable=True).indices[:topk].sort().values + start
    return torch.cat([chosen, chosen.new_full((topk - len(chosen),), -1)]).int()


def rows_of(kind, T, S, generator):
    draw = torch.randn(T, S, generator=generator)
    return {  # what overflows when squared must not mislead the search
        "normal": draw,
        "rectified": (draw - 1).clamp_min(0),
        "three values": draw.sign() * (draw.abs() > 0.5),
        "one value": torch.full((T, S), -2.5),
        "wide": (8 * draw).exp() * draw.sign(),
        "outliers": torch.where(draw > 2.5, 1e30 * draw, draw),
        "special": torch.where(draw > 2, torch.nan, torch.where(draw < -2, -torch.inf, torch.where(draw > 1.9, torch.inf, draw))),
        "both zeros": torch.where(draw > 0.5, 0.0, -0.0),
    }[kind]


KINDS = ["normal", "rectified", "three values", "one value", "wide", "outliers", "special", "both zeros"]


@on_each_device
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "S", "topk"), [(5, 300, 37), (3, 64, 100), (4, 1000, 1)])
def test_rows_hold_the_exact_best(device, kind, T, S, topk):
    check_rows(device, kind, T, S, topk)


def check_rows(device, kind, T, S, topk):
    generator = torch.Generator().manual_seed(S + topk)
    scores = rows_of(kind, T, S, generator)
    starts = torch.randint(0, S // 2, (T,), generator=generator).int()
    ends = (starts + torch.randint(0, S, (T,), generator=generator)).clamp(max=S).int()
    starts[0], ends[0] = 0, S
    padded = torch.nn.functional.pad(scores, (0, -S % 16 + 16), value=torch.nan).to(device)
    expected = torch.stack([best(scores[t], topk, starts[t], ends[t]) for t in range(T)])
    for portable in (False, True):
        indices = torch.full((T, topk), -1, dtype=torch.int32, device=device)
        chosen = torch.full((T, topk), -torch.inf, device=device)
        form.select_rows(padded[:, :S], topk, starts.to(device), ends.to(device), indices, chosen, portable)
        assert torch.equal(indices.cpu(), expected), portable
    values = torch.nan_to_num(scores, nan=-3.4028234663852886e38, neginf=-3.4028234663852886e38, posinf=torch.inf)
    picked = values.gather(1, expected.long().clamp_min(0)).masked_fill(expected < 0, -torch.inf)
    assert torch.equal(chosen.cpu(), picked)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("T", "S", "topk"),
    [(40, 8192, 2048), (20, 32700, 2048), (10, 131072, 2048), (7, 33000, 17), (5, 200001, 1000), (9, 4000, 4096)],
)
def test_long_rows_hold_the_exact_best(kind, T, S, topk):
    check_rows("cuda", kind, T, S, topk)


@on_each_device
@pytest.mark.parametrize("kind", KINDS)
def test_listed_rows_hold_the_same_set_as_rows_held_whole(device, kind, monkeypatch):
    """Thousands of exact ties, and distributions that mislead a sample: the list must not show in the set."""
    generator = torch.Generator().manual_seed(1)
    scores = rows_of(kind, 3, 4096, generator)
    padded = torch.nn.functional.pad(scores, (0, 16)).to(device)[:, :4096]
    starts, ends = torch.tensor([0, 7, 100], device=device).int(), torch.tensor([4096, 4095, 3001], device=device).int()
    expected = torch.stack([best(scores[t], 300, int(starts[t]), int(ends[t])) for t in range(3)])
    for many, length in ((1, 1024), (1, 2048), (1, 4096), (1024, 2048), (1024, 4096)):
        monkeypatch.setattr(form, "MANY_ROWS", many)
        monkeypatch.setattr(form, "list_length", lambda topk, length=length: length)
        indices = torch.full((3, 300), -1, dtype=torch.int32, device=device)
        form.select_rows(padded, 300, starts, ends, indices, None)
        assert torch.equal(indices.cpu(), expected), (many, length)


@on_each_device
def test_a_sample_that_misleads_changes_nothing(device, monkeypatch):
    """Large scores only where the sample does not look, or only where it looks."""
    monkeypatch.setattr(form, "list_length", lambda topk: 1024)
    run = torch.arange(128)[:, None]
    seen = ((run * 4 + (((run * 40503) & 0x7FFF) * 4 >> 15)) * 8 + torch.arange(8)).flatten()
    low, high = torch.zeros(4096), torch.zeros(4096)
    low[seen] = -torch.rand(1024, generator=torch.Generator().manual_seed(0))
    high[seen] = torch.rand(1024, generator=torch.Generator().manual_seed(0))
    scores = torch.stack([low, high, torch.arange(4096.0)])
    starts, ends = torch.zeros(3, device=device).int(), torch.full((3,), 4096, device=device).int()
    indices = torch.full((3, 500), -1, dtype=torch.int32, device=device)
    form.select_rows(scores.to(device), 500, starts, ends, indices, None)
    assert torch.equal(indices.cpu(), torch.stack([best(row, 500, 0, 4096) for row in scores]))


def index_case(T, S, I, C, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(T, I, C, generator=generator), torch.randn(S, C, generator=generator)
    w = torch.randn(T, I, generator=generator) * I**-0.5
    return q.to(dtype).to(device), k.to(dtype).to(device), w.to(device)


def naive_scores(q, k, w, k_scale=None):
    scores = (torch.relu(torch.einsum("tic,sc->tis", q.double(), k.double())) * w.double()[..., None]).sum(1)
    return scores if k_scale is None else scores * k_scale.double()


def check_selection(found, scores, topk, starts, ends, tolerance):
    """Every chosen score is at least the k-th best less the rounding; as many are chosen as can be; ascending, no repeats."""
    indices, values = found
    for t in range(len(scores)):
        row, eligible = indices[t][indices[t] >= 0].long(), int(ends[t] - starts[t])
        assert len(row) == min(topk, max(eligible, 0))
        assert (indices[t][len(row) :] == -1).all()
        if not len(row):
            continue
        assert (row.diff() > 0).all() and row[0] >= starts[t] and row[-1] < ends[t]
        exact = scores[t, starts[t] : ends[t]]
        slack = tolerance * exact.abs().max()
        assert scores[t, row].min() >= exact.topk(len(row)).values[-1] - slack
        assert (values[t, : len(row)].double() - scores[t, row]).abs().max() <= slack


@on_each_device
@pytest.mark.parametrize(("T", "S", "I", "C", "topk"), [(9, 70, 4, 32, 16), (3, 33, 3, 24, 50), (1, 5, 8, 64, 2)])
def test_selection_matches_float64_scores(device, T, S, I, C, topk):
    q, k, w = index_case(T, S, I, C, torch.float32, device)
    starts, ends = torch.zeros(T, dtype=torch.int64), torch.arange(S - T + 1, S + 1)
    found = form.select_tokens(q, k, w, topk, return_scores=True)
    check_selection([x.cpu() for x in found], naive_scores(q, k, w).cpu(), topk, starts, ends, 1e-5)
    starts, ends = torch.arange(T) * S // (2 * T), torch.full((T,), S - 3)
    ends[0] = 0
    found = form.select_tokens(q, k, w, topk, starts.to(device), ends.to(device), return_scores=True)
    check_selection([x.cpu() for x in found], naive_scores(q, k, w).cpu(), topk, starts, ends, 1e-5)


@on_each_device
def test_the_score_buffer_is_bounded_and_its_size_changes_nothing(device, monkeypatch):
    q, k, w = (x.round() for x in index_case(9, 70, 4, 32, torch.float32, device))  # exact in any order: numpy's products are not
    whole = form.select_tokens(q, k, w, 16, return_scores=True)
    monkeypatch.setattr(form, "SCORE_BYTES", 1000)
    assert all(map(torch.equal, form.select_tokens(q, k, w, 16, return_scores=True), whole))


@on_each_device
def test_paged_keys_select_as_keys_in_a_row(device):
    q, k, w = (x.round() for x in index_case(3, 48, 4, 32, torch.float32, device))
    page, lengths = 8, torch.tensor([48, 13, 0], device=device)
    table = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    cache = torch.empty(6, page, 32)
    cache[table] = k.cpu().view(6, page, 32)
    found = form.select_cached_tokens(q, cache.to(device), table.expand(3, 6).to(device), w, 10, lengths)
    assert torch.equal(found, form.select_tokens(q, k, w, 10, torch.zeros(3, device=device), lengths))


@on_each_device
def test_paged_rows_keep_their_own_tables_when_scores_are_made_in_parts(device, monkeypatch):
    monkeypatch.setattr(form, "SCORE_BYTES", 1)  # a row at a time
    g = torch.Generator().manual_seed(3)
    cache, q, w = torch.randn(9, 8, 16, generator=g), torch.randn(4, 2, 16, generator=g), torch.randn(4, 2, generator=g)
    table = torch.stack([torch.randperm(9, generator=g)[:5] for _ in range(4)])
    lengths = torch.tensor([40, 17, 29, 36])
    found = form.select_cached_tokens(*(x.to(device) for x in (q, cache, table.int(), w)), 7, lengths.to(device))
    for row in range(4):
        keys = cache[table[row]].flatten(0, 1)[: lengths[row]]
        expected = select_tokens_plain(q[row : row + 1], keys, w[row : row + 1], 7)
        assert torch.equal(found[row : row + 1].cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("T", "S", "topk"), [(100, 5000, 2048), (33, 40000, 2048), (5, 1500, 2048), (130, 129, 1)])
def test_released_shape_matches_float64_scores(dtype, T, S, topk):
    q, k, w = index_case(T, S, 64, 128, dtype, "cuda")
    k_scale = torch.rand(S, device="cuda") + 0.5 if dtype == torch.float8_e4m3fn else None
    found = form.select_tokens(q, k, w, topk, return_scores=True, k_scale=k_scale)
    starts, ends = torch.zeros(T, dtype=torch.int64), torch.arange(S - T + 1, S + 1).clamp_min(0)
    scores = naive_scores(q, k, w, k_scale)
    tolerance = 2e-5
    if dtype == torch.float8_e4m3fn:
        # Hopper's FP8 products keep 13 bits of the fraction of their sums (DeepSeek-V3, 3.3.2): relative to the terms' sizes.
        tolerance = (2**-13 * naive_scores(q.float().abs(), k.float().abs(), w.abs(), k_scale).max() / scores.abs().max()).item()
    check_selection([x.cpu() for x in found], scores.cpu(), topk, starts, ends, tolerance)


@pytest.mark.gpu
def test_packed_fp8_pages_select_as_keys_in_a_row_bitwise():
    B, page, blocks = 4, 64, 50
    q, k, w = index_case(B, page * blocks, 64, 128, torch.float8_e4m3fn, "cuda")
    scale = torch.exp2(torch.randint(-3, 3, (page * blocks,), device="cuda").float())
    table = torch.randperm(blocks, device="cuda")
    cache = torch.empty(blocks, page * 132, dtype=torch.uint8, device="cuda")
    cache[table, : page * 128] = k.view(torch.uint8).view(blocks, -1)
    cache[table, page * 128 :] = scale.view(torch.uint8).view(blocks, -1)
    lengths = torch.tensor([3200, 2500, 777, 1], device="cuda")
    found = form.select_cached_tokens(
        q, cache.view(blocks, page, 132), table.expand(B, blocks), w, 2048, lengths, return_scores=True
    )
    starts = torch.zeros(B, device="cuda")
    flat = form.select_tokens(q, k, w, 2048, starts, lengths, return_scores=True, k_scale=scale)
    assert all(map(torch.equal, found, flat))


@pytest.mark.gpu
def test_the_set_is_the_same_in_100_runs_and_over_all_tilings(monkeypatch):
    """Inputs of few directions, so that thousands of scores are exactly equal; scores must be the same bits in every launch."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(64, 128, generator=generator)[torch.randint(0, 64, (50000,), generator=generator)].bfloat16().cuda()
    q, _, w = index_case(64, 1, 64, 128, torch.bfloat16, "cuda")
    w = w.abs()
    reference = form.select_tokens(q, k, w, 2048, return_scores=True)
    for _ in range(100):
        assert all(map(torch.equal, form.select_tokens(q, k, w, 2048, return_scores=True), reference))
    for budget in (1 << 18, 1 << 22, 1 << 30):
        monkeypatch.setattr(form, "SCORE_BYTES", budget)
        for many, length in ((1, 4096), (1, 8192), (4096, 4096), (4096, 1 << 16)):
            monkeypatch.setattr(form, "MANY_ROWS", many)
            monkeypatch.setattr(form, "list_length", lambda topk, length=length: length)
            assert all(map(torch.equal, form.select_tokens(q, k, w, 2048, return_scores=True), reference))
    starts, ends = torch.zeros(1, device="cuda"), torch.tensor([len(k)], device="cuda")
    alone = form.select_tokens(q[-1:], k, w[-1:], 2048, starts, ends, return_scores=True)
    assert all(torch.equal(a, b[-1:]) for a, b in zip(alone, reference, strict=True))
