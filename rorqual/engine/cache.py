"""The paged cache: latents, rope keys and index keys of all requests in shared blocks, as the model's KeyCache.

A token's slot is block * block_size + offset. In each layer a slot holds L + R elements, and C more where the layer has its
own indexer. Rows of many requests go through the model together: selection runs over each request's own index keys, and
attention gathers the selected slots of all of them from the shared store in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rorqual.errors import UserError
from rorqual.kernels import sparse_attention
from rorqual.model.config import ModelConfig
from rorqual.model.keys import Keys, Reach, Segment, Segments, Split
from rorqual.model.rows import Rows


@dataclass(frozen=True)
class Span:
    """Rows of one request in this step: tokens [start, start + count), whose slots lie in `blocks` in order."""

    blocks: Sequence[int]
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


class PagedCache:
    """Storage for num_blocks * block_size tokens. `plan` says which rows the next forward holds; then the model updates."""

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device):
        self.block_size, self.device = block_size, device
        self.num_slots = num_blocks * block_size
        entry = config.kv_lora_rank + config.qk_rope_head_dim
        kinds = [*config.layer_indexers, *[config.mtp_indexer] * config.n_mtp_layers]
        self._kv = [torch.empty(self.num_slots, entry, dtype=dtype, device=device) for _ in kinds]
        self._index_keys = [
            torch.empty(self.num_slots, config.index_head_dim, dtype=dtype, device=device) if kind == "full" else None
            for kind in kinds
        ]
        self._layout = _Layout([], [], torch.empty(0, dtype=torch.int64))

    @property
    def num_bytes(self) -> int:
        """What the storage takes in memory."""
        return sum(store.nbytes for store in [*self._kv, *self._index_keys] if store is not None)

    def plan(self, spans: Sequence[Span]) -> Tensor:
        """Lay out the next forward; returns the slot of each of its rows, int64 [N]."""
        tables = [self.slots(span.blocks, span.end) for span in spans]
        written = torch.cat([table[span.start :] for span, table in zip(spans, tables, strict=True)])
        self._layout = _Layout(list(spans), tables, written)
        return written

    def slots(self, blocks: Sequence[int], length: int) -> Tensor:
        """The slots of a request's first `length` tokens, int64 [length]."""
        first = torch.tensor(blocks[: -(-length // self.block_size)], device=self.device) * self.block_size
        return (first[:, None] + torch.arange(self.block_size, device=self.device)).flatten()[:length]

    @property
    def lengths(self) -> list[int]:
        """Tokens held of each request of the planned forward, before it."""
        return [span.start for span in self._layout.spans]

    def begin(self, rows: Rows) -> None:
        found, planned = rows.counts, tuple(span.count for span in self._layout.spans)
        if found != planned:
            raise AssertionError(f"the forward has rows {found} of its requests, planned were {planned}")

    def update(self, layer: int, kv: Tensor, index_keys: Tensor | None) -> Keys:
        """Store the rows' entries of one layer; the keys they may see."""
        self._kv[layer][self._layout.written] = kv.to(self._kv[layer].dtype)
        store = self._index_keys[layer]
        if store is not None and index_keys is not None:
            store[self._layout.written] = index_keys.to(store.dtype)
        return PagedKeys(self._layout, self._kv[layer], store)


class _Layout:
    """Where the rows of one forward and the keys they see lie; the same for all layers."""

    def __init__(self, spans: list[Span], tables: list[Tensor], written: Tensor):
        self.spans, self.tables, self.written = spans, tables, written
        self.rows: list[slice] = []
        at = 0
        for span in spans:
            self.rows.append(slice(at, at + span.count))
            at += span.count
        self.reaches = [_reach(span.start, span.end, written.device) for span in spans]
        self.runs = [_run(span.blocks, table) for span, table in zip(spans, tables, strict=True)]
        self._heads: dict[int, _Heads | None] = {}

    @property
    def max_len(self) -> int:
        return max(span.end for span in self.spans)

    @cached_property
    def table(self) -> Tensor:
        """All requests' slot tables, one after another, int64 [sum of lengths]."""
        return torch.cat(self.tables)

    @cached_property
    def offsets(self) -> Tensor:
        """Where in `table` the request of each row begins, int64 [N]."""
        begins = [0]
        for table in self.tables[:-1]:
            begins.append(begins[-1] + len(table))
        counts = torch.tensor([span.count for span in self.spans], device=self.written.device)
        return torch.tensor(begins, device=self.written.device).repeat_interleave(counts)

    def gather(self, store: Tensor, request: int) -> Tensor:
        """A request's entries in order: a view where its blocks lie one after another, else a copy."""
        run = self.runs[request]
        return store[run] if run is not None else store[self.tables[request]]

    def heads(self, topk: int) -> _Heads | None:
        """The rows that see at most topk keys; None where there are none, or on a GPU, where every row takes its slots."""
        if topk not in self._heads:
            self._heads[topk] = None if self.written.is_cuda else _Heads.of(self, topk)
        return self._heads[topk]


@dataclass(frozen=True)
class _Heads:
    """Rows that see at most topk keys and so attend densely; `split` parts all rows into these and the others."""

    split: Split
    requests: list[int]
    rows: list[slice]
    """Of each such request, among the short rows alone."""
    reaches: list[Reach]

    @classmethod
    def of(cls, layout: _Layout, topk: int) -> _Heads | None:
        if all(reach.min_len > topk for reach in layout.reaches):
            return None
        requests, rows, reaches, at = [], [], [], 0
        for index, span in enumerate(layout.spans):
            count = min(max(topk - span.start, 0), span.count)
            if count:
                requests.append(index)
                rows.append(slice(at, at + count))
                reaches.append(_reach(span.start, span.start + count, layout.written.device))
                at += count
        split = Split.of(torch.cat([reach.ends for reach in layout.reaches]), topk)
        return cls(split, requests, rows, reaches)


def _reach(start: int, end: int, device: torch.device) -> Reach:
    """Rows [start, end) of a request see all keys up to themselves."""
    ends = torch.arange(start + 1, end + 1, device=device)
    return Reach(torch.zeros_like(ends), ends, start + 1, end)


def _run(blocks: Sequence[int], table: Tensor) -> slice | None:
    """The slots of a table as one slice, if its blocks lie one after another."""
    if not len(table) or any(block != blocks[0] + i for i, block in enumerate(blocks)):
        return None
    begin = int(table[0])
    return slice(begin, begin + len(table))


class PagedKeys:
    """The model's Keys over the shared store of one layer. A selection is in positions of each row's own request."""

    def __init__(self, layout: _Layout, kv: Tensor, index_keys: Tensor | None):
        self._layout, self._kv, self._index_keys = layout, kv, index_keys

    @property
    def segments(self) -> list[Segment]:
        """Each request's keys in one piece."""
        layout = self._layout
        return [
            Segment(rows, reach, layout.gather(self._kv, i), None)
            for i, (rows, reach) in enumerate(zip(layout.rows, layout.reaches, strict=True))
        ]

    def select(self, query: Tensor, weight: Tensor, topk: int) -> Tensor | None:
        if self._layout.max_len <= topk or self._index_keys is None:
            return None
        return Segments([self._index_segment(i, topk) for i in range(len(self._layout.spans))]).select(query, weight, topk)

    def attend(self, q: Tensor, scale: float, value_dim: int, selected: Tensor | None) -> Tensor:
        if selected is None:
            return Segments(self.segments).attend(q, scale, value_dim, None)
        heads = self._layout.heads(selected.shape[1])
        if heads is None:
            return self._attend_slots(q, scale, value_dim, selected, self._layout.offsets)
        long, short = heads.split.long, heads.split.short
        near = Segments(self._head_segments(heads)).attend(q[short], scale, value_dim, None)
        far = self._attend_slots(q[long], scale, value_dim, selected[long], self._layout.offsets[long])
        return torch.cat([near, far])[heads.split.order]

    def to_positions(self, selected: Tensor | None, topk: int) -> Tensor:
        return torch.cat([reach.listed(topk) for reach in self._layout.reaches]) if selected is None else selected

    def replay(self, selected: Tensor | None, positions: Tensor, topk: int) -> Tensor | None:
        raise UserError("the engine samples; it replays no selection (the model's own forward does)")

    def _attend_slots(self, q: Tensor, scale: float, value_dim: int, selected: Tensor, offsets: Tensor) -> Tensor:
        """Sparse attention of rows of any requests over the shared store, through their slot tables."""
        slots = self._layout.table[offsets[:, None] + selected.clamp(min=0)]
        return sparse_attention(q, self._kv, torch.where(selected >= 0, slots, -1).int(), scale, value_dim)[0]

    def _head_segments(self, heads: _Heads) -> list[Segment]:
        """The short rows of each request, and the keys they see."""
        return [
            Segment(rows, reach, self._layout.gather(self._kv, request)[: reach.max_len], None)
            for request, rows, reach in zip(heads.requests, heads.rows, heads.reaches, strict=True)
        ]

    def _index_segment(self, request: int, topk: int) -> Segment:
        """For selection alone: kv stays where it is, only index keys are brought together (and not for short contexts)."""
        assert self._index_keys is not None
        layout = self._layout
        is_short = layout.spans[request].end <= topk
        keys = self._index_keys[:0] if is_short else layout.gather(self._index_keys, request)
        return Segment(layout.rows[request], layout.reaches[request], self._kv[:0], keys)
