"""The experts' GPU form: routing, SwiGLU and gated sum in the interpreter; the grouped products against float64 on a GPU."""

from __future__ import annotations

import pytest
import torch

from rorqual.kernels.experts import experts_plain
from tests.kernels.devices import on_each_device

pytest.importorskip("triton")
form = pytest.importorskip("rorqual.kernels.experts_triton")


def routing(N, K, E, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(N, E, generator=generator).topk(K).indices
    chosen[0, 0] = -1
    chosen[N // 2] = -1
    return chosen.to(device), torch.rand(N, K, generator=generator).to(device)


@on_each_device
def test_pairs_are_sorted_by_expert_and_combined_in_order(device):
    chosen, gates = routing(11, 3, 5, device)
    routed = form.plan(chosen, 5)
    flat = chosen.flatten()
    assert torch.equal(routed.ends.long(), torch.stack([(flat.ge(0) & flat.le(e)).sum() for e in range(5)]))
    assert torch.equal(flat[routed.order][: int(routed.ends[-1])], flat[flat >= 0].sort().values)
    y = torch.randn(33, 70, device=device)
    y[int(routed.ends[-1]) :] = torch.nan  # rows without an expert are undefined
    expected = torch.zeros(11, 70, device=device, dtype=torch.float64)
    for n in range(11):
        for k in range(3):
            if chosen[n, k] >= 0:
                expected[n] += gates[n, k].double() * y[routed.place[n, k]].double()
    assert torch.allclose(form.combined(y, routed, chosen, gates).double(), expected, atol=1e-5)


@on_each_device
def test_swiglu_and_its_gradient_match_float64(device):
    a, b, grad = (torch.randn(37, 70, device=device) for _ in range(3))
    leaves = [a.double().requires_grad_(), b.double().requires_grad_()]
    expected = torch.nn.functional.silu(leaves[0]) * leaves[1]
    wanted = torch.autograd.grad(expected, leaves, grad.double())
    hidden, *grads = form.swiglu_gradient(a, b, grad)
    assert torch.allclose(form.swiglu(a, b).double(), expected, atol=1e-6)
    assert torch.equal(hidden, form.swiglu(a, b))
    assert all(torch.allclose(x.double(), y, atol=1e-5) for x, y in zip(grads, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "K", "E", "D", "F"), [(300, 4, 16, 512, 256), (17, 2, 64, 64, 128), (1, 1, 3, 64, 64)])
def test_grouped_products_and_every_gradient_match_float64(N, K, E, D, F):
    torch.manual_seed(0)
    chosen, gates = routing(N, K, E, "cuda")
    if N == 1:
        chosen = torch.zeros_like(chosen)
    draw = lambda *shape: torch.randn(*shape, device="cuda").mul(shape[-1] ** -0.5).bfloat16()  # noqa: E731
    inputs = [torch.randn(N, D, device="cuda").bfloat16(), draw(E, F, D), draw(E, D, F), draw(E, F, D)]
    leaves = [*(x.requires_grad_() for x in inputs), gates.requires_grad_()]
    truth = [x.detach().double().requires_grad_() for x in leaves]
    run = lambda f, xs: f(*xs[:4], chosen, xs[4])  # noqa: E731
    found, expected = run(form.experts, leaves), run(experts_plain, truth)
    grad = torch.randn_like(found)
    assert ((found.double() - expected).norm() / expected.norm()).item() < 1e-2
    grads, wanted = torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, truth, grad.double())
    # A gate's gradient is y . grad: it rounds with their sizes, not with its own, which may be small.
    ones = torch.ones_like(truth[4][:, :1])
    x, w1, w2, w3 = (tensor.detach() for tensor in truth[:4])
    y = [experts_plain(x, w1, w2, w3, chosen[:, k : k + 1], ones).norm(dim=1) for k in range(K)]
    sizes = {"gates": (torch.stack(y, 1) * grad.double().norm(dim=1, keepdim=True)).norm()}
    for name, a, b in zip(("x", "w1", "w2", "w3", "gates"), grads, wanted, strict=True):
        assert not a.isnan().any(), name
        assert ((a.double() - b).norm() / sizes.get(name, b.norm())).item() < 1.5e-2, name
