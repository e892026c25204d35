"""Block FP8 in Triton: conversions bit for bit PyTorch's, quantising the plain form's bytes, products against float64."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.devices import on_each_device

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

form = pytest.importorskip("rorqual.kernels.fp8_triton")


@triton.jit
def both_ways(X, CODES, BACK, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    code = form.to_e4m3(tl.load(X + at))
    tl.store(CODES + at, code)
    tl.store(BACK + at, form.from_e4m3(code))


@on_each_device
def test_eight_bit_conversions_are_those_of_pytorch(device):
    """All 256 codes, the midpoints between neighbours (ties to even) and numbers a bit beside them, and random ones."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = values[values.isfinite()].sort().values
    middles = (finite[1:] + finite[:-1]) / 2
    beside = torch.cat([middles * (1 + 1e-6), middles * (1 - 1e-6), middles * (1 + 2**-23)])
    drawn = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    x = torch.cat([values, middles, beside, drawn, drawn * 100, drawn * 1e-3, torch.tensor([1e9, -1e9, 0.0, -0.0])])
    x = torch.cat([x, x.new_zeros(-len(x) % 256)]).to(device)
    codes, back = torch.empty_like(x, dtype=torch.uint8), torch.empty_like(x)
    both_ways[(len(x) // 256,)](x, codes, back, N=256)
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    is_number = ~x.isnan()
    assert torch.equal(codes[is_number], expected.view(torch.uint8)[is_number])
    assert torch.equal(back[is_number], expected.float()[is_number])
    assert back[~is_number].isnan().all()
