"""Block FP8 against the formula, element by element: scales, edge blocks, the product, the cache layouts byte by byte."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from rorqual.kernels import (
    dequantize_activation,
    dequantize_weight,
    fp8_matmul,
    pack_index_key,
    pack_latent,
    quantize_activation,
    quantize_weight,
    unpack_index_key,
    unpack_latent,
)
from rorqual.kernels.fp8 import round_up_to_power_of_two


def expected_scale(block: torch.Tensor, power_of_two: bool) -> float:
    scale = torch.tensor(max(block.abs().max().item(), 1e-4), dtype=torch.float32).div(448).item()
    return 2.0 ** math.ceil(math.log2(scale)) if power_of_two else scale


def test_rounding_up_to_a_power_of_two_is_the_bit_trick() -> None:
    """Exponent field minus 127, plus one where the mantissa is not zero, over all kinds of float32."""
    values = torch.cat([torch.tensor([1e-4 / 448, 1.0, 2.0, 0.5, 3.0, 1 + 2**-23, 2 - 2**-22, 448.0]), torch.rand(1000) * 5])
    for value, rounded in zip(values.tolist(), round_up_to_power_of_two(values).tolist(), strict=True):
        (bits,) = struct.unpack("<I", struct.pack("<f", value))
        assert rounded == 2.0 ** ((bits >> 23) - 127 + (bits & 0x7FFFFF != 0)), value


@pytest.mark.parametrize("power_of_two", (True, False))
@pytest.mark.parametrize("M, K", ((128, 128), (300, 200), (576, 130), (1, 1), (129, 640)))
def test_weight_blocks_follow_the_formula_edges_included(M, K, power_of_two, generator) -> None:
    weight = torch.randn(M, K, generator=generator) * torch.logspace(-6, 4, K)
    values, scale = quantize_weight(weight, power_of_two)
    assert values.dtype == torch.float8_e4m3fn and values.shape == (M, K) and values.is_contiguous()
    assert scale.dtype == torch.float32 and scale.shape == (math.ceil(M / 128), math.ceil(K / 128))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            here = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            step = expected_scale(weight[here], power_of_two)
            assert scale[i, j].item() == pytest.approx(step, rel=1e-6 if not power_of_two else 0)
            quantized = (weight[here] / scale[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn)
            assert torch.equal(values[here].float(), quantized.float())
            assert torch.equal(dequantize_weight(values, scale)[here], quantized.float() * scale[i, j])


def test_quantising_what_was_dequantised_changes_nothing(generator) -> None:
    """With power-of-two scales a bf16 copy of a released weight goes back to the same bytes."""
    values, scale = quantize_weight(torch.randn(300, 260, generator=generator))
    weight = dequantize_weight(values, scale, torch.bfloat16)
    again, again_scale = quantize_weight(weight)
    assert torch.equal(dequantize_weight(again, again_scale), weight.float())
    error = (weight.float() - dequantize_weight(values, scale)).abs().max()
    assert error == 0


def test_relative_error_is_at_most_half_a_step(generator) -> None:
    x = torch.randn(64, 512, generator=generator)
    for power_of_two in (True, False):
        error = (dequantize_activation(*quantize_activation(x, power_of_two)) - x).abs()
        assert (error <= x.abs() * 2**-4 + x.abs().amax() * 2**-9).all()


@pytest.mark.parametrize("power_of_two", (True, False))
@pytest.mark.parametrize("shape", ((5, 128), (3, 2, 300), (1, 1)))
def test_activation_blocks_follow_the_formula(shape, power_of_two, generator) -> None:
    x = torch.randn(*shape, generator=generator) * 100
    x.view(-1)[0] = 0
    values, scale = quantize_activation(x, power_of_two)
    assert values.shape == x.shape and scale.shape == (*shape[:-1], math.ceil(shape[-1] / 128))
    for row, quantized, steps in zip(
        x.view(-1, shape[-1]), values.view(-1, shape[-1]), scale.view(-1, scale.shape[-1]), strict=True
    ):
        for j, step in enumerate(steps.tolist()):
            here = slice(128 * j, 128 * j + 128)
            assert step == pytest.approx(expected_scale(row[here], power_of_two), rel=1e-6)
            assert torch.equal(quantized[here].float(), (row[here] / step).clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_zeros_and_leading_dims_are_handled() -> None:
    values, scale = quantize_weight(torch.zeros(2, 130, 5))
    assert values.shape == (2, 130, 5) and scale.shape == (2, 2, 1)
    assert (dequantize_weight(values, scale) == 0).all() and (scale == 2.0 ** math.ceil(math.log2(1e-4 / 448))).all()


def test_a_scale_of_the_wrong_shape_is_an_error_that_names_both() -> None:
    values, scale = quantize_weight(torch.ones(300, 200))
    with pytest.raises(ValueError, match=r"expected shape \[3, 2\] for a weight \[300, 200\], found \[2, 2\]"):
        dequantize_weight(values, scale[:2])


@pytest.mark.parametrize("N, M, K", ((3, 130, 300), (17, 5, 128), (1, 1, 1)))
def test_product_equals_the_dequantised_product(N, M, K, generator) -> None:
    a, a_scale = quantize_activation(torch.randn(N, K, generator=generator))
    b, b_scale = quantize_weight(torch.randn(M, K, generator=generator))
    exact = dequantize_activation(a, a_scale, torch.float64) @ dequantize_weight(b, b_scale, torch.float64).t()
    torch.testing.assert_close(fp8_matmul(a, a_scale, b, b_scale).double(), exact, rtol=1e-5, atol=1e-5)
    assert fp8_matmul(a, a_scale, b, b_scale, torch.bfloat16).dtype == torch.bfloat16


def test_an_index_key_is_132_bytes_values_then_scale(generator) -> None:
    key = torch.randn(2, 7, 128, generator=generator)
    packed = pack_index_key(key)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 7, 132)
    entry = bytes(packed[1, 3].tolist())
    (scale,) = struct.unpack("<f", entry[128:])
    assert scale == expected_scale(key[1, 3], True)
    values = torch.frombuffer(bytearray(entry[:128]), dtype=torch.float8_e4m3fn).float()
    assert torch.equal(unpack_index_key(packed)[1, 3], values * scale)
    assert ((unpack_index_key(packed) - key).abs() <= key.abs() * 2**-4 + scale).all()


def test_a_latent_entry_is_656_bytes_values_scales_rope(generator) -> None:
    latent, rope = torch.randn(5, 512, generator=generator) * 3, torch.randn(5, 64, generator=generator)
    packed = pack_latent(latent, rope)
    assert packed.dtype == torch.uint8 and packed.shape == (5, 656)
    entry = bytes(packed[2].tolist())
    scales = struct.unpack("<4f", entry[512:528])
    assert scales == tuple(expected_scale(latent[2, 128 * j : 128 * j + 128], True) for j in range(4))
    stored = torch.frombuffer(bytearray(entry[528:]), dtype=torch.bfloat16)
    assert torch.equal(stored, rope[2].bfloat16())
    values = torch.frombuffer(bytearray(entry[:512]), dtype=torch.float8_e4m3fn).float()
    back, back_rope = unpack_latent(packed, 512)
    assert torch.equal(back[2], values * torch.tensor(scales).repeat_interleave(128))
    assert torch.equal(back_rope, rope.bfloat16().float())


def test_a_latent_that_does_not_fill_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a multiple of 128 values, found 100"):
        pack_latent(torch.zeros(1, 100), torch.zeros(1, 8))
