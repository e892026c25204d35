"""Dense attention's gradients in Triton against float64: through output and sums; ranges, groups of heads, odd widths, views."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.devices import on_each_device
from tests.kernels.test_dense_attention import definition, ranges

pytest.importorskip("triton")
form = pytest.importorskip("rorqual.kernels.dense_attention_triton")

SHAPES = ((1, 1, 1, 1, 3, 2), (5, 70, 4, 1, 24, 16), (37, 61, 3, 3, 10, 6), (90, 90, 2, 2, 96, 64), (33, 130, 6, 2, 40, 20))


def draw(T, S, H, G, D, L, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(T + S)
    shapes = ((T, H, D), (S, G, D), (S, G, L))
    return [torch.randn(*shape, generator=generator).to(dtype).to(device).requires_grad_() for shape in shapes], generator


def compare(inputs, scale, seen, tolerance, **bounds) -> None:
    truth = [x.detach().double().requires_grad_() for x in inputs]
    rows = seen.any(1)  # a row without keys has no softmax
    found = form.dense_attention(*inputs, scale, **bounds)
    expected = definition(truth[0][rows], *truth[1:], scale, seen[rows])
    for a, b in zip(found, expected, strict=True):
        assert ((a[rows].double() - b).norm() / b.norm()).item() < tolerance
    ups = [torch.randn_like(x) for x in found]
    ups[1] *= rows[:, None]
    wanted = torch.autograd.grad(expected, truth, [x.double()[rows] for x in ups])
    for name, a, b in zip("qkv", torch.autograd.grad(found, inputs, ups), wanted, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < tolerance, name


@on_each_device
@pytest.mark.parametrize(("T", "S", "H", "G", "D", "L"), SHAPES)
def test_causal_form_and_each_gradient_match_float64(device, T, S, H, G, D, L):
    inputs, _ = draw(T, S, H, G, D, L, device)
    seen = torch.arange(S) < torch.arange(S - T + 1, S + 1)[:, None]
    compare(inputs, 0.3, seen.to(device), 1e-5)


@on_each_device
@pytest.mark.parametrize(("T", "S", "H", "G", "D", "L"), SHAPES[1:])
def test_ranges_bound_what_a_row_sees_and_what_it_moves(device, T, S, H, G, D, L):
    inputs, generator = draw(T, S, H, G, D, L, device)
    starts, ends = ranges(T, S, generator)
    ends[T // 2] = starts[T // 2]  # a row without keys
    seen = (torch.arange(S) >= starts[:, None]) & (torch.arange(S) < ends[:, None])
    compare(inputs, 0.3, seen.to(device), 1e-5, starts=starts.to(device), ends=ends.to(device))
    out, lse = form.dense_attention(*inputs, 0.3, starts.to(device), ends.to(device))
    assert (out[T // 2] == 0).all() and (lse[T // 2] == -torch.inf).all()


@on_each_device
def test_views_of_wider_rows_are_read_as_they_are(device):
    wide = torch.randn(50, 2, 24 + 16, device=device)
    inputs = [torch.randn(50, 2, 24, device=device).requires_grad_(), *(x.requires_grad_() for x in wide.split([24, 16], -1))]
    seen = torch.arange(50) <= torch.arange(50)[:, None]
    compare(inputs, 0.3, seen.to(device), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("T", "S", "H", "G", "D", "L"), [(700, 700, 4, 4, 192, 128), (513, 2100, 16, 16, 96, 64), (300, 900, 16, 1, 160, 128)]
)
def test_bfloat16_matches_float64_and_repeats_bit_for_bit(T, S, H, G, D, L):
    inputs, generator = draw(T, S, H, G, D, L, "cuda", torch.bfloat16)
    starts, ends = ranges(T, S, generator)
    seen = (torch.arange(S) >= starts[:, None]) & (torch.arange(S) < ends[:, None])
    compare(inputs, D**-0.5, seen.cuda(), 1.5e-2, starts=starts.cuda(), ends=ends.cuda())

    def run():
        out, _ = form.dense_attention(*inputs, D**-0.5, starts.cuda(), ends.cuda())
        return out, *torch.autograd.grad(out, inputs, torch.ones_like(out))

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)
