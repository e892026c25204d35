"""What pre-training and DSA's two stages minimise, as one module over packed rows, so that wrappers can stand around it.

    L = CE(next token) + mtp_weight CE(token after next) + balance_weight L_bal        [V3; moves the model]
      + index_weight sum_layers KL(attention || softmax(index scores))                 [V3.2, 2.1.1; moves the indexers]

The model detaches what goes into its indexers, so the two lines share no parameter. Sums are over trained tokens and divided
by their count in the global batch, so that micro-batches and ranks add up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rorqual.data.loader import Batch
from rorqual.errors import require
from rorqual.kernels.logprobs import token_logprobs
from rorqual.model.cache import KeyCache
from rorqual.model.call import AttentionMode
from rorqual.model.config import ModelConfig
from rorqual.model.rows import Rows, pack_rows
from rorqual.model.trace import IndexLossKind, Trace
from rorqual.model.transformer import Transformer
from rorqual.parallel.apply import Opaque
from rorqual.parallel.context import GatheredKeys, local_rows
from rorqual.parallel.world import World


@dataclass(frozen=True)
class ObjectiveConfig:
    mtp_weight: float = 0.3
    """V3's value for most of its pre-training (0.1 at its end); V3.2's stages do not say. 0 leaves the MTP module out."""
    mtp_every: int = 1
    """The MTP loss in every so many steps only, at the same weight: it costs a layer and a head."""
    balance_weight: float = 1e-4
    """The sequence-wise balance loss's alpha."""
    index_weight: float = 1.0
    """The KL's weight. Adam does not see it, but a clip by the joint gradient norm would: indexers are clipped apart."""

    quality_every: int = 1
    """Measure the selection (mass captured, mass that the true top-k would capture, recall) in every so many steps of the
    stages that train indexers; it costs a dense pass. 0: never."""

    def __post_init__(self) -> None:
        require(
            self,
            quality_every=(self.quality_every >= 0, "at least 0"),
            mtp_weight=(self.mtp_weight >= 0, "at least 0"),
            mtp_every=(self.mtp_every >= 1, "at least 1"),
            balance_weight=(self.balance_weight >= 0, "at least 0"),
            index_weight=(self.index_weight >= 0, "at least 0"),
        )

    def at_step(self, step: int) -> ObjectiveConfig:
        """The objective of one step: without MTP where it is not its turn."""
        return self if step % self.mtp_every == 0 else replace(self, mtp_weight=0.0)


def _itself(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Inputs:
    """A micro-batch in packed form, or a rank's share of one (context parallelism)."""

    rows: Rows
    following: Tensor
    """int64 [N]: the next token of each row in its document, -1 after the last: what the MTP module is fed."""
    targets: Tensor
    """int64 [N]: the next token where it is trained on, else -1."""
    mtp_targets: Tensor
    """int64 [N]: the token after the next one, likewise."""
    sequences: Tensor
    """int64 [N]: which sequence a row belongs to."""
    lengths: Tensor
    """float32 [B]: rows of each sequence, in all parts of it."""
    cache: KeyCache | None = None
    """Where keys come from, if not from these rows alone."""
    parts: int = 1
    """Over how many ranks the sequences are cut (context parallelism)."""
    sum_parts: Callable[[Tensor], Tensor] = _itself
    """Adds up a tensor over those ranks, in place."""

    @classmethod
    def of(cls, batch: Batch) -> Inputs:
        rows = pack_rows(batch.tokens, None, batch.documents)
        places = torch.arange(batch.tokens.shape[0], device=batch.tokens.device)[:, None].expand_as(batch.tokens)
        next_one, one_after = rows.pack(batch.targets(1)), rows.pack(batch.targets(2))
        lengths = torch.tensor(rows.counts, dtype=torch.float32, device=batch.tokens.device)
        return cls(rows, rows.next_tokens(), next_one, one_after, rows.pack(places), lengths)

    def to(self, device: torch.device) -> Inputs:
        """On another device; not for a rank's share."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Inputs:
        """In page-locked memory, from where a copy to a GPU does not hold up the host; torch's DataLoader asks for it."""
        # A row alone has expanded tensors, whose places share memory: those can't be pinned.
        return self._moved(lambda tensor: tensor.contiguous().pin_memory())

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Inputs:
        names = ("following", "targets", "mtp_targets", "sequences", "lengths")
        places = None if self.rows.places is None else move(self.rows.places)
        moved = {name: move(getattr(self.rows, name)) for name in ("tokens", "positions", "starts")}
        rows = replace(self.rows, places=places, **moved)
        return replace(self, rows=rows, **{name: move(getattr(self, name)) for name in names})

    def share(self, world: World) -> Inputs:
        """What this rank computes of sequences that its context group shares."""
        if world.config.context == 1:
            return self
        keys = GatheredKeys(self.rows, world.context_rank, world.context_group)
        mine, group = keys.mine, world.context_group

        def sum_parts(x: Tensor) -> Tensor:
            dist.all_reduce(x, group=group)
            return x

        return Inputs(
            local_rows(self.rows, mine),
            self.following[mine],
            self.targets[mine],
            self.mtp_targets[mine],
            self.sequences[mine],
            self.lengths,
            keys,
            world.config.context,
            sum_parts,
        )


class Losses(NamedTuple):
    """What one forward gives: a tuple, so that FSDP finds the tensor that is differentiated."""

    total: Tensor
    sums: dict[str, Tensor]
    """Over the rows, by name; for the log."""
    trace: Trace


class Objective(nn.Module):
    """The model with its losses. Calling it is the only way that training runs the model: FSDP's hooks stand on the call."""

    def __init__(self, model: Transformer, config: ObjectiveConfig, mode: AttentionMode, index_loss: IndexLossKind = "none"):
        super().__init__()
        self.model, self.config, self.mode = model, config, mode
        self.index_loss: IndexLossKind = index_loss

    def forward(self, inputs: Inputs, counts: dict[str, Tensor], step: int = 0) -> Losses:
        """counts: of the global batch, by the names of `count_targets`."""
        config = self.config.at_step(step)
        balanced = config.balance_weight > 0 and self.index_loss != "dense"
        quality = self.index_loss != "none" and config.quality_every > 0 and step % config.quality_every == 0
        trace = Trace(router_scores=balanced, routed_experts=balanced, index_loss=self.index_loss, index_quality=quality)
        states = self.model.run(inputs.rows, inputs.cache, trace=cast(Trace, Opaque(trace)), mode=self.mode)
        sums: dict[str, Tensor] = {}
        total = inputs.targets.new_zeros((), dtype=torch.float32)
        if self.index_loss == "dense":
            if self.model.mtp is not None:
                self.model.mtp_hidden(states, inputs.following)  # for its indexer's loss alone
        else:
            sums["loss"] = self._cross_entropy(states.hidden, inputs.targets)
            total = total + sums["loss"] / counts["targets"]
            if self.model.mtp is not None and config.mtp_weight > 0:
                hidden = self.model.mtp_hidden(states, inputs.following)
                sums["mtp_loss"] = self._cross_entropy(hidden, inputs.mtp_targets)
                total = total + config.mtp_weight * sums["mtp_loss"] / counts["mtp_targets"]
            if balanced:
                sums["balance_loss"] = balance_loss(trace, inputs, self.model.config)
                total = total + config.balance_weight * sums["balance_loss"] / counts["sequences"]
        for layer, loss in trace.index_losses.items():
            sums[f"index_loss/{layer}"] = loss.sum()
            total = total + config.index_weight * loss.sum() / counts["rows"]
        for layer, found in trace.qualities.items():
            sums |= {f"{name}/{layer}": value.sum() for name, value in found._asdict().items()}
        return Losses(total, sums, trace)

    def _cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Sum of -log p(target) over rows with a target; hidden [N, D], targets [N]."""
        logprobs = token_logprobs(hidden, self.model.head.weight, targets)
        assert isinstance(logprobs, Tensor)
        return -logprobs.sum()


def count_targets(inputs: list[Inputs]) -> dict[str, Tensor]:
    """What sums are divided by, over micro-batches: float32 scalars by name."""
    first = inputs[0].targets
    totals = {name: first.new_zeros((), dtype=torch.float32) for name in ("targets", "mtp_targets", "rows", "sequences")}
    for part in inputs:
        totals["targets"] += (part.targets >= 0).sum()
        totals["mtp_targets"] += (part.mtp_targets >= 0).sum()
        totals["rows"] += len(part.targets)
        totals["sequences"] += (part.lengths > 0).sum() / part.parts
    return totals


def balance_loss(trace: Trace, inputs: Inputs, config: ModelConfig) -> Tensor:
    """The sequence-wise balance loss without its alpha, summed over sequences and layers [V3, eq. 17-20].

    L = sum_e f_e P_e;  f_e = E / (K T) #{t: e chosen};  P_e = 1/T sum_t s_{t,e} / sum_j s_{t,j}
    """
    total = inputs.lengths.new_zeros(())
    experts, chosen = config.n_routed_experts, config.n_activated_experts
    lengths = inputs.lengths.clamp(min=1)[:, None]
    for layer, scores in trace.scores.items():
        shares = scores / scores.sum(1, keepdim=True)
        mean = shares.new_zeros(len(lengths), experts).index_add(0, inputs.sequences, shares) / lengths  # [B, E]
        hits = torch.zeros_like(shares).scatter(1, trace.experts[layer], 1.0).detach()
        load = inputs.sum_parts(torch.zeros_like(mean).detach().index_add(0, inputs.sequences, hits))
        total = total + (load * experts / (chosen * lengths) * mean).sum()
    return total
