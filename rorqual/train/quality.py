"""Did quality hold when attention became sparse? Held-out loss by position, what selections capture, needle retrieval."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rorqual.data.loader import Batch, generator
from rorqual.data.recall import Vocabulary, needle
from rorqual.data.store import Documents
from rorqual.kernels.logprobs import token_logprobs
from rorqual.model.call import AttentionMode
from rorqual.model.trace import Trace
from rorqual.model.transformer import Transformer

DENSE = AttentionMode(sparse=False, form="expanded")
SPARSE = AttentionMode(sparse=True)
BUCKETS = 8
"""Equal parts of the context, for losses by position."""
TOKENS = 1 << 15
"""Of one forward."""


@dataclass
class HeldOut:
    """Mean next-token loss, in nats per token. by_position: of tokens at positions [edge, next edge) of their document."""

    loss: float
    edges: list[int]
    by_position: list[float | None]


@dataclass(frozen=True)
class NeedleConfig:
    """Facts to be found in real text. Lengths in tokens; depth 0 is the document's start."""

    lengths: tuple[int, ...] = (256,)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)
    count: int = 50
    """Documents for each length and depth."""
    others: int = 3
    """Facts about other keys in the same document."""
    seed: int = 1


@dataclass
class Retrieval:
    """accuracy: over all documents; cells: (length, depth) -> accuracy."""

    accuracy: float
    cells: dict[tuple[int, float], float] = field(default_factory=dict)


@torch.no_grad()
def held_out(model: Transformer, batches: Iterable[Batch], mode: AttentionMode) -> HeldOut:
    """The loss on batches whose every document begins where the model would see it begin."""
    sums = counts = torch.zeros(0, dtype=torch.float64)
    for part in (part for batch in batches for part in batch.split(rows_at_once(batch.tokens.shape[1]))):
        part = part.to(model.embed.weight.device)
        if not len(sums):
            sums = counts = torch.zeros(part.tokens.shape[1], dtype=torch.float64)
        states = model.states(part.tokens, documents=part.documents, mode=mode)
        targets = states.rows.pack(part.targets())
        losses = token_logprobs(states.hidden, model.head.weight, targets)
        assert isinstance(losses, Tensor)
        kept = targets >= 0
        positions = states.rows.positions[kept].cpu()
        sums = sums.index_add(0, positions, -losses[kept].double().cpu())
        counts = counts.index_add(0, positions, torch.ones(len(positions), dtype=torch.float64))
    edges = [round(i * len(sums) / BUCKETS) for i in range(BUCKETS)]
    parts = [slice(a, b) for a, b in zip(edges, [*edges[1:], len(sums)], strict=True)]
    by_position = [float(sums[part].sum() / counts[part].sum()) if counts[part].sum() else None for part in parts]
    return HeldOut(float(sums.sum() / counts.sum()), edges, by_position)


@torch.no_grad()
def selection(model: Transformer, batches: Iterable[Batch], mode: AttentionMode = SPARSE) -> dict[int, dict[str, float]]:
    """By layer: the share of attention's mass that the selection captures, that the true top-k would, and recall of it.

    Means over the rows that can see more keys than are selected: for the others every selection is perfect.
    """
    sums: dict[int, dict[str, float]] = {}
    rows = 0
    for part in (part for batch in batches for part in batch.split(rows_at_once(batch.tokens.shape[1]))):
        batch, trace = part.to(model.embed.weight.device), Trace(index_quality=True)
        states = model.states(batch.tokens, documents=batch.documents, trace=trace, mode=mode)
        long = states.rows.positions >= model.config.index_topk
        rows += int(long.sum())
        for layer, quality in trace.qualities.items():
            for name, value in quality._asdict().items():
                layer_sums = sums.setdefault(layer, {})
                layer_sums[name] = layer_sums.get(name, 0.0) + float(value[long].double().sum())
    return {layer: {name: value / max(rows, 1) for name, value in found.items()} for layer, found in sums.items()}


@torch.no_grad()
def retrieval(
    model: Transformer, vocabulary: Vocabulary, filler: Documents, config: NeedleConfig, mode: AttentionMode
) -> Retrieval:
    """The share of questions whose answer is the likeliest continuation, token by token."""
    cells = {}
    for length in config.lengths:
        for depth in config.depths:
            rng = generator(config.seed, round(depth * 1000) * 1_000_000 + length)
            drawn = [needle(vocabulary, rng, length, depth, filler, config.others) for _ in range(config.count)]
            tokens = torch.stack([torch.from_numpy(document.tokens) for document in drawn])
            answers = torch.stack([torch.from_numpy(document.answers) for document in drawn])
            cells[length, depth] = float(_answered(model, tokens, answers, mode).double().mean())
    return Retrieval(sum(cells.values()) / len(cells), cells)


def _answered(model: Transformer, tokens: Tensor, answers: Tensor, mode: AttentionMode) -> Tensor:
    """bool [B]: whether every answer token of a document is predicted; tokens, answers [B, T]."""
    right = []
    rows = rows_at_once(tokens.shape[1])
    for part, marks in zip(tokens.split(rows), answers.split(rows), strict=True):
        states = model.states(part.to(model.embed.weight.device), mode=mode)
        asked = marks[:, 1:].nonzero()  # [answers, 2]: the row, and the token before the answer
        hidden = states.hidden.unflatten(0, part.shape)[asked[:, 0], asked[:, 1]]
        wrong = model.logits(hidden).argmax(-1).cpu() != part[asked[:, 0], asked[:, 1] + 1]
        right.append(torch.zeros(len(part)).index_add(0, asked[:, 0], wrong.float()) == 0)
    return torch.cat(right)


def rows_at_once(length: int) -> int:
    """Rows of one forward: at most TOKENS tokens, at least one row."""
    return max(1, TOKENS // length)


def with_random_indexers(model: Transformer, seed: int) -> Transformer:
    """The same weights but for the indexers, which are drawn anew: what an untrained indexer would select."""
    other = Transformer(model.config, seed)
    state = {name: tensor for name, tensor in model.state_dict().items() if ".indexer." not in name}
    other.load_state_dict(state, strict=False)
    return other.to(model.embed.weight.device, model.embed.weight.dtype).eval()
