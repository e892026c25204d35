"""From trajectories' samples to padded batches, and their log-probs under a model with everything replayed.

The trainer computes what the sampler computed: the same ids, the same experts (gates from the current scores), the same
selected keys, the same kept set and temperature. Each replay has a switch, for the laboratory that shows what it is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.errors import require
from rorqual.kernels.logprobs import kept_rows, token_logprobs
from rorqual.model.call import AttentionMode
from rorqual.model.config import ModelConfig
from rorqual.model.replay import Replay
from rorqual.model.trace import IndexLossKind, Trace
from rorqual.model.transformer import States, Transformer
from rorqual.parallel.apply import Opaque
from rorqual.policy import KeptTokens
from rorqual.rollout.trajectory import Sample
from rorqual.train.shared_prompts import ID_BYTES, SharedRows, prompt_of, shared_rows


@dataclass(frozen=True)
class ReplayConfig:
    """What of the sampler's decisions the trainer takes over."""

    routing: bool = True
    """Keep Routing: the experts of each token."""
    selection: bool = True
    """The keys each query selected; the engine must have recorded them."""
    kept_tokens: bool = True
    """Keep Sampling Mask: renormalise over the kept set."""
    temperature: bool = True
    """Score at the temperature sampled with; False scores at 1."""


@dataclass(frozen=True)
class Item:
    """A sample with its advantage; `trajectory` joins the samples of one, `domain` has beta and delta of its own."""

    sample: Sample
    advantage: float
    trajectory: int
    domain: str = ""


def blank_item(shape: ModelConfig) -> Item:
    """Two tokens of which none was sampled: what a rank computes along that has nothing to learn from."""
    experts = np.full((2, shape.n_layers - shape.n_dense_layers, shape.n_activated_experts), -1, np.int16)
    selected = tuple(np.full((2, shape.index_topk), -1, np.int32) for kind in shape.layer_indexers if kind == "full")
    kept = KeptTokens(np.empty(0, np.int32), np.zeros(3, np.int64))
    unsampled = (np.zeros(2, bool), np.zeros(2, np.float32), np.full(2, -1, np.int32))
    return Item(Sample(np.zeros(2, np.int64), *unsampled, kept, 1.0, experts, selected), 0.0, 0)


@dataclass(frozen=True)
class SampleBatch:
    """N samples padded to T tokens. Predictions are of tokens[:, 1:], so log-probs and masks are [N, T - 1]."""

    tokens: Tensor  # int64 [N, T]
    documents: Tensor  # int64 [N, T - 1] of the inputs: 0, -1 where padded
    mask: Tensor  # bool [N, T - 1]
    sampler_logprobs: Tensor  # float32 [N, T - 1]
    advantages: Tensor  # float32 [N]
    trajectories: Tensor  # int64 [N]
    temperatures: Tensor  # float32 [N]
    kept: tuple[Tensor, Tensor]  # ids and offsets over the flat [N * (T - 1)] predictions
    replay: Replay
    domains: tuple[str, ...]
    shared: SharedRows | None = None
    """The same samples with the prompts that they share once, where they are to be computed so and share any."""

    @property
    def num_rows(self) -> int:
        """Inputs of all samples: rows of a forward over the batch where no prompt is shared."""
        return int((self.documents >= 0).sum())

    @property
    def num_tokens(self) -> int:
        return int(self.mask.sum())

    @property
    def num_mtp_targets(self) -> int:
        """Sampled tokens that have two tokens before them."""
        return int(self.mask[:, 1:].sum())


@dataclass(frozen=True)
class BatchLimits:
    max_tokens: int = 16384
    """Padded tokens of one micro-batch, or rows where prompts are shared; a longer sample is a micro-batch of its own."""

    def __post_init__(self) -> None:
        require(self, max_tokens=(self.max_tokens >= 1, "at least 1"))


def micro_batches(items: Sequence[Item], limits: BatchLimits, share_prompts: bool = False) -> list[list[Item]]:
    """Items by length into micro-batches whose size stays within the limit. Samples of one trajectory stay together: their
    1 / length and the masking's mean run over all of them. share_prompts: so do those of one prompt, as far as they fit."""
    chains: dict[int, list[Item]] = {}
    for item in items:
        chains.setdefault(item.trajectory, []).append(item)
    prompts = {number: prompt_of(chain[0].sample) if share_prompts else b"" for number, chain in chains.items()}
    longest: dict[bytes, int] = {}
    for number, chain in chains.items():
        longest[prompts[number]] = max(longest.get(prompts[number], 0), _longest(chain))
    order = sorted(chains, key=lambda number: (-longest[prompts[number]], prompts[number], -_longest(chains[number]), number))
    batches: list[list[Item]] = []
    rows, seen = 0, b""
    for number in order:
        chain, prompt = chains[number], prompts[number]
        own = sum(len(item.sample) for item in chain)
        if share_prompts:
            size = rows + own - (len(prompt) // ID_BYTES if prompt == seen else 0)
        else:
            size = max(map(_longest, (*batches[-1:], chain))) * (len(batches[-1]) + len(chain)) if batches else 0
        if batches and size <= limits.max_tokens:
            batches[-1].extend(chain)
        else:
            batches.append(list(chain))
            size = own
        rows, seen = size, prompt
    return batches


def _longest(items: Sequence[Item]) -> int:
    return max(len(item.sample) for item in items)


def sample_batch(
    items: Sequence[Item], device: torch.device, replay: ReplayConfig | None = None, share_prompts: bool = False
) -> SampleBatch:
    """Pad a micro-batch. Raises ValueError where a replay is asked for and a sample did not record it."""
    replay = replay or ReplayConfig()
    samples = [item.sample for item in items]
    width = max(len(sample) for sample in samples)
    tokens = _padded([s.tokens for s in samples], width, 0)
    lengths = torch.tensor([len(s) for s in samples])
    places = torch.arange(width - 1)
    documents = torch.where(places < lengths[:, None] - 1, 0, -1)
    kept = _kept(samples, width, replay.kept_tokens)
    return SampleBatch(
        tokens.to(device),
        documents.to(device),
        _padded([s.mask for s in samples], width, False)[:, 1:].to(device),
        _padded([s.logprobs for s in samples], width, 0.0)[:, 1:].to(device),
        torch.tensor([item.advantage for item in items], dtype=torch.float32, device=device),
        torch.tensor([item.trajectory for item in items], device=device),
        torch.tensor([s.temperature if replay.temperature else 1.0 for s in samples], dtype=torch.float32, device=device),
        (kept[0].to(device), kept[1].to(device)),
        _replay(samples, width, replay, device),
        tuple(item.domain for item in items),
        shared_rows(samples, width - 1, replay.routing, device) if share_prompts and replay.selection else None,
    )


@dataclass(frozen=True)
class Scored:
    """Log-probs [N, T - 1] of the sampled tokens (0 elsewhere), their distributions' entropies, and what the forward told."""

    logprobs: Tensor
    entropies: Tensor
    trace: Trace
    mtp_loss: Tensor | None = None
    """The MTP module's summed cross-entropy on sampled tokens, where asked for."""
    stands_for: Tensor | None = None
    """float32 [rows of the forward]: how many samples' inputs each row stands for; None: one each."""


def score(
    model: Transformer,
    batch: SampleBatch,
    index_loss: IndexLossKind = "none",
    mode: AttentionMode | None = None,
    mtp: bool = False,
) -> Scored:
    """What the model thinks of a batch's sampled tokens, with the batch's replay; differentiable in the model's weights."""
    trace, mode = Trace(index_loss=index_loss), mode or AttentionMode()
    shared = batch.shared if batch.shared and not mtp and batch.shared.serves(model.config, mode) else None
    if shared is not None:
        states = model.run(shared.rows, replay=shared.replay, trace=cast(Trace, Opaque(trace)), mode=mode)
        places = shared.sources.flatten()
    else:
        states = model.states(
            batch.tokens[:, :-1], documents=batch.documents, replay=batch.replay, trace=cast(Trace, Opaque(trace)), mode=mode
        )
        places = _row_of_input(states, batch)
    wanted = batch.mask.flatten().nonzero()[:, 0]
    logprobs, entropies = token_logprobs(
        states.hidden[places[wanted]], model.head.weight, batch.tokens[:, 1:].flatten()[wanted],
        batch.temperatures[:, None].expand_as(batch.mask).flatten()[wanted], kept_rows(*batch.kept, wanted), return_entropy=True,
    )  # fmt: skip

    def padded(values: Tensor) -> Tensor:
        return values.new_zeros(batch.mask.shape).masked_scatter(batch.mask, values)

    mtp_loss = _mtp_loss(model, states, batch) if mtp else None
    stands_for = None if shared is None else shared.stands_for(batch.documents >= 0)
    return Scored(padded(logprobs), padded(entropies), trace, mtp_loss, stands_for)


def _row_of_input(states: States, batch: SampleBatch) -> Tensor:
    """int64 [N * (T - 1)]: the packed row of each padded input; 0 where there is none."""
    rows, flat = states.rows, batch.mask.numel()
    own = torch.arange(len(rows.tokens), device=batch.tokens.device)
    return own if rows.places is None else own.new_zeros(flat).index_copy(0, rows.places, own)


def _mtp_loss(model: Transformer, states: States, batch: SampleBatch) -> Tensor:
    """Of the sampled tokens two places on. The engine records no decisions of the MTP layer, so it makes its own."""
    rows = states.rows
    free = replace(states, call=replace(states.call, replay=None))
    hidden = model.mtp_hidden(free, rows.pack(batch.tokens[:, 1:]))
    second = F.pad(torch.where(batch.mask[:, 1:], batch.tokens[:, 2:], -1), (0, 1), value=-1)
    logprobs = token_logprobs(hidden, model.head.weight, rows.pack(second))
    assert isinstance(logprobs, Tensor)
    return -logprobs.sum()


def _padded(arrays: Sequence[np.ndarray], width: int, fill: float | bool) -> Tensor:
    padded = np.full((len(arrays), width, *arrays[0].shape[1:]), fill, dtype=arrays[0].dtype)
    for row, array in enumerate(arrays):
        padded[row, : len(array)] = array
    return torch.from_numpy(padded)


def _kept(samples: Sequence[Sample], width: int, wanted: bool) -> tuple[Tensor, Tensor]:
    """The kept sets of all predictions, flat; those of padding and of unsampled tokens are empty (they keep everything)."""
    rows: list[np.ndarray] = []
    for sample in samples:
        own = [sample.kept.row(t) if wanted and sample.mask[t] else sample.kept.tokens[:0] for t in range(1, len(sample))]
        rows += own + [sample.kept.tokens[:0]] * (width - 1 - len(own))
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    tokens = np.concatenate([np.empty(0, np.int64), *rows]).astype(np.int64)
    return torch.from_numpy(tokens), torch.from_numpy(offsets)


def _replay(samples: Sequence[Sample], width: int, wanted: ReplayConfig, device: torch.device) -> Replay:
    """Of the inputs: all tokens but the last of each row."""
    experts = selected = None
    if wanted.routing and samples[0].routed_experts is not None:
        experts = _padded([_recorded(s.routed_experts, "routed experts") for s in samples], width, -1)[:, :-1].long().to(device)
    elif wanted.routing:
        raise ValueError("replay.routing: the samples hold no routed experts; sample with record_routed_experts")
    if wanted.selection and samples[0].selected_indices is not None:
        layers = zip(*[_recorded(s.selected_indices, "selected indices") for s in samples], strict=True)
        selected = [_padded(list(layer), width, -1)[:, :-1].to(device) for layer in layers]
    elif wanted.selection:
        raise ValueError("replay.selection: the samples hold no selections; sample with record_selected_indices")
    return Replay(experts, selected)


def _recorded(value, what: str):
    if value is None:
        raise ValueError(f"replay: one of the samples holds no {what}, the others do")
    return value
