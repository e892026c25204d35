"""Packed rows: the tokens of a batch laid end to end without padding, the form in which the whole model computes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rorqual.errors import UserError

PADDING = -1


@dataclass(frozen=True)
class Rows:
    """N rows of B sequences; documents are runs of rows that attention does not cross."""

    tokens: Tensor
    """int64 [N]."""
    positions: Tensor
    """int64 [N]: what RoPE turns by."""
    starts: Tensor
    """int64 [N]: the row where each row's document begins; a row attends to rows [start, itself]."""
    shape: tuple[int, int]
    """(B, T) of the padded form."""
    places: Tensor | None = None
    """int64 [N]: where each row stands in the flat padded form; None where nothing is padded."""
    counts: tuple[int, ...] = ()
    """Rows of each sequence, known on the host."""
    lengths: tuple[int, ...] = ()
    """Rows of each document, in order, known on the host."""

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [N, ...]."""
        flat = x.flatten(0, 1)
        return flat if self.places is None else flat[self.places]

    def unpack(self, x: Tensor, fill: float = 0) -> Tensor:
        """[N, ...] -> [B, T, ...], padding filled."""
        if self.places is None:
            return x.unflatten(0, self.shape)
        padded = x.new_full((self.shape[0] * self.shape[1], *x.shape[1:]), fill)
        return padded.index_copy(0, self.places, x).unflatten(0, self.shape)

    def next_tokens(self) -> Tensor:
        """The token after each row in its document, int64 [N]; -1 after the last one."""
        following = torch.full_like(self.tokens, PADDING)
        within = self.starts[1:] == self.starts[:-1]
        following[:-1] = torch.where(within, self.tokens[1:], PADDING)
        return following


def pack_rows(
    tokens: Tensor, positions: Tensor | None = None, documents: Tensor | None = None, cached_lens: Sequence[int] = ()
) -> Rows:
    """tokens, positions, documents [B, T] -> Rows. By default positions restart in each document.

    cached_lens: tokens that a cache holds of each sequence already; positions go on from there.
    """
    _check_shapes(tokens, positions, documents)
    B, T = tokens.shape
    if documents is None:
        counts = lengths = (T,) * B if T else ()
        places = None
    else:
        places, counts, lengths = _without_padding(documents)
        places = None if len(places) == B * T else places
    starts = _starts(lengths, tokens.device)
    packed = Rows(tokens, torch.arange(len(starts), device=tokens.device) - starts, starts, (B, T), places, counts, lengths)
    own = packed.positions if positions is None else packed.pack(positions.expand(B, T))
    if cached_lens:
        _check_cached(packed, cached_lens, documents is not None)
        own = own + _by_row(cached_lens, counts, own) if positions is None else own
    return replace(packed, tokens=packed.pack(tokens), positions=own)


def _by_row(values: Sequence[int], counts: tuple[int, ...], like: Tensor) -> Tensor:
    each = torch.tensor(values, device=like.device)
    return each.repeat_interleave(torch.tensor(counts, device=like.device), output_size=sum(counts))


def _check_cached(rows: Rows, cached_lens: Sequence[int], documented: bool) -> None:
    if len(rows.counts) != len(cached_lens):
        raise UserError(f"cache: holds {len(cached_lens)} sequences, found a batch of {len(rows.counts)}")
    if documented and len(rows.lengths) != sum(count > 0 for count in rows.counts):
        raise UserError("documents: a cache takes one document per sequence, found more")


def _without_padding(documents: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """Places of the rows that are no padding, their count by sequence, and their count by document."""
    kept = documents != PADDING
    places = kept.flatten().nonzero()[:, 0]
    sequence = places // documents.shape[1]
    ids = documents.flatten()[places]
    begins = torch.ones_like(places, dtype=torch.bool)
    begins[1:] = (ids[1:] != ids[:-1]) | (sequence[1:] != sequence[:-1])
    edges = [*begins.nonzero()[:, 0].tolist(), len(places)]
    return places, tuple(kept.sum(1).tolist()), tuple(b - a for a, b in itertools.pairwise(edges))


def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The first row of each row's document."""
    each = torch.tensor(lengths, dtype=torch.long, device=device)
    return (each.cumsum(0) - each).repeat_interleave(each, output_size=sum(lengths))


def _check_shapes(tokens: Tensor, positions: Tensor | None, documents: Tensor | None) -> None:
    if tokens.dim() != 2:
        raise UserError(f"tokens: expected [B, T], found {list(tokens.shape)}")
    if documents is not None and documents.shape != tokens.shape:
        raise UserError(f"documents: expected {list(tokens.shape)} as tokens, found {list(documents.shape)}")
    if positions is not None and positions.shape not in (tokens.shape, tokens.shape[1:]):
        raise UserError(f"positions: expected {list(tokens.shape)} or [{tokens.shape[1]}], found {list(positions.shape)}")
