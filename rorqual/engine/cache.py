"""The paged cache: latents, rope keys and index keys of all requests in shared blocks, as the model's KeyCache.

A token's slot is block * block_size + offset. In each layer a slot holds L + R elements, and C more where the layer has its
own indexer. Rows of many requests go through the model together: attention gathers the selected slots of all of them from the
shared store in one call, and requests with a row or two in the step (those that decode) choose and attend densely in flocks of
about equal length; only prompts are taken one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rorqual.engine.stores import Entries, IndexKeys
from rorqual.errors import UserError
from rorqual.kernels import quantize_activation, select_tokens, sparse_attention
from rorqual.kernels.own_keys import attend_own_keys, select_own_tokens
from rorqual.model.cache import Fresh
from rorqual.model.config import ModelConfig
from rorqual.model.keys import Keys, Reach, Segment
from rorqual.model.rows import Rows

FEW_ROWS = 4
"""A request with at most so many rows in a step (a decode has one, or two with a draft) is computed together with others."""
SHORT_CHUNK = 64
"""On a GPU: requests with at most so many rows choose in one call, each row through a table of its own."""
FLOCK_TOKENS = 1 << 16
"""Keys gathered at once for them."""
MIN_FLOCK_TOKENS = 256
"""Requests shorter than this count as equally long: telling them apart would cost more than their padding."""


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

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        spare: bool = False,
        packed: bool = False,
    ):
        """spare: with a block beyond those of the pool, for rows that nobody asked for (`spare_block`). packed: in FP8."""
        self.block_size, self.device, self.dtype, self.latent_dim = block_size, device, dtype, config.kv_lora_rank
        self.spare_block = num_blocks
        self.num_slots = (num_blocks + spare) * block_size
        L, R, C = config.kv_lora_rank, config.qk_rope_head_dim, config.index_head_dim
        if packed and L % 128:
            raise UserError(f"cache: an FP8 cache takes a kv_lora_rank that is a multiple of 128, found {L}")
        entry, key = (L + L // 32 + 2 * R, C + 4) if packed else (L + R, C)
        self._is_written_whole = packed or device.type == "cuda"
        """Whether one kernel makes and stores an entry (on a CPU that would only be slower)."""
        kinds = [*config.layer_indexers, *[config.mtp_indexer] * config.n_mtp_layers]
        stored = torch.uint8 if packed else dtype
        self._kv = [torch.zeros(self.num_slots, entry, dtype=stored, device=device) for _ in kinds]
        self._index_keys = [
            torch.zeros(self.num_slots, key, dtype=stored, device=device) if kind == "full" else None for kind in kinds
        ]
        self._layout = _Layout([], block_size, device)

    @property
    def num_bytes(self) -> int:
        """What the storage takes in memory."""
        return sum(store.nbytes for store in [*self._kv, *self._index_keys] if store is not None)

    def plan(self, spans: Sequence[Span]) -> Tensor:
        """Lay out the next forward; returns the slot of each of its rows, int64 [N]."""
        self._layout = _Layout(list(spans), self.block_size, self.device)
        return self._layout.written

    def slots(self, blocks: Sequence[int], length: int) -> Tensor:
        """The slots of a request's first `length` tokens, int64 [length]."""
        return _slots(blocks[: -(-length // self.block_size)], self.block_size, self.device)[:length]

    @property
    def lengths(self) -> list[int]:
        """Tokens held of each request of the planned forward, before it."""
        return [span.start for span in self._layout.spans]

    def begin(self, rows: Rows) -> None:
        found, planned = rows.counts, tuple(span.count for span in self._layout.spans)
        if found != planned:
            raise AssertionError(f"the forward has rows {found} of its requests, planned were {planned}")

    def update(self, layer: int, fresh: Fresh) -> Keys:
        """Store the rows' entries of one layer; the keys they may see."""
        return PagedKeys(self._layout, *self.write(layer, self._layout.written, fresh))

    def write(self, layer: int, slots: Tensor, fresh: Fresh) -> tuple[Entries, IndexKeys | None]:
        """Store a layer's rows in slots int64 [N]; what the layer holds."""
        kv, keys = self._kv[layer], self._index_keys[layer]
        entries = Entries(kv, self.latent_dim, self.dtype)
        index_keys = None if keys is None else IndexKeys(keys, self.block_size, self.dtype)
        if self._is_written_whole:
            fresh.write(kv, None if index_keys is None else index_keys.pages, slots)
            return entries, index_keys
        kv[slots] = fresh.entries().to(kv.dtype)
        found = fresh.index_keys()
        if keys is not None and found is not None:
            keys[slots] = found.to(keys.dtype)
        return entries, index_keys


def _slots(blocks: Sequence[int], block_size: int, device: torch.device) -> Tensor:
    """The slots of whole blocks, int64 [len(blocks) * block_size]."""
    first = torch.tensor(blocks, dtype=torch.int64, device=device) * block_size
    return (first[:, None] + torch.arange(block_size, device=device)).flatten()


class _Layout:
    """Where the rows of one forward and the keys they see lie; the same for all layers."""

    def __init__(self, spans: list[Span], block_size: int, device: torch.device):
        self.spans, self.block_size, self.device = spans, block_size, device
        self.max_len = max((span.end for span in spans), default=0)
        self.firsts = [0, *itertools.accumulate(span.count for span in spans)]
        blocks = [span.blocks[: -(-span.end // block_size)] for span in spans]
        begins = [0, *itertools.accumulate(len(each) * block_size for each in blocks)]
        counts = np.array([span.count for span in spans], dtype=np.int64)
        shifts = np.array([span.start - first for span, first in zip(spans, self.firsts, strict=False)], dtype=np.int64)
        positions = np.arange(self.firsts[-1]) + np.repeat(shifts, counts)
        self.table = _slots(list(itertools.chain.from_iterable(blocks)), block_size, device)
        """The slot tables of all requests, one after another, each of whole blocks."""
        self.offsets = torch.from_numpy(np.repeat(np.array(begins[:-1], dtype=np.int64), counts)).to(device)
        """Where in `table` the request of each row begins, int64 [N]."""
        self.ends = torch.from_numpy(positions + 1).to(device)
        """How many keys of its request each row sees, int64 [N]."""
        self.written = self.table[self.offsets + self.ends - 1]
        self._short: dict[int, _Flock] = {}
        self._runs: dict[int, slice | None] = {}
        self._choosers: dict[int, tuple[list[_Flock], list[_Asked]]] = {}
        self._nears: dict[int | None, _Near | None] = {}

    def rows(self, request: int) -> slice:
        return slice(self.firsts[request], self.firsts[request + 1])

    def reach(self, request: int) -> Reach:
        return _reach(self.spans[request].start, self.spans[request].end, self.device)

    @cached_property
    def reaches(self) -> list[Reach]:
        return [self.reach(request) for request in range(len(self.spans))]

    def listed(self, topk: int) -> Tensor:
        """Every row's first topk keys, int32 [N, topk], -1 beyond its end."""
        keys = torch.arange(topk, device=self.device, dtype=torch.int32)
        return torch.where(keys < self.ends[:, None], keys, -1)

    def gather(self, store: Entries | IndexKeys, request: int) -> Tensor:
        """A request's entries in order: a view where its blocks lie one after another, else a copy."""
        span = self.spans[request]
        if request not in self._runs:
            self._runs[request] = _run(span.blocks, span.end, self.block_size)
        run = self._runs[request]
        return store.take(_slots(span.blocks, self.block_size, self.device)[: span.end] if run is None else run)

    def choosers(self, topk: int) -> tuple[list[_Flock], list[_Asked]]:
        """Who chooses among more than topk keys: flocks of requests with few rows, and single requests."""
        if topk not in self._choosers:
            asked = [(request, span.count) for request, span in enumerate(self.spans) if span.end > topk]
            self._choosers[topk] = self._parted(asked)
        return self._choosers[topk]

    def near(self, topk: int | None) -> _Near | None:
        """The rows that see at most topk keys (None: all rows). None where there are none, or on a GPU, where every row takes
        its slots."""
        if topk not in self._nears:
            counts = [span.count if topk is None else min(max(topk - span.start, 0), span.count) for span in self.spans]
            asked = [(request, count) for request, count in enumerate(counts) if count]
            none = not asked or (topk is not None and self.device.type == "cuda")
            self._nears[topk] = None if none else self._near(topk, asked)
        return self._nears[topk]

    def _near(self, topk: int | None, asked: list[_Asked]) -> _Near:
        flocks, single = self._parted(asked)
        segments = [(request, slice(self.firsts[request], self.firsts[request] + count)) for request, count in single]
        far = (self.ends > topk).nonzero()[:, 0] if topk is not None and self.max_len > topk else None
        return _Near(flocks, segments, far)

    def short_chunks(self, topk: int, asked: list[_Asked]) -> tuple[_Flock | None, list[_Asked]]:
        """Requests with at most SHORT_CHUNK rows, where there are several, as rows with blocks of their own; and the others."""
        short = [each for each in asked if each[1] <= SHORT_CHUNK]
        if len(short) < 2:
            return None, asked
        if topk not in self._short:
            self._short[topk] = self._flock(short, max(map(self._num_blocks, short)))
        return self._short[topk], [each for each in asked if each[1] > SHORT_CHUNK]

    def _parted(self, asked: list[_Asked]) -> tuple[list[_Flock], list[_Asked]]:
        """First rows of some requests: in flocks where they are few and others like them are there, else request by request."""
        single = [each for each in asked if each[1] > FEW_ROWS or self.device.type != "cpu"]
        few = sorted((each for each in asked if each not in single), key=self._num_blocks, reverse=True)
        flocks = []
        while few:
            longest = self._num_blocks(few[0])
            most = max(1, FLOCK_TOKENS // (longest * self.block_size))
            taken = [each for each in few[:most] if 4 * self._num_blocks(each) >= 3 * longest]
            few = few[len(taken) :]
            if len(taken) > 1:
                flocks.append(self._flock(taken, longest))
            else:
                single += taken
        return flocks, single

    def _num_blocks(self, asked: _Asked) -> int:
        """Blocks of keys that the last of the rows sees."""
        request, count = asked
        return -(-max(self.spans[request].start + count, MIN_FLOCK_TOKENS) // self.block_size)

    def _flock(self, asked: list[_Asked], num_blocks: int) -> _Flock:
        rows: list[int] = []
        blocks: list[list[int]] = []
        for request, count in asked:
            held = list(self.spans[request].blocks[:num_blocks])
            rows += range(self.firsts[request], self.firsts[request] + count)
            blocks += [held + held[:1] * (num_blocks - len(held))] * count  # the filling is never seen
        index = torch.tensor(rows, device=self.device)
        return _Flock(index, torch.tensor(blocks, device=self.device), self.ends[index], self.block_size)


_Asked = tuple[int, int]
"""A request, and how many of its rows in this step (the first ones) are meant."""


@dataclass(frozen=True)
class _Flock:
    """Rows of several requests that see about equally many keys, computed in one product."""

    rows: Tensor
    """int64 [B]."""
    blocks: Tensor
    """int64 [B, blocks]: where the keys of each row lie."""
    lengths: Tensor
    """int64 [B]: how many of them it sees."""
    block_size: int

    def gather(self, store: Entries | IndexKeys) -> Tensor:
        """Each row's own keys, [B, blocks * block_size, entry]."""
        return store.take_blocks(self.blocks, self.block_size)


@dataclass(frozen=True)
class _Near:
    """Rows that attend to all keys they see, by flock and by request; and the other rows, None where there are none."""

    flocks: list[_Flock]
    segments: list[tuple[int, slice]]
    far: Tensor | None


def select_paged(query: Tensor, store: IndexKeys, weight: Tensor, topk: int, blocks: Tensor, lengths: Tensor) -> Tensor:
    """Each row chooses among its own keys, in the blocks [N, P] of its table, on a GPU: int32 [N, topk]; lengths int [N]."""
    from rorqual.kernels.select_tokens_triton import select_cached_tokens

    if store.is_packed:
        query, scale = quantize_activation(query.contiguous(), block=query.shape[-1])
        weight = weight * scale[..., 0]
    chosen = select_cached_tokens(query, store.pages, blocks, weight, topk, lengths)
    assert isinstance(chosen, Tensor)
    return chosen


def _reach(start: int, end: int, device: torch.device) -> Reach:
    """Rows [start, end) of a request see all keys up to themselves."""
    ends = torch.arange(start + 1, end + 1, device=device)
    return Reach(torch.zeros_like(ends), ends, start + 1, end)


def _run(blocks: Sequence[int], length: int, block_size: int) -> slice | None:
    """The slots of a request's tokens as one slice, if its blocks lie one after another."""
    if any(block != blocks[0] + i for i, block in enumerate(blocks)):
        return None
    begin = blocks[0] * block_size
    return slice(begin, begin + length)


class PagedKeys:
    """The model's Keys over the shared store of one layer. A selection is in positions of each row's own request."""

    def __init__(self, layout: _Layout, kv: Entries, index_keys: IndexKeys | None):
        self._layout, self._kv, self._index_keys = layout, kv, index_keys

    @property
    def segments(self) -> list[Segment]:
        """Each request's keys in one piece."""
        layout = self._layout
        return [Segment(layout.rows(i), reach, layout.gather(self._kv, i), None) for i, reach in enumerate(layout.reaches)]

    @property
    def reaches(self) -> list[Reach]:
        return self._layout.reaches

    def select(self, query: Tensor, weight: Tensor, topk: int) -> Tensor | None:
        layout, store = self._layout, self._index_keys
        if layout.max_len <= topk or store is None:
            return None
        selected, rounded = layout.listed(topk), store.rounded(query)
        flocks, single = layout.choosers(topk)
        for flock in flocks:
            rows = flock.rows
            selected[rows] = select_own_tokens(rounded[rows], flock.gather(store), weight[rows], topk, flock.lengths)
        if self._kv.data.is_cuda:
            short, single = layout.short_chunks(topk, single)
            if short is not None:
                rows = short.rows
                selected[rows] = select_paged(query[rows], store, weight[rows], topk, short.blocks, short.lengths)
        for request, _ in single:
            rows, reach = layout.rows(request), layout.reaches[request]
            chosen = select_tokens(rounded[rows], layout.gather(store, request), weight[rows], topk, reach.starts, reach.ends)
            assert isinstance(chosen, Tensor)
            selected[rows] = chosen
        return selected

    def attend(self, q: Tensor, scale: float, value_dim: int, selected: Tensor | None) -> Tensor:
        layout = self._layout
        near = layout.near(None if selected is None else selected.shape[1])
        if near is None:
            assert selected is not None
            return self._attend_slots(q, scale, value_dim, selected, layout.offsets)
        out = q.new_empty(*q.shape[:2], value_dim)
        for flock in near.flocks:
            out[flock.rows] = attend_own_keys(q[flock.rows], flock.gather(self._kv), scale, value_dim, flock.lengths)
        for request, rows in near.segments:
            out[rows] = self._attend_segment(q[rows], scale, value_dim, request)
        if near.far is not None and selected is not None:
            far = near.far
            out[far] = self._attend_slots(q[far], scale, value_dim, selected[far], layout.offsets[far])
        return out

    def to_positions(self, selected: Tensor | None, topk: int) -> Tensor:
        return self._layout.listed(topk) if selected is None else selected

    def replay(self, selected: Tensor | None, positions: Tensor, topk: int) -> Tensor | None:
        raise UserError("the engine samples; it replays no selection (the model's own forward does)")

    def _attend_slots(self, q: Tensor, scale: float, value_dim: int, selected: Tensor, offsets: Tensor) -> Tensor:
        """Sparse attention of rows of any requests over the shared store, through their slot tables."""
        slots = self._layout.table[offsets[:, None] + selected.clamp(min=0)]
        return sparse_attention(q, self._kv.data, torch.where(selected >= 0, slots, -1).int(), scale, value_dim)[0]

    def _attend_segment(self, q: Tensor, scale: float, value_dim: int, request: int) -> Tensor:
        """The first rows of a request in this step, each over all keys that it sees."""
        span = self._layout.spans[request]
        reach = _reach(span.start, span.start + len(q), q.device)
        keys = self._layout.gather(self._kv, request)[: reach.max_len]
        return Segment(slice(0, len(q)), reach, keys, None).attend(q, scale, value_dim, None)
