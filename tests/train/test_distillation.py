"""Reverse KL: value and gradient against the closed form in float64; the sampled estimator has the same expectation of both."""

from __future__ import annotations

import pytest
import torch

from rorqual.kernels import logprobs
from rorqual.train.distillation import reverse_kl
from rorqual.train.grpo import kl_estimate


def drawn(n=37, d=11, e=7, v=53, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (n, d), "head": (v, d), "teacher_hidden": (n, e), "teacher_head": (v, e)}
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def closed_form(hidden, head, teacher_hidden, teacher_head, temperature):
    """The whole matrices at once, by the definition."""
    scale = torch.as_tensor(temperature, dtype=hidden.dtype).expand(len(hidden))[:, None]
    p = torch.softmax(hidden @ head.T / scale, 1)
    q = torch.softmax(teacher_hidden @ teacher_head.T / scale, 1)
    return (p * (p / q).log()).sum(1)


@pytest.mark.parametrize("temperature", [1.0, 0.6, "by row"])
@pytest.mark.parametrize("chunk", [1 << 22, 53 * 16])
def test_value_and_every_gradient_are_the_closed_form_s(monkeypatch, temperature, chunk):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", chunk)
    given = drawn()
    if temperature == "by row":
        temperature = torch.linspace(0.5, 2, 37, dtype=torch.float64)
    weights = torch.randn(37, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, gradients = {}, {}
    for name, function in (("tiles", reverse_kl), ("whole", closed_form)):
        leaves = {key: value.clone().requires_grad_() for key, value in given.items()}
        found[name] = function(**leaves, temperature=temperature)
        (found[name] * weights).sum().backward()
        gradients[name] = {key: leaf.grad for key, leaf in leaves.items()}
    assert torch.allclose(found["tiles"], found["whole"], rtol=1e-12, atol=1e-13) and (found["tiles"] > 0).all()
    for name in ("hidden", "head"):
        ours, theirs = gradients["tiles"][name], gradients["whole"][name]
        assert (ours - theirs).abs().max() < 1e-12 * theirs.abs().max(), name
    assert gradients["tiles"]["teacher_hidden"] is None and gradients["tiles"]["teacher_head"] is None


def test_a_student_that_equals_its_teacher_has_no_divergence_and_no_gradient():
    given = drawn(e=11)
    hidden, head = given["hidden"].requires_grad_(), given["head"].requires_grad_()
    found = reverse_kl(hidden, head, hidden, head)
    found.sum().backward()
    assert found.abs().max() < 1e-13 and hidden.grad.abs().max() < 1e-13 and head.grad.abs().max() < 1e-13


def test_float32_is_close_to_float64_and_saturated_distributions_stay_finite():
    given = drawn()
    wide = reverse_kl(**given)
    narrow = reverse_kl(**{name: value.float() for name, value in given.items()})
    assert narrow.dtype == torch.float32 and torch.allclose(narrow.double(), wide, rtol=1e-4, atol=1e-5)
    far = {name: value.float() * 30 for name, value in given.items()}
    far["hidden"].requires_grad_()
    found = reverse_kl(**far)
    found.sum().backward()
    assert found.isfinite().all() and far["hidden"].grad.isfinite().all()


@pytest.mark.parametrize("kl", ["unbiased", "k3"])
def test_the_sampled_estimator_has_the_divergence_s_value_and_gradient_in_expectation(kl):
    """Every token weighed by the probability that the sampler drew it, the sampler being some updates behind the student. K3,
    the control, has neither there."""
    generator = torch.Generator().manual_seed(3)
    logits, teacher, lag = torch.randn(3, 29, dtype=torch.float64, generator=generator).unbind()
    sampler = torch.log_softmax(logits + 0.3 * lag, 0)
    logits.requires_grad_()
    p, q = torch.log_softmax(logits, 0), torch.log_softmax(teacher, 0)
    exact = (p.exp() * (p - q)).sum()
    (wanted,) = torch.autograd.grad(exact, logits, retain_graph=True)
    ratio = (p - sampler).exp()
    expected = (sampler.exp() * kl_estimate(ratio[None], p[None], q[None], kl)[0]).sum()
    (gradient,) = torch.autograd.grad(expected, logits)
    is_right = torch.allclose(expected, exact, atol=1e-12) and torch.allclose(gradient, wanted, atol=1e-12)
    assert is_right == (kl == "unbiased")


def test_shapes_that_do_not_fit_are_refused():
    given = drawn()
    with pytest.raises(ValueError, match="expected 37 rows over 53 tokens, found 36 over 53"):
        reverse_kl(**{**given, "teacher_hidden": given["teacher_hidden"][1:]})
    with pytest.raises(ValueError, match="found 37 over 52"):
        reverse_kl(**{**given, "teacher_head": given["teacher_head"][1:]})
