"""The GRPO objective of DeepSeek-V3.2 on plain tensors (paper section 3.1): the one place where its formulas stand.

With r = pi_theta / pi_old, where pi_old are the probabilities that the sampler returned (so that r covers staleness and the
mismatch between the two programs alike), and A_i = R_i - mean(R) with no division by the standard deviation:

    J = E[ 1/G sum_i 1/|o_i| sum_t { min(r A, clip(r, 1 - low, 1 + high) A) * M  -  beta * KL } ]

- Unbiased KL: KL = r * (x - log x - 1) with x = pi_ref / pi_theta, the gradient flowing through r too. Its expectation under
  pi_old has the gradient of KL(pi_theta || pi_ref); without the factor r (K3) the gradient is biased.
- Off-policy sequence masking: M = 0 for the whole sequence iff A_i < 0 and mean_t log(pi_old / pi_theta) > delta. It takes
  the policy term away, never the KL term, and is not differentiated.

Keep Routing, Keep Sampling Mask and the replay of selected indices happen before: they are how trainer_logprobs are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

KlEstimator = Literal["unbiased", "k1", "k2", "k3"]
Reduction = Literal["sequence", "token", "constant"]


def grpo_loss(
    trainer_logprobs: Tensor,
    sampler_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    reference_logprobs: Tensor | None = None,
    *,
    clip_low: float,
    clip_high: float,
    beta: float | Tensor,
    kl: KlEstimator = "unbiased",
    off_policy_delta: float | Tensor | None = None,
    reduction: Reduction = "sequence",
    trajectory: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to minimise (minus the paper's J) of N samples, and statistics by name.

    trainer_logprobs, sampler_logprobs, reference_logprobs: [N, T] natural logs of each sampled token's probability under the
        policy in training (with its graph), the sampler, and the reference. Masked positions may hold anything, NaN included.
    advantages: [N]. mask: [N, T], non-zero where the policy sampled the token.
    clip_low, clip_high: the epsilons of [1 - low, 1 + high]. beta, off_policy_delta: a float, or [N] for one by domain;
        a delta of None masks no sequence.
    kl: the estimator; k1 = -log x, k2 = (log x)^2 / 2, k3 = x - log x - 1, for comparison.
    reduction: `sequence` is the paper's (a mean over each sequence's tokens, then over sequences); `token` divides the sum
        over all tokens by their number; `constant` divides it by N * T.
    trajectory: [N] integer ids; samples of one id are one sequence (its context was rewritten on the way): 1/length and the
        masking's mean run over all of them. They must share one advantage.
    denominator: replaces the last divisor (sequences, tokens, or the constant), so that micro-batches and ranks add up to
        the whole batch's loss: pass the whole batch's count to each.

    Computed in float32, or float64 where the trainer's log-probs are. A row with an empty mask contributes 0, and counts as
    a sequence. Raises ValueError for shapes that do not fit, an unknown choice, samples of one trajectory with different
    advantages, or an unmasked log-prob that is NaN or (the sampler's) infinite.
    """
    batch = _batch(trainer_logprobs, sampler_logprobs, advantages, mask, reference_logprobs, trajectory)
    betas = _per_row(beta, "beta", batch)  # [N]
    delta = None if off_policy_delta is None else _per_row(off_policy_delta, "off_policy_delta", batch)
    log_ratio = batch.trainer - batch.sampler  # [N, T], 0 where masked
    ratio = log_ratio.exp()
    policy, clipped = clipped_objective(ratio, batch.advantages[:, None], clip_low, clip_high)
    keep = sequence_mask(log_ratio, batch, delta)  # [N]
    divergence = kl_estimate(ratio, batch.trainer, batch.reference, kl)
    weights = token_weights(batch, reduction, denominator)  # [N, T], 0 where masked
    policy_loss = -(policy * keep[:, None] * weights).sum()
    kl_loss = (betas[:, None] * divergence * weights).sum()
    with torch.no_grad():
        statistics = _statistics(batch, log_ratio, ratio, clipped, keep, divergence)
        statistics |= {"policy_loss": policy_loss.detach(), "kl_loss": kl_loss.detach()}
    return policy_loss + kl_loss, statistics


def clipped_objective(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """min(r A, clip(r, 1 - low, 1 + high) A) and where the clip took hold (its gradient is 0 there)."""
    free = ratio * advantages
    bound = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return torch.minimum(free, bound), bound < free


def kl_estimate(ratio: Tensor, trainer: Tensor, reference: Tensor | None, kl: KlEstimator) -> Tensor:
    """The per-token estimate of KL(pi_theta || pi_ref), [N, T]; zeros without a reference."""
    if reference is None:
        return torch.zeros_like(ratio)
    log_x = reference - trainer
    match kl:
        case "unbiased":
            return ratio * (log_x.exp() - log_x - 1)
        case "k1":
            return -log_x
        case "k2":
            return log_x.square() / 2
        case "k3":
            return log_x.exp() - log_x - 1
    raise ValueError(f"kl: expected one of unbiased, k1, k2, k3, found {kl!r}")


def sequence_mask(log_ratio: Tensor, batch: Batch, delta: Tensor | None) -> Tensor:
    """M of off-policy sequence masking, [N]: 0 where A < 0 and the sequence's mean log(pi_old / pi_theta) exceeds delta."""
    if delta is None:
        return torch.ones_like(batch.advantages)
    drift = batch.by_trajectory((-log_ratio.detach()).sum(-1)) / batch.lengths.clamp(min=1)
    return 1.0 - ((batch.advantages < 0) & (drift > delta)).to(log_ratio.dtype)


def token_weights(batch: Batch, reduction: Reduction, denominator: float | Tensor | None) -> Tensor:
    """What each token's term is multiplied by, [N, T]: the reduction, with 0 for masked tokens."""
    if reduction == "sequence":
        rows, whole = 1.0 / batch.lengths.clamp(min=1), batch.sequences
    elif reduction == "token":
        rows, whole = torch.ones_like(batch.lengths), int(batch.mask.sum())
    elif reduction == "constant":
        rows, whole = torch.ones_like(batch.lengths), batch.mask.numel()
    else:
        raise ValueError(f"reduction: expected one of sequence, token, constant, found {reduction!r}")
    whole = whole if denominator is None else denominator
    if not whole > 0:
        # A batch without a single token has nothing to weigh; a denominator of 0 is the caller's mistake.
        if denominator is not None:
            raise ValueError(f"denominator: expected more than 0, found {denominator}")
        whole = 1
    return batch.mask * rows[:, None] / whole


@dataclass(frozen=True)
class Batch:
    """The samples of one call: masked positions are 0 in every log-prob, so that nothing they held can reach a sum."""

    trainer: Tensor  # [N, T]
    sampler: Tensor  # [N, T]
    reference: Tensor | None  # [N, T]
    advantages: Tensor  # [N]
    mask: Tensor  # [N, T], 0 or 1
    groups: Tensor  # [N], dense ids of trajectories
    sequences: int  # how many trajectories
    lengths: Tensor  # [N], tokens of each row's whole trajectory

    def by_trajectory(self, rows: Tensor) -> Tensor:
        """[N] sums over rows -> [N], the sum over each row's whole trajectory."""
        return _sum_by_group(rows, self.groups, self.sequences)


def _sum_by_group(rows: Tensor, groups: Tensor, count: int) -> Tensor:
    return rows.new_zeros(count).index_add(0, groups, rows)[groups]


def _batch(
    trainer: Tensor, sampler: Tensor, advantages: Tensor, mask: Tensor, reference: Tensor | None, trajectory: Tensor | None
) -> Batch:
    _check_shapes(trainer, sampler, advantages, mask, reference, trajectory)
    dtype = torch.float64 if trainer.dtype == torch.float64 else torch.float32
    used = mask != 0
    _check_values(used, trainer, sampler, reference, advantages)
    zeroed = [x if x is None else torch.where(used, x.to(dtype), 0.0) for x in (trainer, sampler, reference)]
    if trajectory is None:
        groups = torch.arange(len(mask), device=mask.device)
        sequences = len(mask)
    else:
        ids, groups = torch.unique(trajectory, return_inverse=True)
        sequences = len(ids)
    advantages = advantages.detach().to(dtype)
    _check_shared_advantage(advantages, groups, sequences)
    ones = used.to(dtype)
    lengths = _sum_by_group(ones.sum(-1), groups, sequences)
    sampler_zeroed = zeroed[1].detach()  # type: ignore[union-attr]
    reference_zeroed = None if zeroed[2] is None else zeroed[2].detach()
    return Batch(zeroed[0], sampler_zeroed, reference_zeroed, advantages, ones, groups, sequences, lengths)  # type: ignore[arg-type]


def _check_shapes(trainer, sampler, advantages, mask, reference, trajectory) -> None:
    if trainer.dim() != 2:
        raise ValueError(f"trainer_logprobs: expected [N, T], found {list(trainer.shape)}")
    wanted = {"sampler_logprobs": sampler, "mask": mask, "reference_logprobs": reference}
    for name, value in wanted.items():
        if value is not None and value.shape != trainer.shape:
            raise ValueError(f"{name}: expected the shape of trainer_logprobs {list(trainer.shape)}, found {list(value.shape)}")
    for name, value in {"advantages": advantages, "trajectory": trajectory}.items():
        if value is not None and value.shape != trainer.shape[:1]:
            raise ValueError(f"{name}: expected [{len(trainer)}], found {list(value.shape)}")


def _check_values(used: Tensor, trainer: Tensor, sampler: Tensor, reference: Tensor | None, advantages: Tensor) -> None:
    broken = {
        "trainer_logprobs": (used & trainer.isnan()).any(-1),
        "sampler_logprobs": (used & ~sampler.isfinite()).any(-1),
        "advantages": ~advantages.isfinite(),
    }
    if reference is not None:
        broken["reference_logprobs"] = (used & reference.isnan()).any(-1)
    for name, rows in broken.items():
        if rows.any():
            raise ValueError(f"{name}: not finite in row {int(rows.nonzero()[0])}; leave such a sample out and count it")


def _check_shared_advantage(advantages: Tensor, groups: Tensor, sequences: int) -> None:
    if sequences == len(groups):
        return
    low = advantages.new_full((sequences,), torch.inf).scatter_reduce(0, groups, advantages, "amin")
    high = advantages.new_full((sequences,), -torch.inf).scatter_reduce(0, groups, advantages, "amax")
    if (low != high).any():
        raise ValueError("advantages: samples of one trajectory have different advantages; they share one reward")


def _per_row(value: float | Tensor, name: str, batch: Batch) -> Tensor:
    rows = torch.as_tensor(value, dtype=batch.advantages.dtype, device=batch.advantages.device)
    if rows.dim() > 1 or (rows.dim() == 1 and len(rows) != len(batch.advantages)):
        raise ValueError(f"{name}: expected a float or [{len(batch.advantages)}], found {list(rows.shape)}")
    return rows.expand(len(batch.advantages))


def _statistics(
    batch: Batch, log_ratio: Tensor, ratio: Tensor, clipped: Tensor, keep: Tensor, divergence: Tensor
) -> dict[str, Tensor]:
    """Means over sampled tokens, and counts. Mismatch compares trainer and sampler; it is 0 when what was sampled is trained."""
    tokens = batch.mask.sum()
    used = batch.mask > 0

    def mean(values: Tensor) -> Tensor:
        return torch.where(used, values, 0.0).sum() / tokens.clamp(min=1)

    up = batch.advantages[:, None] > 0
    return {
        "tokens": tokens,
        "sequences": tokens.new_tensor(batch.sequences),
        "empty_rows": (batch.mask.sum(-1) == 0).sum().to(tokens.dtype),
        "kl": mean(divergence),
        "clip_share": mean(clipped.to(ratio.dtype)),
        "clip_share_high": mean((clipped & up).to(ratio.dtype)),
        "clip_share_low": mean((clipped & ~up).to(ratio.dtype)),
        "masked_share": (1 - keep).mean() if len(keep) else tokens.new_zeros(()),
        "masked_tokens": mean((1 - keep)[:, None].expand_as(ratio)),
        "ratio_mean": mean(ratio),
        "ratio_max": torch.where(used, ratio, 0.0).amax() if ratio.numel() else tokens.new_zeros(()),
        "mismatch_mean": mean(-log_ratio),
        "mismatch_abs": mean(log_ratio.abs()),
        "mismatch_k3": mean(ratio - log_ratio - 1),
    }
