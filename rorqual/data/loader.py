"""Token batches. The global batch is a pure function of seed and step: a rank takes its slice, and a resume is a step number.

A row is one sequence of `length` tokens, packed with whole or cut documents. `documents` gives each token the number of its
document within the row (-1 is padding): attention never crosses a bound, and positions restart at it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rorqual.data.recall import RecallConfig, Vocabulary, draw_document
from rorqual.data.store import Documents
from rorqual.errors import UserError

WEIGHT_UNITS = 1 << 32


@dataclass(frozen=True)
class Row:
    """tokens int64 [T]; documents int64 [T]; trained bool [T]: which tokens the loss counts as targets."""

    tokens: np.ndarray
    documents: np.ndarray
    trained: np.ndarray


class Source(Protocol):
    """An endless list of rows: row n is a pure function of n."""

    def row(self, n: int) -> Row: ...


class TextSource:
    """Rows of text: documents in an order that changes with each epoch, joined, and cut into rows.

    Every token is in exactly one row of an epoch, but for the last incomplete row. A document longer than what is left of a
    row goes on in the next one as a document of its own (the model sees no more than a row at a time).
    """

    def __init__(self, documents: Documents, length: int, seed: int):
        self.documents, self.length, self.seed = documents, length, seed
        self.rows_per_epoch = int(documents.offsets[-1]) // length
        if not self.rows_per_epoch:
            raise UserError(f"a corpus of {int(documents.offsets[-1])} tokens fills no row of {length}; give more text")
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def row(self, n: int) -> Row:
        epoch, place = divmod(n, self.rows_per_epoch)
        order, starts = self._order(epoch)
        begin, end = place * self.length, (place + 1) * self.length
        first, last = np.searchsorted(starts, (begin, end - 1), side="right") - 1
        pieces = [self.documents[order[i]][max(begin - starts[i], 0) : end - starts[i]] for i in range(first, last + 1)]
        numbers = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
        return Row(np.concatenate(pieces).astype(np.int64), numbers, np.ones(self.length, dtype=bool))

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents' order in an epoch, and where each starts in the joined text."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = generator(self.seed, epoch).permutation(len(self.documents))
            lengths = np.diff(self.documents.offsets)[order]
            self._epoch = (epoch, order, np.cumsum(lengths) - lengths)
        return self._epoch[1], self._epoch[2]


class RecallSource:
    """Rows of whole recall documents of random lengths; what is left at a row's end is padding."""

    def __init__(self, vocabulary: Vocabulary, filler: Documents | None, length: int, seed: int, config: RecallConfig):
        if length < config.min_length:
            raise UserError(f"recall documents of at least {config.min_length} tokens do not fit rows of {length}")
        self.vocabulary, self.filler, self.length, self.seed, self.config = vocabulary, filler, length, seed, config

    def row(self, n: int) -> Row:
        rng = generator(self.seed, n)
        longest = min(self.config.max_length or self.length, self.length)
        tokens, documents, trained = (np.zeros(self.length, np.int64), np.full(self.length, -1), np.zeros(self.length, bool))
        used = number = 0
        while self.length - used >= self.config.min_length:
            length = int(rng.integers(self.config.min_length, min(longest, self.length - used) + 1))
            document = draw_document(self.vocabulary, rng, length, self.filler, self.config, n)
            end = used + len(document.tokens)
            if end > self.length:
                break  # names of several tokens can make the shortest document longer than what was asked for
            tokens[used:end], documents[used:end], trained[used:end] = document.tokens, number, document.answers
            used, number = end, number + 1
        return Row(tokens, documents, trained)


@dataclass(frozen=True)
class Batch:
    """tokens int64 [B, T]; documents int64 [B, T], -1 is padding; trained bool [B, T]."""

    tokens: Tensor
    documents: Tensor
    trained: Tensor

    def targets(self, ahead: int = 1) -> Tensor:
        """int64 [B, T]: the token `ahead` places later in the same document where it is trained on; elsewhere -1."""
        targets = torch.full_like(self.tokens, -1)
        same = (self.documents[:, ahead:] == self.documents[:, :-ahead]) & self.trained[:, ahead:]
        targets[:, :-ahead] = torch.where(same & (self.documents[:, ahead:] >= 0), self.tokens[:, ahead:], -1)
        return targets

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in (self.tokens, self.documents, self.trained)))

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of at most `size` rows."""
        parts = [tensor.split(size) for tensor in (self.tokens, self.documents, self.trained)]
        return [Batch(*part) for part in zip(*parts, strict=True)]


class Loader:
    """Batches of `batch` rows of a mixture: {name: (source, weight)}; a source's share of the rows is exact in the long run."""

    def __init__(self, sources: Mapping[str, tuple[Source, float]], batch: int):
        sources = {name: pair for name, pair in sources.items() if pair[1] > 0}
        if not sources:
            raise UserError("the mixture has no source of a weight above 0")
        self.names = list(sources)
        self.sources = [source for source, _ in sources.values()]
        self.weights = [weight for _, weight in sources.values()]
        self.batch_rows = batch

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The rank's slice of the global batch of a step: rows rank, rank + world_size, ..."""
        if self.batch_rows % world_size:
            raise UserError(f"a batch of {self.batch_rows} rows does not divide over {world_size} ranks")
        numbers = range(step * self.batch_rows + rank, (step + 1) * self.batch_rows, world_size)
        rows = [self.row(n) for n in numbers]
        parts = (np.stack([getattr(row, name) for row in rows]) for name in ("tokens", "documents", "trained"))
        return Batch(*(torch.from_numpy(part) for part in parts))

    def row(self, n: int) -> Row:
        """Row n of the whole run."""
        source, place = nth_of_mixture(self.weights, n)
        return self.sources[source].row(place)


def nth_of_mixture(weights: Sequence[float], n: int) -> tuple[int, int]:
    """Which source row n comes from, and how many rows before n came from it: evenly interleaved, with no state.

    Source 0 takes row n where floor((n + 1) w) passes floor(n w), w its share; the others share the rest in the same way.
    """
    total, source = sum(weights), 0
    while source < len(weights) - 1:
        units = round(weights[source] / total * WEIGHT_UNITS)
        before = n * units // WEIGHT_UNITS
        if (n + 1) * units // WEIGHT_UNITS > before:
            return source, before
        total, n, source = total - weights[source], n - before, source + 1
    return source, n


def positions_of(documents: Tensor) -> Tensor:
    """int64 [B, T]: positions that restart at each document bound."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def generator(seed: int, n: int) -> np.random.Generator:
    """Counter-based noise: a pure function of seed and n."""
    return np.random.Generator(np.random.Philox(key=[seed & (1 << 64) - 1, n]))
