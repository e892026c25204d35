"""The GRPO objective against a loop that reads as the formula does, and against closed forms on toy categoricals."""

from __future__ import annotations

import math

import pytest
import torch

from rorqual.train import grpo_loss

PLAIN = dict(clip_low=0.2, clip_high=0.2, beta=0.0)


def random_batch(n=5, t=7, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    draw = lambda scale: -torch.rand(n, t, generator=g, dtype=dtype) * scale  # noqa: E731
    mask = torch.rand(n, t, generator=g) < 0.7
    mask[:, 0] = True
    sampler = draw(3.0)
    trainer = (sampler + torch.randn(n, t, generator=g, dtype=dtype) * 0.4).requires_grad_()
    return trainer, sampler, torch.randn(n, generator=g, dtype=dtype), mask, draw(3.0)


def slow_reference(trainer, sampler, advantages, mask, reference, clip_low, clip_high, beta, kl, delta, reduction, groups):
    """Scalar by scalar, as the paper's formula reads."""
    n, t_max = trainer.shape
    objective = 0.0
    length = {g: sum(int(mask[j].sum()) for j in range(n) if groups[j] == g) for g in groups}
    drift = {
        g: sum(float(sampler[j, t] - trainer[j, t]) for j in range(n) for t in range(t_max) if groups[j] == g and mask[j, t])
        / max(length[g], 1)
        for g in groups
    }
    for i in range(n):
        keep = 0.0 if delta is not None and advantages[i] < 0 and drift[groups[i]] > delta[i] else 1.0
        for t in range(t_max):
            if not mask[i, t]:
                continue
            r = torch.exp(trainer[i, t] - sampler[i, t])
            clipped = torch.clamp(r, 1 - clip_low, 1 + clip_high)
            term = torch.min(r * advantages[i], clipped * advantages[i]) * keep
            x = torch.exp(reference[i, t] - trainer[i, t])
            k = {
                "unbiased": r * (x - torch.log(x) - 1),
                "k1": -torch.log(x),
                "k2": torch.log(x) ** 2 / 2,
                "k3": x - torch.log(x) - 1,
            }
            term = term - beta[i] * k[kl]
            if reduction == "sequence":
                objective = objective + term / length[groups[i]] / len(set(groups))
            elif reduction == "token":
                objective = objective + term / int(mask.sum())
            else:
                objective = objective + term / (n * t_max)
    return -objective


@pytest.mark.parametrize("kl", ["unbiased", "k1", "k2", "k3"])
@pytest.mark.parametrize("reduction", ["sequence", "token", "constant"])
@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4], [7, 7, 3, 3, 3]])
def test_loss_and_gradient_equal_the_formula_read_scalar_by_scalar(kl, reduction, groups):
    trainer, sampler, advantages, mask, reference = random_batch()
    for g in set(groups):  # samples of one trajectory share one advantage
        rows = [i for i in range(5) if groups[i] == g]
        advantages[rows] = advantages[rows[0]].clone()
    beta, delta = torch.linspace(0.01, 0.3, 5, dtype=torch.float64), torch.full((5,), -0.05, dtype=torch.float64)
    loss, _ = grpo_loss(
        trainer, sampler, advantages, mask, reference, clip_low=0.2, clip_high=0.28, beta=beta, kl=kl,
        off_policy_delta=delta, reduction=reduction, trajectory=torch.tensor(groups),
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, trainer)
    slow = slow_reference(trainer, sampler, advantages, mask, reference, 0.2, 0.28, beta, kl, delta, reduction, groups)
    (slow_grad,) = torch.autograd.grad(slow, trainer)
    torch.testing.assert_close(loss, slow, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, slow_grad, rtol=0, atol=1e-12)


def kl_gradient_under_uniform_sampler(kl: str, logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The gradient of E_old[KL estimate]: with a uniform sampler every token of the vocabulary is one row of equal weight."""
    v = len(logits)
    logits = logits.clone().requires_grad_()
    trainer = logits.log_softmax(-1)[:, None]
    sampler = torch.full((v, 1), -math.log(v), dtype=torch.float64)
    loss, _ = grpo_loss(
        trainer, sampler, torch.zeros(v, dtype=torch.float64), torch.ones(v, 1), reference.log_softmax(-1)[:, None],
        clip_low=0.2, clip_high=0.2, beta=1.0, kl=kl,
    )  # fmt: skip
    return torch.autograd.grad(loss, logits)[0]


def test_gradient_of_the_unbiased_kl_is_the_exact_one_and_k3_is_not():
    g = torch.Generator().manual_seed(1)
    logits, reference = torch.randn(2, 11, generator=g, dtype=torch.float64)
    exact_logits = logits.clone().requires_grad_()
    p, q = exact_logits.log_softmax(-1), reference.log_softmax(-1)
    (exact,) = torch.autograd.grad((p.exp() * (p - q)).sum(), exact_logits)
    assert (kl_gradient_under_uniform_sampler("unbiased", logits, reference) - exact).abs().max() < 1e-8
    assert (kl_gradient_under_uniform_sampler("k3", logits, reference) - exact).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("advantage", "drift", "kept"), [(1, 1, True), (1, -1, True), (-1, 1, False), (-1, -1, True), (0, 1, True)]
)
def test_only_negative_advantages_far_off_policy_lose_their_policy_term(advantage, drift, kept):
    sampler = torch.full((1, 4), -1.0, dtype=torch.float64)
    trainer = (sampler - 0.5 * drift).requires_grad_()
    args = (trainer, sampler, torch.tensor([float(advantage)]), torch.ones(1, 4), sampler - 0.3)
    _, stats = grpo_loss(*args, **PLAIN | dict(beta=0.1), off_policy_delta=0.4)
    _, free = grpo_loss(*args, **PLAIN | dict(beta=0.1))
    assert stats["masked_share"] == (0 if kept else 1)
    assert stats["policy_loss"] == (free["policy_loss"] if kept else 0)
    assert stats["kl_loss"] == free["kl_loss"] != 0, "the mask is not on the KL term"


def test_the_mask_decides_by_the_mean_of_the_whole_trajectory():
    sampler = torch.full((2, 2), -1.0)
    trainer = sampler - torch.tensor([[1.0, 1.0], [-0.8, -0.8]])  # means of log(old / theta): 1.0 and -0.8, joined 0.1
    args = (trainer, sampler, torch.tensor([-1.0, -1.0]), torch.ones(2, 2))
    assert grpo_loss(*args, **PLAIN, off_policy_delta=0.5)[1]["masked_share"] == 0.5
    joined = torch.tensor([4, 4])
    assert grpo_loss(*args, **PLAIN, off_policy_delta=0.5, trajectory=joined)[1]["masked_share"] == 0
    assert grpo_loss(*args, **PLAIN, off_policy_delta=0.05, trajectory=joined)[1]["masked_share"] == 1


def test_micro_batches_with_the_whole_denominator_add_up():
    trainer, sampler, advantages, mask, reference = random_batch(6)
    for reduction, whole in [("sequence", 6), ("token", int(mask.sum())), ("constant", mask.numel())]:
        full, _ = grpo_loss(trainer, sampler, advantages, mask, reference, **PLAIN | dict(beta=0.1), reduction=reduction)
        parts = sum(
            grpo_loss(
                trainer[s], sampler[s], advantages[s], mask[s], reference[s], **PLAIN | dict(beta=0.1),
                reduction=reduction, denominator=whole,
            )[0]
            for s in (slice(0, 2), slice(2, 6))
        )  # fmt: skip
        torch.testing.assert_close(full, parts, rtol=0, atol=1e-12)


def test_masked_positions_may_hold_nan_and_do_not_reach_value_or_gradient():
    trainer, sampler, advantages, mask, reference = random_batch()
    poison = torch.where(mask, 0.0, torch.nan)
    clean, _ = grpo_loss(trainer, sampler, advantages, mask, reference, **PLAIN | dict(beta=0.1))
    poisoned = (trainer.detach() + poison).requires_grad_()
    loss, stats = grpo_loss(poisoned, sampler + poison, advantages, mask, reference + poison, **PLAIN | dict(beta=0.1))
    assert loss == clean
    (grad,) = torch.autograd.grad(loss, poisoned)
    assert grad.isfinite().all() and (grad[~mask] == 0).all()
    assert all(value.isfinite() for value in stats.values())


def test_an_empty_row_contributes_nothing_and_is_counted():
    trainer, sampler, advantages, mask, _ = random_batch(3)
    mask[1] = False
    loss, stats = grpo_loss(trainer, sampler, advantages, mask, **PLAIN)
    assert stats["empty_rows"] == 1 and stats["sequences"] == 3
    rest = [0, 2]
    without, _ = grpo_loss(trainer[rest], sampler[rest], advantages[rest], mask[rest], **PLAIN, denominator=3)
    torch.testing.assert_close(loss, without)
    loss, stats = grpo_loss(trainer, sampler, advantages, torch.zeros_like(mask), **PLAIN)
    assert loss == 0 and stats["empty_rows"] == 3


def test_low_precision_inputs_are_computed_in_float32():
    trainer, sampler, advantages, mask, _ = random_batch(dtype=torch.float32)
    loss, _ = grpo_loss(trainer.bfloat16(), sampler.bfloat16(), advantages, mask, **PLAIN)
    assert loss.dtype == torch.float32


def test_identical_policies_show_no_mismatch_and_no_clipping():
    _, sampler, advantages, mask, _ = random_batch()
    _, stats = grpo_loss(sampler, sampler, advantages, mask, **PLAIN, off_policy_delta=0.0)
    assert stats["mismatch_abs"] == stats["mismatch_k3"] == stats["clip_share"] == stats["masked_share"] == 0
    assert stats["ratio_mean"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(advantages=torch.zeros(4)), r"advantages: expected \[5\]"),
        (dict(mask=torch.ones(5, 6)), r"mask: expected the shape"),
        (dict(kl="k9"), "kl: expected one of unbiased"),
        (dict(reduction="mean"), "reduction: expected one of sequence"),
        (dict(denominator=0.0), "denominator: expected more than 0"),
        (dict(advantages=torch.tensor([0.0, 0, torch.nan, 0, 0])), "advantages: not finite in row 2"),
        (dict(trajectory=torch.tensor([0, 0, 1, 2, 3])), "different advantages"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    trainer, sampler, advantages, mask, reference = random_batch()
    args = dict(
        trainer_logprobs=trainer, sampler_logprobs=sampler, advantages=advantages, mask=mask, reference_logprobs=reference
    )
    with pytest.raises(ValueError, match=message):
        grpo_loss(**args | PLAIN | change)
