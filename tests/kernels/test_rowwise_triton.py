"""Norms, rotary turns and SwiGLU's product in Triton against the plain forms in float64: values, every gradient, views."""

from __future__ import annotations

import pytest
import torch

from rorqual.kernels import rowwise
from tests.kernels.devices import on_each_device

pytest.importorskip("triton")
form = pytest.importorskip("rorqual.kernels.rowwise_triton")


def check(ours, theirs, leaves, tolerance=1e-5) -> None:
    truth = [x.detach().double().requires_grad_() for x in leaves]
    found, expected = ours(*leaves), theirs(*truth)
    assert found.shape == expected.shape
    assert ((found.double() - expected).norm() / expected.norm()).item() < tolerance
    up = torch.randn_like(found)
    wanted = torch.autograd.grad(expected, truth, up.double())
    for a, b in zip(torch.autograd.grad(found, leaves, up), wanted, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < tolerance


def norm(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@on_each_device
@pytest.mark.parametrize("shape", [(1, 3), (37, 100), (5, 3, 64), (300, 8)])
def test_norm_and_both_gradients_match_float64(device, shape, monkeypatch):
    monkeypatch.setattr(form, "PROGRAMS", 3)  # several blocks of rows for each program
    leaves = [torch.randn(*s, device=device).requires_grad_() for s in (shape, shape[-1:])]
    check(lambda x, w: form.rms_norm(x, w, 1e-6), norm, leaves)


@on_each_device
def test_norm_reads_a_view_of_wider_rows(device):
    wide = torch.randn(21, 48 + 16, device=device)
    leaves = [wide.split([48, 16], -1)[0].requires_grad_(), torch.randn(48, device=device).requires_grad_()]
    check(lambda x, w: form.rms_norm(x, w, 1e-6), norm, leaves)


def rotated(x, cos, sin, interleaved):
    """Complex numbers times e^(i angle)."""
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    shape = (len(x), *(1,) * (x.dim() - 2), -1)
    turned = torch.complex(a, b) * torch.complex(cos.double(), sin.double()).view(shape)
    return torch.stack([turned.real, turned.imag], -1).flatten(-2) if interleaved else torch.cat([turned.real, turned.imag], -1)


@on_each_device
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("shape", [(1, 2), (9, 3, 16), (40, 5, 12), (200, 32)])
def test_turns_and_their_gradient_match_complex_numbers(device, shape, interleaved):
    angle = torch.randn(shape[0], shape[-1] // 2, device=device)
    cos, sin = angle.cos() * 1.1, angle.sin() * 1.1
    leaves = [torch.randn(*shape, device=device).requires_grad_()]
    check(lambda x: form.turn(x, cos, sin, interleaved), lambda x: rotated(x, cos, sin, interleaved), leaves)


@on_each_device
def test_turn_reads_the_last_dims_of_wider_heads(device):
    angle = torch.randn(13, 8, device=device)
    leaves = [torch.randn(13, 3, 40, device=device).split([24, 16], -1)[1].requires_grad_()]
    cos, sin = angle.cos(), angle.sin()
    check(lambda x: form.turn(x, cos, sin, True), lambda x: rotated(x, cos, sin, True), leaves)


@on_each_device
def test_product_of_swiglu_and_its_gradients_match_float64(device):
    leaves = [torch.randn(37, 70, device=device).requires_grad_() for _ in range(2)]
    check(form.silu_product, lambda a, b: torch.nn.functional.silu(a) * b, leaves)


@pytest.mark.gpu
def test_the_model_s_functions_take_these_forms_on_a_gpu_in_bfloat16():
    x, w = torch.randn(300, 512, device="cuda").bfloat16(), torch.randn(512, device="cuda").bfloat16()
    check(lambda x, w: rowwise.rms_norm(x, w, 1e-6), norm, [x.requires_grad_(), w.requires_grad_()], 1e-2)
    assert rowwise.fused_form("rms_norm", x, w) is form.rms_norm
