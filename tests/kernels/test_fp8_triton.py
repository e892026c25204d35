"""Block FP8 in Triton: conversions bit for bit PyTorch's, quantising the plain form's bytes, products against float64."""

from __future__ import annotations

import pytest
import torch

from rorqual.kernels.fp8 import (
    dequantize_activation,
    dequantize_weight,
    fp8_matmul_plain,
    quantize_activation_plain,
    quantize_weight_plain,
)
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


@on_each_device
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize(("shape", "block"), [((3, 128), 128), ((33, 300), 128), ((2, 5, 64), 64), ((1, 1), 128), ((70, 7), 24)])
def test_activations_are_quantised_to_the_plain_forms_bytes(device, shape, block, power_of_two):
    x = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 30).to(device)
    x.view(-1)[0] = 0
    values, scale = form.quantize_activation(x, power_of_two, block)
    wanted, wanted_scale = quantize_activation_plain(x, power_of_two, block)
    assert torch.equal(scale, wanted_scale) and torch.equal(values.float(), wanted.float())


@on_each_device
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("shape", [(128, 128), (130, 300), (2, 3, 5), (1, 1)])
def test_weights_are_quantised_to_the_plain_forms_bytes(device, shape, power_of_two):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(device)
    values, scale = form.quantize_weight(weight, power_of_two)
    wanted, wanted_scale = quantize_weight_plain(weight, power_of_two)
    assert torch.equal(scale, wanted_scale) and torch.equal(values.float(), wanted.float())


def operands(N, M, K, device, seed=3):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(N, K, generator=generator), torch.randn(M, K, generator=generator)
    a *= 2.0 ** torch.randint(-6, 6, (N, 1), generator=generator)
    values, scale = quantize_activation_plain(a)
    weight, weight_scale = quantize_weight_plain(b)
    return values.to(device), scale.to(device), weight.to(device), weight_scale.to(device)


def exact(a, a_scale, b, b_scale):
    return dequantize_activation(a, a_scale, torch.float64) @ dequantize_weight(b, b_scale, torch.float64).t()


@on_each_device
@pytest.mark.parametrize(("N", "M", "K"), [(3, 130, 300), (17, 5, 128), (1, 1, 1), (70, 200, 257)])
def test_products_match_float64(device, N, M, K):
    """Float32 sums on a card without FP8 units; the matrix unit's own sum of 128 terms keeps about 13 bits on Hopper."""
    inputs = operands(N, M, K, device)
    found = form.triton_matmul(*inputs)
    wanted = exact(*inputs)
    assert ((found.double() - wanted).norm() / wanted.norm()).item() < (2e-6 if device == "cpu" else 1e-3)
    assert form.triton_matmul(*inputs, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("N", "M", "K"), [(4096, 1536, 7168), (256, 2112, 1536), (64, 7168, 2048), (273, 576, 7168), (1000, 512, 384), (1, 256, 1152)]
)
def test_released_layers_match_float64_by_both_forms(N, M, K):
    inputs = operands(N, M, K, "cuda")
    wanted = exact(*inputs)
    forms = [form.triton_matmul, form.fp8_matmul]
    if form.library_takes(inputs[0], inputs[2], torch.bfloat16):
        forms.append(form.scaled_matmul)
    for each in forms:
        found = each(*inputs, torch.bfloat16)
        assert ((found.double() - wanted).norm() / wanted.norm()).item() < 4e-3, each.__name__
        assert torch.equal(found, each(*inputs, torch.bfloat16)), "two runs differ"
    plain = fp8_matmul_plain(*inputs)
    assert ((form.fp8_matmul(*inputs).double() - plain.double()).norm() / plain.double().norm()).item() < 1e-3


@pytest.mark.gpu
def test_bytes_and_products_beyond_two_billion_elements():
    """300,000 rows of 7,168 are 2.15e9 numbers: the last rows get the bytes and products of the first ones."""
    generator = torch.Generator().manual_seed(5)
    some = torch.randn(64, 7168, generator=generator).bfloat16().cuda()
    x = torch.zeros(300_000, 7168, dtype=torch.bfloat16, device="cuda")
    x[:64], x[-64:] = some, some
    values, scale = form.quantize_activation(x)
    assert torch.equal(values[:64].view(torch.uint8), values[-64:].view(torch.uint8)) and torch.equal(scale[:64], scale[-64:])
    assert torch.equal(values[:64].float(), quantize_activation_plain(some)[0].float())
    b, b_scale = form.quantize_weight(torch.randn(128, 7168, generator=generator).cuda())
    out = form.triton_matmul(values, scale, b, b_scale, torch.bfloat16)
    assert torch.equal(out[:64], out[-64:]) and out[:64].any()
