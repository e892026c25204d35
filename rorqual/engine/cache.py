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
from torch.nn import functional as F

from rorqual.kernels import sparse_attention
from rorqual.model.config import ModelConfig
from rorqual.model.keys import Keys, Segment, Segments
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
        self.runs = [_run(span.blocks, table) for span, table in zip(spans, tables, strict=True)]

    @cached_property
    def ends(self) -> Tensor:
        """How many keys each row sees, int64 [N]."""
        return torch.cat([torch.arange(s.start + 1, s.end + 1, device=self.written.device) for s in self.spans])

    @cached_property
    def zeros(self) -> Tensor:
        return torch.zeros_like(self.ends)

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

    @property
    def max_len(self) -> int:
        return max(span.end for span in self.spans)

    def gather(self, store: Tensor, request: int) -> Tensor:
        """A request's entries in order: a view where its blocks lie one after another, else a copy."""
        run = self.runs[request]
        return store[run] if run is not None else store[self.tables[request]]


def _run(blocks: Sequence[int], table: Tensor) -> slice | None:
    """The slots of a table as one slice, if its blocks lie one after another."""
    first = blocks[0] if blocks else 0
    if any(block != first + i for i, block in enumerate(blocks)) or not len(table):
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
        return [self._segment(i, self._layout.gather(self._kv, i), None) for i in range(len(self._layout.spans))]

    def select(self, query: Tensor, weight: Tensor, topk: int) -> Tensor | None:
        if self._layout.max_len <= topk or self._index_keys is None:
            return None
        return Segments([self._index_segment(i, topk) for i in range(len(self._layout.spans))]).select(query, weight, topk)

    def attend(self, q: Tensor, scale: float, value_dim: int, selected: Tensor | None) -> Tensor:
        if selected is None:
            return Segments(self.segments).attend(q, scale, value_dim, None)
        short = self._short(selected.shape[1])
        if short is None:
            return self._attend_slots(q, scale, value_dim, selected, slice(None))
        long = (self._layout.ends > selected.shape[1]).nonzero()[:, 0]
        near = Segments([self._head_of(i, selected.shape[1]) for i in short[1]]).attend(q[short[0]], scale, value_dim, None)
        far = self._attend_slots(q[long], scale, value_dim, selected[long], long)
        return torch.cat([near, far])[torch.cat([short[0], long]).argsort()]

    def to_positions(self, selected: Tensor | None, topk: int) -> Tensor:
        if selected is not None:
            return selected
        keys = torch.arange(topk, device=self._kv.device)
        return torch.where(keys < self._layout.ends[:, None], keys, -1).int()

    def replay(self, selected: Tensor | None, positions: Tensor, topk: int) -> Tensor | None:
        if selected is None:
            return None
        given = F.pad(positions.int(), (0, topk - positions.shape[1]), value=-1)
        return torch.where((given >= 0).any(1, keepdim=True), given, selected)

    def _attend_slots(self, q: Tensor, scale: float, value_dim: int, selected: Tensor, rows: slice | Tensor) -> Tensor:
        """Sparse attention of rows of any requests over the shared store, through their slot tables."""
        flat = self._layout.offsets[rows][:, None] + selected.clamp(min=0)
        slots = torch.where(selected >= 0, self._layout.table[flat], -1).int()
        return sparse_attention(q, self._kv, slots, scale, value_dim)[0]

    def _short(self, topk: int) -> tuple[Tensor, list[int]] | None:
        """Rows that see at most topk keys, which attend densely, and the requests they are of; None where there are none.

        On a GPU every row goes through its slots, as the model's own keys do it: to split would wait for the device.
        """
        if self._kv.is_cuda:
            return None
        rows, requests = [], []
        for index, (span, where) in enumerate(zip(self._layout.spans, self._layout.rows, strict=True)):
            count = min(max(topk - span.start, 0), span.count)
            if count:
                rows.append(torch.arange(where.start, where.start + count))
                requests.append(index)
        return (torch.cat(rows), requests) if rows else None

    def _head_of(self, request: int, topk: int) -> Segment:
        """The rows of a request that see at most topk keys, and those keys. Rows count from the first such request's on."""
        span = self._layout.spans[request]
        length = min(span.end, topk)
        count = length - span.start
        before = sum(min(max(topk - s.start, 0), s.count) for s in self._layout.spans[:request])
        keys = self._layout.gather(self._kv, request)[:length]
        ends = torch.arange(span.start + 1, length + 1)
        return Segment(slice(before, before + count), keys, None, torch.zeros_like(ends), ends, length)

    def _index_segment(self, request: int, topk: int) -> Segment:
        """For selection alone: kv stays where it is, only index keys are brought together (and not for short contexts)."""
        assert self._index_keys is not None
        is_short = self._layout.spans[request].end <= topk
        keys = self._index_keys[:0] if is_short else self._layout.gather(self._index_keys, request)
        return self._segment(request, self._kv[:0], keys)

    def _segment(self, request: int, kv: Tensor, index_keys: Tensor | None) -> Segment:
        rows, layout = self._layout.rows[request], self._layout
        return Segment(rows, kv, index_keys, layout.zeros[rows], layout.ends[rows], layout.spans[request].end)
