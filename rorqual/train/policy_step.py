"""One optimiser step of GRPO: a mini-batch of samples through the model, the paper's objective, the indexer's own loss.

The policy's loss reaches everything but the indexers; the indexers learn on from the restricted KL, on the replayed selection
where it is replayed (the paper has them train in post-training as in the sparse stage; `index_weight` 0 freezes them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rorqual.errors import require
from rorqual.model.call import AttentionMode
from rorqual.model.transformer import Transformer
from rorqual.parallel.world import World
from rorqual.train.balance import imbalance, move_biases
from rorqual.train.grpo import KlEstimator, Reduction, grpo_loss
from rorqual.train.optimizer import Optimizer, clip_, squared_norm
from rorqual.train.samples import (
    BatchLimits,
    Item,
    ReplayConfig,
    SampleBatch,
    Scored,
    blank_item,
    micro_batches,
    sample_batch,
    score,
)


@dataclass(frozen=True)
class DomainObjective:
    """What the paper sets by domain. beta: weak or zero for mathematics; delta: None masks no sequence."""

    beta: float = 0.001
    off_policy_delta: float | None = 0.5


@dataclass(frozen=True)
class PolicyConfig:
    """The GRPO objective. The paper publishes none of these numbers; eps 0.2 is everybody's, delta 0.5 and beta 0.001 are
    what others suggest."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: KlEstimator = "unbiased"
    reduction: Reduction = "sequence"
    default: DomainObjective = field(default_factory=DomainObjective)
    by_domain: Mapping[str, DomainObjective] = field(default_factory=dict)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    index_weight: float = 1.0
    """Of the restricted indexer loss; 0 freezes the indexers."""
    mtp_weight: float = 0.0
    """Of the MTP module's loss on sampled tokens, so that it drafts for the policy there is; its gradient reaches the model."""
    bias_rate: float = 0.0
    """Step of the expert biases towards balance after each update; 0 leaves them, as routing is replayed."""
    attention: AttentionMode = field(default_factory=AttentionMode)
    """How the trainer attends. The default computes as the engine does; expanded is faster for short sequences, and equal up
    to rounding."""
    share_prompts: bool = True
    """Compute the prompt that attempts have in common once, where the selection is replayed. Log-probs are the same bits, and
    the indexers' loss counts such a row for each of its attempts, so that gradients do not depend on how batches are cut."""
    limits: BatchLimits = field(default_factory=BatchLimits)

    def __post_init__(self) -> None:
        require(
            self,
            clip_low=(0 <= self.clip_low <= 1, "in [0, 1]"),
            clip_high=(self.clip_high >= 0, "at least 0"),
            index_weight=(self.index_weight >= 0, "at least 0"),
            mtp_weight=(self.mtp_weight >= 0, "at least 0"),
            bias_rate=(self.bias_rate >= 0, "at least 0"),
        )

    def of(self, domain: str) -> DomainObjective:
        return self.by_domain.get(domain, self.default)

    @property
    def needs_reference(self) -> bool:
        return any(domain.beta for domain in (self.default, *self.by_domain.values()))


class PolicyObjective(nn.Module):
    """The model as it scores samples. Calling it is the only way that training runs the model: FSDP's hooks stand on it."""

    def __init__(self, model: Transformer, config: PolicyConfig):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batch: SampleBatch) -> Scored:
        wants_index = self.config.index_weight > 0 and self.model.config.has_indexer and torch.is_grad_enabled()
        return score(self.model, batch, "restricted" if wants_index else "none", self.config.attention, self.trains_mtp)

    @property
    def trains_mtp(self) -> bool:
        return self.config.mtp_weight > 0 and self.model.mtp is not None and torch.is_grad_enabled()


@dataclass(frozen=True)
class Prepared:
    """A micro-batch with its reference log-probs, computed once for all updates on the same rollouts."""

    batch: SampleBatch
    reference: Tensor | None


def prepare(items: Sequence[Item], config: PolicyConfig, reference: Transformer | None, world: World) -> list[Prepared]:
    """The micro-batches of a mini-batch on this rank."""
    prepared = []
    for part in micro_batches(items, config.limits, config.share_prompts):
        batch = sample_batch(part, world.device, config.replay, config.share_prompts)
        logprobs = None
        if reference is not None:
            with torch.no_grad():
                logprobs = score(reference, batch, mode=config.attention).logprobs
        prepared.append(Prepared(batch, logprobs))
    return prepared


def policy_step(
    objective: PolicyObjective, optimizer: Optimizer, parts: Sequence[Prepared], world: World, rate: float
) -> dict[str, float]:
    """Move the weights by one step; gradients are of the mean over the mini-batch of all ranks. Returns metrics by name.

    A rank's parts may be empty: it then computes along, so that all ranks call the model equally often.
    """
    config = objective.config
    counts = _counts(parts, world)
    divisor = {"sequence": counts["sequences"], "token": counts["tokens"], "constant": counts["places"]}[config.reduction]
    totals: dict[str, float] = dict.fromkeys(STATISTICS, 0.0)
    loads: dict[int, Tensor] = {}
    for part, is_real in _padded(parts, objective, world):
        scored = objective(part.batch)
        batch = part.batch if is_real else replace(part.batch, mask=torch.zeros_like(part.batch.mask))
        loss, statistics = _loss(batch, scored, part.reference, config, divisor)
        index_losses = list(scored.trace.index_losses.values())
        if index_losses:
            # The mean over all inputs, as in sparse training; every layer's indexer has parameters of its own.
            index = sum(_over_inputs(each, scored) for each in index_losses) / counts["rows"] * is_real
            loss = loss + config.index_weight * index
            totals["index_loss"] += float(index.detach()) / len(index_losses)
        if scored.mtp_loss is not None:
            mtp = scored.mtp_loss / counts["mtp_targets"] * is_real
            loss = loss + config.mtp_weight * mtp
            totals["mtp_loss"] += float(mtp.detach())
        loss.backward()
        for layer, load in scored.trace.loads.items():
            loads[layer] = loads.get(layer, torch.zeros_like(load)) + load * is_real
        if is_real:
            _add(totals, statistics, scored, batch)
    norms = _clip(optimizer, world)
    optimizer.step(rate)
    loads = {layer: world.sum(load) for layer, load in sorted(loads.items())}
    move_biases(objective.model, loads, config.bias_rate)
    return _metrics(totals, world) | norms | imbalance(loads) | {"train/learning_rate": rate}


def _over_inputs(losses: Tensor, scored: Scored) -> Tensor:
    """The sum over the samples' inputs of a loss that each row of the forward has; a shared row counts for all of its inputs."""
    return losses.sum() if scored.stands_for is None else (losses * scored.stands_for).sum()


def _loss(batch: SampleBatch, scored: Scored, reference: Tensor | None, config: PolicyConfig, divisor: Tensor):
    domains = [config.of(name) for name in batch.domains]
    device = batch.tokens.device
    deltas = None
    if any(domain.off_policy_delta is not None for domain in domains):
        values = [float("inf") if d.off_policy_delta is None else d.off_policy_delta for d in domains]
        deltas = torch.tensor(values, device=device)
    return grpo_loss(
        scored.logprobs, batch.sampler_logprobs, batch.advantages, batch.mask, reference,
        clip_low=config.clip_low, clip_high=config.clip_high, beta=torch.tensor([d.beta for d in domains], device=device),
        kl=config.kl, off_policy_delta=deltas, reduction=config.reduction, trajectory=batch.trajectories, denominator=divisor,
    )  # fmt: skip


def _counts(parts: Sequence[Prepared], world: World) -> dict[str, Tensor]:
    """What sums are divided by, over all ranks, at least 1."""
    own = {
        "sequences": sum(len(part.batch.trajectories.unique()) for part in parts),
        "tokens": sum(part.batch.num_tokens for part in parts),
        "mtp_targets": sum(part.batch.num_mtp_targets for part in parts),
        "places": sum(part.batch.mask.numel() for part in parts),
        "rows": sum(part.batch.num_rows for part in parts),
    }
    whole = world.sum(torch.tensor([float(v) for v in own.values()], device=world.device)).clamp(min=1)
    return dict(zip(own, whole.unbind(), strict=True))


def _padded(parts: Sequence[Prepared], objective: PolicyObjective, world: World) -> list[tuple[Prepared, bool]]:
    """Every rank must call the model equally often; one that has fewer micro-batches runs another one for nothing."""
    most = torch.tensor(len(parts), device=world.device)
    if world.size > 1:
        dist.all_reduce(most, dist.ReduceOp.MAX)
    if len(parts) == int(most):
        return [(part, True) for part in parts]
    idle = parts[-1] if parts else prepare([blank_item(objective.model.config)], objective.config, None, world)[0]
    return [(part, True) for part in parts] + [(idle, False)] * (int(most) - len(parts))


def _clip(optimizer: Optimizer, world: World) -> dict[str, float]:
    norms = {}
    for indexers in (False, True):
        gradients = optimizer.gradients(indexers)
        norm = world.sum(squared_norm(gradients).to(world.device)).sqrt()
        clip_(gradients, norm, optimizer.config.clip)
        norms["train/index_grad_norm" if indexers else "train/grad_norm"] = float(norm)
    return norms


SUMMED = ("policy_loss", "kl_loss", "index_loss", "mtp_loss", "tokens", "sequences", "empty_rows", "rows")
BY_ROW = ("masked_share",)
BY_TOKEN = (
    "kl", "clip_share", "clip_share_high", "clip_share_low", "masked_tokens", "ratio_mean", "mismatch_mean", "mismatch_abs",
    "mismatch_k3", "entropy",
)  # fmt: skip
STATISTICS = (*SUMMED, *BY_ROW, *BY_TOKEN, "ratio_max")
"""The same ones on every rank, whatever it had to learn from."""


def _add(totals: dict[str, float], statistics: Mapping[str, Tensor], scored: Scored, batch: SampleBatch) -> None:
    tokens, rows = float(statistics["tokens"]), float(len(batch.mask))
    for name, value in statistics.items():
        if name == "ratio_max":
            totals[name] = max(totals[name], float(value))
        else:
            totals[name] += float(value) * (1.0 if name in SUMMED else rows if name in BY_ROW else tokens)
    totals["rows"] += rows
    totals["entropy"] += float(scored.entropies.detach().where(batch.mask, torch.zeros(())).sum())


def _metrics(totals: Mapping[str, float], world: World) -> dict[str, float]:
    """Of all ranks: sums, means over samples, means over tokens."""
    largest = torch.tensor(totals["ratio_max"], device=world.device)
    if world.size > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    names = (*SUMMED, *BY_ROW, *BY_TOKEN)
    whole = world.sum(torch.tensor([totals[name] for name in names], dtype=torch.float64, device=world.device))
    found = dict(zip(names, whole.tolist(), strict=True)) | {"ratio_max": float(largest)}
    tokens, rows = max(found["tokens"], 1.0), max(found.pop("rows"), 1.0)
    return {f"train/{k}": v / (tokens if k in BY_TOKEN else rows if k in BY_ROW else 1.0) for k, v in found.items()}
