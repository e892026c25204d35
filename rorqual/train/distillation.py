"""On-policy distillation: the student samples, and moves towards what its teachers would have said there.

The objective is the reverse KL on the student's own samples, at each sampled token over the whole vocabulary:

    KL(student || teacher)_t = sum_v p_t(v) (log p_t(v) - log q_t(v))

Exact, it needs both models' hidden states and both heads (`reverse_kl`, below). From the sampled token alone it is the
unbiased estimator of rorqual/train/grpo.py with the teacher as the reference: same expectation, same expected gradient.
Unlike likelihood on a teacher's samples it is taken where the student goes, and it does not spread over modes that the student
can't reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rorqual.kernels.linear import accumulator, row_product
from rorqual.kernels.logprobs import row_chunks
from rorqual.model.call import AttentionMode
from rorqual.model.replay import Replay
from rorqual.model.trace import Trace
from rorqual.model.transformer import Transformer
from rorqual.parallel.apply import Opaque
from rorqual.parallel.world import World
from rorqual.train.optimizer import Optimizer, clip_, squared_norm
from rorqual.train.policy_step import Prepared
from rorqual.train.samples import BatchLimits, Item, ReplayConfig, SampleBatch, micro_batches, sample_batch, score


def reverse_kl(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, temperature: float | Tensor = 1.0
) -> Tensor:
    """KL(softmax(hidden head^T / temperature) || softmax(teacher_hidden teacher_head^T / temperature)) of each row, in nats.

    hidden [N, D], head [V, D]; teacher_hidden [N, E], teacher_head [V, E] (another width is fine, the vocabulary is not);
    temperature a number or [N], above 0 -> float32 [N] (float64 for float64 inputs). Differentiable with respect to hidden and
    head; the teacher gets no gradient. Logits are there for a tile of rows only, never [N, V]. Raises ValueError for shapes
    that do not fit.
    """
    if len(teacher_hidden) != len(hidden) or len(teacher_head) != len(head):
        raise ValueError(
            f"teacher: expected {len(hidden)} rows over {len(head)} tokens, found {len(teacher_hidden)} over {len(teacher_head)}"
        )
    scale = torch.as_tensor(temperature, dtype=accumulator(hidden, head), device=hidden.device).expand(len(hidden))
    return _ReverseKl.apply(hidden, head, teacher_hidden.detach(), teacher_head.detach(), scale)


class _ReverseKl(torch.autograd.Function):
    """With z = logits / temperature: d KL / dz(v) = p(v) (log p(v) - log q(v) - KL)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, temperature: Tensor
    ) -> Tensor:
        divergence = torch.empty_like(temperature).contiguous()
        for rows in row_chunks(len(hidden), len(head)):
            logs, gap = _logs(hidden, head, teacher_hidden, teacher_head, temperature, rows)
            divergence[rows] = (logs.exp() * gap).sum(1)
        ctx.save_for_backward(hidden, head, teacher_hidden, teacher_head, temperature, divergence)
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, teacher_hidden, teacher_head, temperature, divergence = ctx.saved_tensors
        dtype = temperature.dtype
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=dtype)
        for rows in row_chunks(len(hidden), len(head)):
            logs, gap = _logs(hidden, head, teacher_hidden, teacher_head, temperature, rows)  # [n, V]
            factor = (grad[rows] / temperature[rows])[:, None]
            grad_logits = logs.exp_().mul_(gap.sub_(divergence[rows, None])).mul_(factor)
            grad_hidden[rows] = (grad_logits @ head.to(dtype)).to(hidden.dtype)
            grad_head.addmm_(grad_logits.t(), hidden[rows].to(dtype))
        return grad_hidden, grad_head.to(head.dtype), None, None, None


def _logs(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, temperature: Tensor, rows: slice
) -> tuple[Tensor, Tensor]:
    """log p of a tile of rows, and log p - log q; both [n, V]."""
    scale = temperature[rows, None]
    logs = (row_product(hidden[rows], head).to(scale.dtype) / scale).log_softmax(1)
    theirs = (row_product(teacher_hidden[rows], teacher_head).to(scale.dtype) / scale).log_softmax(1)
    return logs, logs - theirs


class DistillationObjective(nn.Module):
    """The student on a batch of its own samples: reverse KL of the sampled tokens, and the trace with the indexers' loss.

    Calling it is the only way that training runs the model: FSDP's hooks stand on it.
    """

    def __init__(self, model: Transformer, index_weight: float):
        super().__init__()
        self.model, self.index_weight = model, index_weight

    def forward(self, part: Taught) -> tuple[Tensor, Trace]:
        wants_index = self.index_weight > 0 and self.model.config.has_indexer
        trace = Trace(index_loss="restricted" if wants_index else "none")
        batch = part.batch
        hidden, places = _sampled_states(self.model, batch, batch.replay, trace)
        temperature = batch.temperatures[:, None].expand_as(batch.mask).flatten()[places]
        return reverse_kl(hidden, self.model.head.weight, part.hidden, part.head, temperature), trace


@dataclass(frozen=True)
class Taught:
    """A micro-batch of one teacher's samples: its hidden states [n, E] where a token was sampled, and its head [V, E]."""

    batch: SampleBatch
    hidden: Tensor
    head: Tensor


def taught(items: Sequence[Item], teacher: Transformer, limits: BatchLimits, replay: ReplayConfig, world: World) -> list[Taught]:
    """The micro-batches of samples that all belong to one teacher. It routes and selects by itself: nothing is replayed to it."""
    parts = []
    for group in micro_batches(items, limits):
        batch = sample_batch(group, world.device, replay)
        with torch.no_grad():
            hidden, _ = _sampled_states(teacher, batch, None, Trace())
        parts.append(Taught(batch, hidden, teacher.head.weight))
    return parts


def scored_by(
    items: Sequence[Item], teacher: Transformer, limits: BatchLimits, replay: ReplayConfig, world: World
) -> list[Prepared]:
    """As `taught`, for the sampled estimator: the teacher's log-probs of the sampled tokens stand where GRPO's reference does.

    The student's routing and selection are not imposed on the teacher: under another model's experts it would say nonsense.
    """
    parts = []
    for group in micro_batches(items, limits):
        batch = sample_batch(group, world.device, replay)
        with torch.no_grad():
            parts.append(Prepared(batch, score(teacher, replace(batch, replay=Replay(None, None))).logprobs))
    return parts


def distillation_step(
    objective: DistillationObjective, optimizer: Optimizer, parts: Sequence[Taught], world: World, rate: float
) -> dict[str, float]:
    """One step down the mean reverse KL over all sampled tokens of all ranks. Metrics by name. Every rank has at least one part
    (a `blank_item`, where it has nothing to learn from)."""
    own = torch.tensor([float(part.batch.mask.sum()) for part in parts], device=world.device).sum()
    rows = torch.tensor([float((part.batch.documents >= 0).sum()) for part in parts], device=world.device).sum()
    tokens, inputs = (float(world.sum(count)) for count in (own, rows))
    total = torch.zeros((), device=world.device)
    for part, is_real in _padded(parts, world):
        divergence, trace = objective(part)
        loss = divergence.sum() / max(tokens, 1.0)
        if trace.index_losses:
            loss = loss + objective.index_weight * sum(each.sum() for each in trace.index_losses.values()) / max(inputs, 1.0)
        (loss * is_real).backward()
        total += divergence.detach().sum() * is_real
    norms = {}
    for indexers in (False, True):
        gradients = optimizer.gradients(indexers)
        norm = world.sum(squared_norm(gradients).to(world.device)).sqrt()
        clip_(gradients, norm, optimizer.config.clip)
        norms["train/index_grad_norm" if indexers else "train/grad_norm"] = float(norm)
    optimizer.step(rate)
    found = {"train/reverse_kl": float(world.sum(total)) / max(tokens, 1.0), "train/tokens": tokens, "train/learning_rate": rate}
    return found | norms


def _padded(parts: Sequence[Taught], world: World) -> list[tuple[Taught, bool]]:
    """Every rank must call the model equally often; a rank that has fewer parts runs its last one for nothing."""
    most = torch.tensor(len(parts), device=world.device)
    if world.size > 1:
        dist.all_reduce(most, dist.ReduceOp.MAX)
    return [(part, True) for part in parts] + [(parts[-1], False)] * (int(most) - len(parts))


def _sampled_states(model: Transformer, batch: SampleBatch, replay: Replay | None, trace: Trace) -> tuple[Tensor, Tensor]:
    """The hidden states [n, D] from which each sampled token was drawn, and their places in the flat [N * (T - 1)]."""
    seen = cast(Trace, Opaque(trace))
    states = model.states(batch.tokens[:, :-1], documents=batch.documents, replay=replay, trace=seen, mode=AttentionMode())
    rows = states.rows
    places = rows.places if rows.places is not None else torch.arange(batch.mask.numel(), device=batch.mask.device)
    sampled = batch.mask.flatten()[places]
    return states.hidden[sampled], places[sampled]
