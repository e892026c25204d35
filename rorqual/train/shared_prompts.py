"""Prompts that the attempts of a group share, computed once for all of them.

    apart     prompt a   prompt b   prompt c            shared    prompt a b c

Where the selection of keys is replayed a row attends to the keys it is given and to no others. So the rows of several attempts
may stand behind one copy of their prompt, as branches of a tree in one document: positions and selections stay each attempt's
own, and so does every log-prob, bit for bit. A group of G attempts costs one prompt in place of G.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rorqual.model.call import AttentionMode
from rorqual.model.config import ModelConfig
from rorqual.model.replay import Replay
from rorqual.model.rows import Rows
from rorqual.rollout.trajectory import Sample


@dataclass(frozen=True)
class SharedRows:
    """The rows of N samples, shared prompts once."""

    rows: Rows
    replay: Replay
    sources: Tensor
    """int64 [N, T - 1]: the row of each padded input; 0 where there is none."""
    shortest: int
    """Tokens of the shortest prompt that is shared."""

    def serves(self, config: ModelConfig, mode: AttentionMode) -> bool:
        """Whether every layer attends to replayed keys alone. A row that sees at most index_topk keys takes them all instead, so
        that such rows must not be branches."""
        return mode.sparse and "none" not in config.layer_indexers and self.shortest >= config.index_topk

    def stands_for(self, is_input: Tensor) -> Tensor:
        """float32 [rows]: of how many of the samples' inputs (bool [N, T - 1]) each row is the row."""
        return torch.bincount(self.sources[is_input], minlength=len(self.rows.tokens)).float()


ID_BYTES = 8
"""Of a token id in a sample."""


def prompt_of(sample: Sample) -> bytes:
    """What samples must have in common to share a prompt: the ids before the first sampled one."""
    first = int(sample.mask.argmax()) if sample.mask.any() else len(sample)
    return sample.tokens[:first].tobytes()


def shared_rows(samples: Sequence[Sample], width: int, routing: bool, device: torch.device) -> SharedRows | None:
    """The rows of samples padded to `width` inputs; None where no prompt can be shared. routing: whether experts are replayed."""
    if any(sample.selected_indices is None for sample in samples):
        return None
    families: dict[bytes, list[int]] = {}
    for number, sample in enumerate(samples):
        families.setdefault(prompt_of(sample), []).append(number)
    trunks = [(members, _shared_len([samples[n] for n in members], routing)) for members in families.values()]
    if not any(length for _, length in trunks):
        return None
    made, sources = _Rows(), np.zeros((len(samples), width), np.int64)
    for members, length in trunks:
        for branch in [members] if length else [[n] for n in members]:
            made.add([samples[n] for n in branch], length, routing, [sources[n] for n in branch])
    return made.packed(sources, min(length for _, length in trunks if length), device)


def _shared_len(family: Sequence[Sample], routing: bool) -> int:
    """How many first inputs the samples of a family share with all that was recorded of them; 0: they stay apart."""
    first = family[0]
    if len(family) < 2 or not all(_is_recorded(sample) for sample in family):
        return 0
    length = min(len(sample) for sample in family) - 1
    for other in family[1:]:
        pairs = [(first.tokens, other.tokens), *zip(first.selected_indices or (), other.selected_indices or (), strict=True)]
        if routing and first.routed_experts is not None and other.routed_experts is not None:
            pairs.append((first.routed_experts, other.routed_experts))
        for one, two in pairs:
            differ = (one[:length] != two[:length]).reshape(length, -1).any(1)
            length = int(differ.argmax()) if differ.any() else length
    topk = (first.selected_indices or (np.empty((0, 0)),))[0].shape[1]
    return length if length >= topk else 0


def _is_recorded(sample: Sample) -> bool:
    """Whether the selection of every input was recorded: a branch must not choose among its neighbours' keys."""
    return all(bool((layer[: len(sample) - 1] >= 0).any(1).all()) for layer in sample.selected_indices or ())


class _Rows:
    """Documents under construction: a trunk, and branches that follow it."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.experts: list[np.ndarray] = []
        self.selected: list[list[np.ndarray]] = []

    def add(self, branches: Sequence[Sample], length: int, routing: bool, sources: Sequence[np.ndarray]) -> None:
        """One document. length: of the trunk; sources: for each branch the rows of its inputs, to be filled."""
        begin, end = sum(self.lengths), length
        self._take(branches[0], slice(0, length), 0, length, routing)
        for sample, own in zip(branches, sources, strict=True):
            count = len(sample) - 1
            self._take(sample, slice(length, count), end - length, length, routing)
            own[:length] = np.arange(begin, begin + length)
            own[length:count] = np.arange(begin + end, begin + end + count - length)
            end += count - length
        self.lengths.append(end)

    def _take(self, sample: Sample, inputs: slice, shift: int, length: int, routing: bool) -> None:
        """Some inputs of a sample; keys behind the trunk stand `shift` rows later in the document than in the sample."""
        self.tokens.append(sample.tokens[inputs])
        self.positions.append(np.arange(inputs.start, inputs.stop))
        if routing and sample.routed_experts is not None:
            self.experts.append(sample.routed_experts[inputs])
        own = [layer[inputs] for layer in sample.selected_indices or ()]
        self.selected.append([np.where(layer >= length, layer + shift, layer) for layer in own])

    def packed(self, sources: np.ndarray, shortest: int, device: torch.device) -> SharedRows:
        lengths = np.array(self.lengths)
        starts = (lengths.cumsum() - lengths).repeat(lengths)
        tokens, positions = (torch.from_numpy(np.concatenate(each)).to(device) for each in (self.tokens, self.positions))
        whole = len(starts)
        rows = Rows(tokens, positions, torch.from_numpy(starts).to(device), (1, whole), None, (whole,), tuple(self.lengths))
        experts = torch.from_numpy(np.concatenate(self.experts))[None].long().to(device) if self.experts else None
        layers = [torch.from_numpy(np.concatenate(layer))[None].to(device) for layer in zip(*self.selected, strict=True)]
        return SharedRows(rows, Replay(experts, layers), torch.from_numpy(sources).to(device), shortest)
