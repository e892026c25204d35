"""What the rows of one forward may attend to in one layer, and the attention of rows over it.

`Keys` is the seam between the model and whoever holds the keys: this forward's own rows (training), a contiguous cache, or
an engine's paged cache. A row that may see at most topk keys attends to all of them, and no selection is made for it; that
is a property of the row alone, so the result does not depend on how rows are chunked or batched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from rorqual.errors import UserError
from rorqual.kernels.dense_attention import causal_attention, dense_attention
from rorqual.kernels.selection import select_tokens
from rorqual.kernels.sparse_attention import sparse_attention

LONG_DOCUMENT = 1024
"""Length from which every document of a forward is worth a launch of its own on a GPU. The library's kernel was seen to refuse
held-out text packed of documents of all lengths ("No available kernel")."""


class Keys(Protocol):
    """The keys of one layer for the N rows of a forward.

    `selected` is int32 [N, K], opaque to the model: whatever `select` gives, `attend` takes. `to_positions` and
    `replay` translate it to and from positions in each row's own sequence (ascending, -1 last), which records hold.
    """

    def select(self, query: Tensor, weight: Tensor, topk: int) -> Tensor | None:
        """Index queries [N, I, C], index weights float32 [N, I] -> selected; None where every row sees all its keys."""
        ...

    def attend(self, q: Tensor, scale: float, value_dim: int, selected: Tensor | None) -> Tensor:
        """Absorbed queries [N, H, L + R] -> latent outputs [N, H, L]; selected None: dense."""
        ...

    def to_positions(self, selected: Tensor | None, topk: int) -> Tensor: ...

    def replay(self, selected: Tensor | None, positions: Tensor, topk: int) -> Tensor | None:
        """The selection with the rows of `positions` [N, K'] in its place, but where such a row is all -1.

        selected None: no row of `positions` is, or none needs a selection."""
        ...

    @property
    def segments(self) -> list[Segment]:
        """The keys as contiguous pieces, for the expanded form; an engine that never asks for it may raise."""
        ...

    @property
    def reaches(self) -> list[Reach]:
        """Which keys the rows of each segment see; asked for without the keys themselves, to choose the form."""
        ...


@dataclass(frozen=True)
class Reach:
    """Which keys each of T consecutive rows may see: [starts[t], ends[t]), int64 [T]. All layers of a forward share it."""

    starts: Tensor
    ends: Tensor
    min_len: int
    """Bounds, known on the host, on ends - starts."""
    max_len: int
    documents: tuple[int, ...] = ()
    """Where rows and keys are the same tokens: the length of each document. Empty: keys held before, starting at key 0."""
    _splits: dict[int, Split | None] = field(default_factory=dict)

    @property
    def whole_documents(self) -> tuple[int, ...]:
        """The lengths of the documents, where the rows are all of their tokens and so all the keys; else none."""
        is_one = self.min_len == 1 and self.max_len == len(self.ends)
        return self.documents or ((self.max_len,) if is_one else ())

    def split(self, topk: int) -> Split | None:
        """The rows with at most topk keys and the others; None where all are others, as on a GPU, which would have to wait."""
        if topk not in self._splits:
            whole = self.min_len > topk or self.ends.is_cuda
            self._splits[topk] = None if whole else Split.of(self.ends - self.starts, topk)
        return self._splits[topk]

    def listed(self, topk: int) -> Tensor:
        """Every row's first topk keys, int32 [T, topk], -1 beyond its end."""
        keys = self.starts[:, None] + torch.arange(topk, device=self.starts.device)
        return torch.where(keys < self.ends[:, None], keys, -1).int()


@dataclass(frozen=True)
class Split:
    """int64 indices of the rows with at most topk keys and of the others, and what puts their concatenation back in order."""

    topk: int
    short: Tensor
    long: Tensor
    order: Tensor

    @classmethod
    def of(cls, lengths: Tensor, topk: int) -> Self:
        short, long = (lengths <= topk).nonzero()[:, 0], (lengths > topk).nonzero()[:, 0]
        return cls(topk, short, long, torch.cat([short, long]).argsort())


@dataclass(frozen=True)
class Segment:
    """Consecutive rows, and the contiguous keys that they share."""

    rows: slice
    reach: Reach
    kv: Tensor
    """[S, L + R]: normalised latents, then rotated rope keys."""
    index_keys: Tensor | None
    """[S, C]."""

    def select(self, query: Tensor, weight: Tensor, topk: int) -> Tensor | None:
        """int32 [T, topk], short rows listing all their keys; None where all rows are short."""
        if self.reach.max_len <= topk or self.index_keys is None:
            return None
        selected = select_tokens(query, self.index_keys, weight, topk, self.reach.starts, self.reach.ends)
        assert isinstance(selected, Tensor)
        return selected

    def attend(self, q: Tensor, scale: float, value_dim: int, selected: Tensor | None) -> Tensor:
        if selected is None:
            return self._attend_all(q, scale, value_dim)
        split = self.reach.split(selected.shape[1])
        if split is None:
            return sparse_attention(q, self.kv, selected, scale, value_dim)[0]
        near = self._attend_all(q[split.short], scale, value_dim, split)
        far = sparse_attention(q[split.long], self.kv, selected[split.long], scale, value_dim)[0]
        return torch.cat([near, far])[split.order]

    def _attend_all(self, q: Tensor, scale: float, value_dim: int, split: Split | None = None) -> Tensor:
        """Dense attention of all rows or of a split's short ones; the latents are keys and values, shared by all heads."""
        keys = self.kv[:, None]  # [S, 1, L + R]
        return attend_densely(q, keys, keys[..., :value_dim], scale, self.reach, split)


def attend_densely(q: Tensor, k: Tensor, v: Tensor, scale: float, reach: Reach, split: Split | None = None) -> Tensor:
    """q [T, H, D] of all rows or of a split's short ones, k [S, G, D], v [S, G, L] -> [T, H, L].

    On a CPU each document is computed apart, its keys beginning at key 0: that makes a row the same bits however documents
    are packed. So it is on a GPU in the expanded form where few long documents are read without a gradient: whole documents
    have a kernel of their own. In training all rows go in one launch, however many documents they hold.
    """
    whole = reach.whole_documents if split is None and len(q) == len(k) else ()
    is_apart = bool(whole) and min(whole) >= LONG_DOCUMENT and not torch.is_grad_enabled()
    if q.is_cuda and k.shape[1] == q.shape[1] and is_apart:
        parts = zip(q.split(whole), k.split(whole), v.split(whole), strict=True)
        return torch.cat([causal_attention(*part, scale) for part in parts])
    if len(reach.documents) < 2 or q.is_cuda:
        rows = slice(None) if split is None else split.short
        return dense_attention(q, k, v, scale, reach.starts[rows], reach.ends[rows])[0]
    counts = [n if split is None else min(n, split.topk) for n in reach.documents]
    documents = zip(q.split(counts), k.split(reach.documents), v.split(reach.documents), counts, strict=True)
    return torch.cat([dense_attention(q, k[:n], v[:n], scale)[0] for q, k, v, n in documents])


class Segments:
    """Keys as a list of segments, one after another: the plain form."""

    def __init__(self, segments: list[Segment]):
        self.segments = segments

    @property
    def reaches(self) -> list[Reach]:
        return [piece.reach for piece in self.segments]

    def select(self, query: Tensor, weight: Tensor, topk: int) -> Tensor | None:
        parts = [piece.select(query[piece.rows], weight[piece.rows], topk) for piece in self.segments]
        if all(part is None for part in parts):
            return None
        filled = [piece.reach.listed(topk) if part is None else part for piece, part in zip(self.segments, parts, strict=True)]
        return torch.cat(filled)

    def attend(self, q: Tensor, scale: float, value_dim: int, selected: Tensor | None) -> Tensor:
        parts = [
            piece.attend(q[piece.rows], scale, value_dim, None if selected is None else selected[piece.rows])
            for piece in self.segments
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def to_positions(self, selected: Tensor | None, topk: int) -> Tensor:
        if selected is None:
            selected = torch.cat([piece.reach.listed(topk) for piece in self.segments])
        return torch.where(selected >= 0, selected - self._starts[:, None], -1).int()

    def replay(self, selected: Tensor | None, positions: Tensor, topk: int) -> Tensor | None:
        if positions.shape[1] > topk:
            raise UserError(f"replayed selection: expected at most index_topk={topk} positions, found {positions.shape[1]}")
        if all(piece.reach.max_len <= topk for piece in self.segments):
            return None
        given = torch.where(positions >= 0, positions + self._starts[:, None], -1).int()
        given = F.pad(given, (0, topk - given.shape[1]), value=-1)
        return given if selected is None else torch.where((given >= 0).any(1, keepdim=True), given, selected)

    @cached_property
    def _starts(self) -> Tensor:
        return torch.cat([piece.reach.starts for piece in self.segments])
