"""Per-layer caches of latents, rope keys and index keys.

For whoever writes another cache (an engine's paged one): the model calls `begin` once per forward and then `update` once in
each layer, in order, with the rows of that forward; `update` stores them and returns the Keys that the rows may see, itself
included. `KeyCache` is that protocol. A paged cache on a CPU can return `Segments` (gathered or viewed, one per sequence);
on a GPU it returns its own Keys, whose `select` and `attend` run over block tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rorqual.errors import UserError
from rorqual.kernels import write_index_keys, write_latents
from rorqual.model.config import ModelConfig
from rorqual.model.indexer import Indexer
from rorqual.model.keys import Keys, Reach, Segment, Segments
from rorqual.model.linear import RMSNorm
from rorqual.model.rope import Rotation, rotate_interleaved
from rorqual.model.rows import Rows


@dataclass(frozen=True)
class Fresh:
    """What a layer keeps of the rows of one forward, as its projections left it. A cache takes `entries` and `index_keys`, or
    has them normalised, rotated and stored in one kernel each (`write`)."""

    latents: Tensor
    """[N, L + R]: wkv_a(x)."""
    norm: RMSNorm
    rotation: Rotation
    projected_keys: Tensor | None
    """[N, C]: the indexer's wk(x); None where the layer keeps no index keys."""
    indexer: Indexer | None

    def entries(self) -> Tensor:
        """[normalised latent | rotated rope key] of each row: [N, L + R]. The rope key is not normalised."""
        L = self.norm.weight.shape[0]
        latent, k_rope = self.latents.split([L, self.latents.shape[1] - L], -1)
        return torch.cat([self.norm(latent), rotate_interleaved(k_rope, self.rotation)], -1)

    def index_keys(self) -> Tensor | None:
        """[N, C]; with a gradient where the projection has one."""
        if self.indexer is None or self.projected_keys is None:
            return None
        with torch.set_grad_enabled(self.projected_keys.requires_grad):
            return self.indexer.finished_keys(self.projected_keys, self.rotation)

    def write(self, kv: Tensor, index_keys: Tensor | None, slots: Tensor) -> None:
        """Store all rows in slots int [N] of kv and index_keys, as `rorqual.kernels.write_latents` and `write_index_keys` do."""
        cos, sin = self.rotation.cos, self.rotation.sin
        write_latents(kv, slots, self.latents, self.norm.weight, self.norm.eps, cos, sin)
        if self.indexer is not None and self.projected_keys is not None and index_keys is not None:
            norm, config = self.indexer.k_norm, self.indexer.config
            write_index_keys(
                index_keys, slots, self.projected_keys, norm.weight, norm.bias, norm.eps, cos, sin,
                interleaved=config.index_rope_interleaved, hadamard=config.index_hadamard,
            )  # fmt: skip


class LayerCaches(Protocol):
    """Where the layers of one forward keep and find keys."""

    def update(self, layer: int, fresh: Fresh) -> Keys:
        """Store what `layer` (n_layers is the MTP layer) keeps of the rows; the keys that the rows see."""
        ...


class KeyCache(LayerCaches, Protocol):
    """What the model needs of a cache."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens held of each sequence: the position of its next token."""
        ...

    def begin(self, rows: Rows) -> None:
        """Make room for the rows of a forward; `lengths` counts them from here on."""
        ...


class OwnRows:
    """No cache: the rows of the forward are all the keys there are, each row seeing its document up to itself."""

    def __init__(self, rows: Rows):
        ends = torch.arange(1, len(rows.starts) + 1, device=rows.starts.device)
        self._reach = Reach(rows.starts, ends, 1, max(rows.lengths, default=0), rows.lengths)

    def update(self, layer: int, fresh: Fresh) -> Keys:
        kv = fresh.entries()
        return Segments([Segment(slice(0, len(kv)), self._reach, kv, fresh.index_keys())])


@dataclass(frozen=True)
class Span:
    """The rows of one sequence in one forward: tokens [old, new) of the sequence."""

    sequence: int
    rows: slice
    old: int
    new: int
    reach: Reach


class Cache:
    """A contiguous cache of B sequences that grow independently: `model(tokens, cache=cache)` continues each of them.

    Rows of a sequence are stored at its own length; padding rows (documents of -1) are not stored. Storage doubles when
    full. Memory per token and layer: L + R elements, plus C where the layer has its own indexer.
    """

    def __init__(self, config: ModelConfig, batch_size: int = 1, capacity: int = 256):
        self.config = config
        self.lengths = [0] * batch_size
        self._capacity = capacity
        self._kv: dict[int, Tensor] = {}
        self._index_keys: dict[int, Tensor] = {}
        self._spans: list[Span] = []

    def begin(self, rows: Rows) -> None:
        edges = itertools.pairwise([0, *itertools.accumulate(rows.counts)])
        places = [(sequence, slice(*edge)) for sequence, edge in enumerate(edges) if edge[0] < edge[1]]
        # A forward without rows has one empty span, so that its tensors have shapes.
        self._spans = [self._span(sequence, place, rows.tokens.device) for sequence, place in places or [(0, slice(0, 0))]]
        while self._capacity < max(self.lengths):
            self._capacity *= 2

    def _span(self, sequence: int, rows: slice, device: torch.device) -> Span:
        old = self.lengths[sequence]
        new = self.lengths[sequence] = old + rows.stop - rows.start
        ends = torch.arange(old + 1, new + 1, device=device)
        return Span(sequence, rows, old, new, Reach(torch.zeros_like(ends), ends, old + 1, new))

    def update(self, layer: int, fresh: Fresh) -> Keys:
        kv, index_keys = fresh.entries(), fresh.index_keys()
        return Segments([self._segment(layer, span, kv, index_keys) for span in self._spans])

    def _segment(self, layer: int, span: Span, kv: Tensor, index_keys: Tensor | None) -> Segment:
        held = self._store(self._kv, layer, span, kv)
        return Segment(
            span.rows, span.reach, held, None if index_keys is None else self._store(self._index_keys, layer, span, index_keys)
        )

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens of a sequence (a rejected draft, a retry)."""
        if not 0 <= length <= self.lengths[sequence]:
            raise UserError(f"cache: can't truncate a sequence of {self.lengths[sequence]} tokens to {length}")
        self.lengths[sequence] = length

    def _store(self, stores: dict[int, Tensor], layer: int, span: Span, rows: Tensor) -> Tensor:
        """Write the span's rows after the tokens held before; a view of all of them."""
        store = stores.get(layer)
        if store is None or store.shape[1] < self._capacity:
            grown = rows.new_empty(len(self.lengths), self._capacity, rows.shape[1])
            if store is not None:
                grown[:, : store.shape[1]] = store
            store = stores[layer] = grown
        store[span.sequence, span.old : span.new] = rows[span.rows].detach()
        return store[span.sequence, : span.new]
