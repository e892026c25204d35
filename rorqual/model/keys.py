"""What the rows of one forward may attend to in one layer, and the attention of rows over it.

`Keys` is the seam between the model and whoever holds the keys: this forward's own rows (training), a contiguous cache, or
an engine's paged cache. A row that may see at most topk keys attends to all of them, and no selection is made for it; that
is a property of the row alone, so the result does not depend on how rows are chunked or batched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from rorqual.errors import UserError
from rorqual.model.plain import dense_attention, select_tokens, sparse_attention


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
        """The selection with the rows of `positions` [N, K'] in its place, but where such a row is all -1."""
        ...

    @property
    def segments(self) -> list[Segment]:
        """The keys as contiguous pieces, for the expanded form; an engine that never asks for it may raise."""
        ...


@dataclass(frozen=True)
class Segment:
    """Consecutive rows, and the contiguous keys they share; row t sees keys [starts[t], ends[t])."""

    rows: slice
    kv: Tensor
    """[S, L + R]: normalised latents, then rotated rope keys."""
    index_keys: Tensor | None
    """[S, C]."""
    starts: Tensor
    """int64 [T]."""
    ends: Tensor
    """int64 [T]."""
    max_len: int
    """A bound, known on the host, on ends - starts."""

    def select(self, query: Tensor, weight: Tensor, topk: int) -> Tensor | None:
        """[T, topk] int32; short rows list all their keys."""
        if self.max_len <= topk or self.index_keys is None:
            return None
        long = self._long(topk)
        if long is None:
            return self._choose(query, weight, topk, self.starts, self.ends)
        selected = self.all_keys(topk)
        selected[long] = self._choose(query[long], weight[long], topk, self.starts[long], self.ends[long])
        return selected

    def _choose(self, query: Tensor, weight: Tensor, topk: int, starts: Tensor, ends: Tensor) -> Tensor:
        chosen = select_tokens(query, self.index_keys, weight, topk, starts, ends)
        missing = topk - chosen.shape[1]
        return F.pad(chosen, (0, missing), value=-1) if missing else chosen

    def attend(self, q: Tensor, scale: float, value_dim: int, selected: Tensor | None) -> Tensor:
        if selected is None:
            return self.attend_all(q, scale, value_dim, self.starts, self.ends)
        long = self._long(selected.shape[1])
        if long is None:
            return sparse_attention(q, self.kv, selected, scale, value_dim)[0]
        short = self._short(selected.shape[1])
        near = self.attend_all(q[short], scale, value_dim, self.starts[short], self.ends[short])
        far = sparse_attention(q[long], self.kv, selected[long], scale, value_dim)[0]
        order = torch.cat([short, long]).argsort()
        return torch.cat([near, far])[order]

    def attend_all(self, q: Tensor, scale: float, value_dim: int, starts: Tensor, ends: Tensor) -> Tensor:
        """Dense attention over [starts, ends): the latents are both keys and values, shared by all heads."""
        keys = self.kv[:, None]  # [S, 1, L + R]
        return dense_attention(q, keys, keys[..., :value_dim], scale, starts, ends)[0]

    def all_keys(self, topk: int) -> Tensor:
        """Every row's first topk keys, int32 [T, topk], -1 beyond its end."""
        keys = self.starts[:, None] + torch.arange(topk, device=self.starts.device)
        return torch.where(keys < self.ends[:, None], keys, -1).int()

    def _long(self, topk: int) -> Tensor | None:
        """The rows with more than topk keys; None for all rows. On a GPU all count as long: to split would wait for it."""
        lengths = self.ends - self.starts
        if lengths.is_cuda or bool((lengths > topk).all()):
            return None
        return (lengths > topk).nonzero()[:, 0]

    def _short(self, topk: int) -> Tensor:
        return (self.ends - self.starts <= topk).nonzero()[:, 0]


class Segments:
    """Keys as a list of segments, one after another: the plain form."""

    def __init__(self, segments: list[Segment]):
        self.segments = segments

    def select(self, query: Tensor, weight: Tensor, topk: int) -> Tensor | None:
        parts = [piece.select(query[piece.rows], weight[piece.rows], topk) for piece in self.segments]
        if all(part is None for part in parts):
            return None
        filled = [piece.all_keys(topk) if part is None else part for piece, part in zip(self.segments, parts, strict=True)]
        return torch.cat(filled)

    def attend(self, q: Tensor, scale: float, value_dim: int, selected: Tensor | None) -> Tensor:
        parts = [
            piece.attend(q[piece.rows], scale, value_dim, None if selected is None else selected[piece.rows])
            for piece in self.segments
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def to_positions(self, selected: Tensor | None, topk: int) -> Tensor:
        if selected is None:
            selected = torch.cat([piece.all_keys(topk) for piece in self.segments])
        return torch.where(selected >= 0, selected - self._starts[:, None], -1).int()

    def replay(self, selected: Tensor | None, positions: Tensor, topk: int) -> Tensor | None:
        if positions.shape[1] > topk:
            raise UserError(f"replayed selection: expected at most index_topk={topk} positions, found {positions.shape[1]}")
        if selected is None:
            return None
        given = torch.where(positions >= 0, positions + self._starts[:, None], -1).int()
        given = F.pad(given, (0, topk - given.shape[1]), value=-1)
        return torch.where((given >= 0).any(1, keepdim=True), given, selected)

    @cached_property
    def _starts(self) -> Tensor:
        return torch.cat([piece.starts for piece in self.segments])
