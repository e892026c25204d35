"""Decoding on a GPU: steps of one token for many requests, captured as CUDA graphs, several steps without the host.

A graph is captured for a number of rows and a number of pages, both rounded up to a bucket; rows beyond the requests are idle:
their pages are a spare block that nobody reads. The graph holds the whole step: the model, the draw of the next tokens and the
move to the next position, so that a run of steps needs nothing of the host but its launches, and the host settles a step while
the device computes the next ones. On a device without graphs (tests on a CPU) the same step is called as it is.

What a request draws depends on its own rows alone within a bucket: products have the bucket's shape whoever is in it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from rorqual.engine.cache import PagedCache, select_paged
from rorqual.engine.philox import uniforms
from rorqual.engine.records import RecordStore
from rorqual.engine.request import Request
from rorqual.engine.sampler import Sampled
from rorqual.engine.stores import Entries, IndexKeys
from rorqual.errors import UserError
from rorqual.kernels import sparse_attention
from rorqual.kernels.own_keys import select_own_tokens
from rorqual.model.cache import Fresh
from rorqual.model.call import AttentionMode
from rorqual.model.keys import Keys, Reach, Segment
from rorqual.model.rows import Rows
from rorqual.model.transformer import Transformer
from rorqual.policy import SamplingParams

LAUNCHED_AHEAD = 3
"""Steps that the device has in hand while the host settles one."""
MIN_PAGES = 4


def is_drawn_on_device(request: Request) -> bool:
    """Whether the kernel draws for this request: not with a bias, a grammar, or a report of the likeliest tokens."""
    params = request.params
    return not (params.logit_bias or params.top_logprobs or request.constraint)


@dataclass(frozen=True)
class Settings:
    """What each row is drawn with, on the device."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> Settings:
        real = [torch.ones(rows, device=device) for _ in range(3)]
        return cls(real[0], torch.zeros(rows, dtype=torch.int32, device=device), real[1], real[2])

    def fill(self, params: Sequence[SamplingParams]) -> None:
        """The settings of the first rows."""
        for name in ("temperature", "top_k", "top_p", "min_p"):
            column: Tensor = getattr(self, name)
            values = torch.tensor([getattr(each, name) for each in params], dtype=column.dtype)
            column[: len(params)].copy_(values, non_blocking=True)


@dataclass
class DecodeKeys:
    """The model's Keys for one query of each row, whose keys lie in the pages of its table. A selection is in positions."""

    decode: PagedDecode
    kv: Entries
    index_keys: IndexKeys | None

    @property
    def segments(self) -> list[Segment]:
        raise AssertionError("a decode step attends in the absorbed form: its keys lie in pages")

    @property
    def reaches(self) -> list[Reach]:
        return []

    def select(self, query: Tensor, weight: Tensor, topk: int) -> Tensor | None:
        step, store = self.decode, self.index_keys
        if step.max_len <= topk or store is None:
            return None
        if not query.is_cuda:
            keys = store.take_blocks(step.table.long(), step.block_size)
            return select_own_tokens(store.rounded(query), keys, weight, topk, step.ends.long())
        return select_paged(query, store, weight, topk, step.table, step.ends)

    def attend(self, q: Tensor, scale: float, value_dim: int, selected: Tensor | None) -> Tensor:
        slots = self.decode.all_slots if selected is None else self.decode.slots_of(selected)
        return sparse_attention(q, self.kv.data, slots, scale, value_dim)[0]

    def to_positions(self, selected: Tensor | None, topk: int) -> Tensor:
        return self.decode.listed(topk) if selected is None else selected

    def replay(self, selected: Tensor | None, positions: Tensor, topk: int) -> Tensor | None:
        raise UserError("the engine samples; it replays no selection (the model's own forward does)")


class PagedDecode:
    """The model's KeyCache for one token of each row: tables int32 [B, P] of blocks, positions int64 [B]. Nothing of it is known
    to the host but the shapes."""

    def __init__(self, cache: PagedCache, table: Tensor, positions: Tensor):
        self.cache, self.table = cache, table
        self.block_size = cache.block_size
        self.max_len = table.shape[1] * self.block_size
        self.ends = (positions + 1).to(torch.int32)
        self.written = self.slots_of(positions[:, None])[:, 0].long()
        self._every: Tensor | None = None

    @property
    def lengths(self) -> list[int]:
        raise UserError("the lengths of a decode step are on the device")

    def slots_of(self, positions: Tensor) -> Tensor:
        """int32 slots of each row's positions [B, K]; -1 where a position is negative."""
        if positions.is_cuda:
            from rorqual.kernels.routing_triton import slots_of

            return slots_of(self.table, positions.contiguous(), self.ends, self.block_size, positions.shape[1])
        page = positions.clamp(min=0) // self.block_size
        slots = self.table.gather(1, page.long()) * self.block_size + positions % self.block_size
        return torch.where(positions >= 0, slots, -1).int()

    def listed(self, count: int) -> Tensor:
        """Every row's first `count` positions, int32 [B, count], -1 beyond its length."""
        keys = torch.arange(count, device=self.table.device, dtype=torch.int32)
        return torch.where(keys < self.ends[:, None], keys, -1)

    @property
    def all_slots(self) -> Tensor:
        """The slots of all keys that each row sees; made once in a step."""
        if self._every is None:
            self._every = self.slots_of(self.listed(self.max_len))
        return self._every

    def begin(self, rows: Rows) -> None:
        if len(rows.tokens) != len(self.table):
            raise AssertionError(f"the step has {len(rows.tokens)} rows, planned were {len(self.table)}")

    def update(self, layer: int, fresh: Fresh) -> Keys:
        return DecodeKeys(self, *self.cache.write(layer, self.written, fresh))


@dataclass
class Bucket:
    """The buffers of one step for B rows of P pages, and the step itself."""

    rows: int
    pages: int
    tokens: Tensor
    """int64 [B]: the token to compute; the drawn one afterwards."""
    positions: Tensor
    """int64 [B]."""
    active: Tensor
    """int64 [B]: 1 where there is a request."""
    table: Tensor
    """int32 [B, P]."""
    settings: Settings
    at: Tensor
    """int64 [1]: which step of the run this is."""
    noise: Tensor
    """float64 [n, B]."""
    drawn: Tensor
    """float64 [n, 3, B]: token, its log-prob, its log-prob under the raw model."""
    kept: Tensor | None
    """uint8 [n, B, V / 8], bits."""
    host_drawn: Tensor
    host_kept: Tensor | None
    replay: Callable[[], None] = field(default=lambda: None)


class Decoder:
    """Runs of decode steps. `captures` False calls each step instead of replaying its graph."""

    def __init__(
        self, model: Transformer, cache: PagedCache, records: RecordStore, mode: AttentionMode, max_steps: int, captures: bool
    ):
        # One query for each row: the absorbed form always costs less.
        self.model, self.cache, self.records, self.mode = model, cache, records, replace(mode, form="absorbed")
        self.max_steps, self.captures = max_steps, captures
        self.device = cache.device
        self._buckets: dict[tuple[int, int, bool], Bucket] = {}
        self._pool = torch.cuda.graph_pool_handle() if captures else None

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], steps: int) -> Iterator[list[Sampled | None]]:
        """Compute the last known token of each request and draw the next, `steps` times; the draws of each step, in order.

        A request that ends on the way goes on to be computed, into its own blocks or the spare one, until the run is over: the
        caller ignores it. All steps must be taken from the iterator. None: the logits are no numbers.
        """
        record = any(request.params.record_kept_tokens for request in requests)
        bucket = self._bucket(len(requests), max(len(each.tokens) for each in requests) + steps, record)
        self._fill(bucket, requests, steps)
        ready: list[torch.cuda.Event | None] = []
        for step in range(steps):
            while len(ready) < min(step + 1 + LAUNCHED_AHEAD, steps):
                ready.append(self._launch(bucket, len(ready)))
            event = ready[step]
            if event is not None:
                event.synchronize()
            count, kept = len(requests), bucket.host_kept
            yield self._sampled(bucket.host_drawn[step, :, :count], None if kept is None else kept[step, :count])

    def _launch(self, bucket: Bucket, step: int) -> torch.cuda.Event | None:
        bucket.replay()
        bucket.host_drawn[step].copy_(bucket.drawn[step], non_blocking=True)
        if bucket.kept is not None and bucket.host_kept is not None:
            bucket.host_kept[step].copy_(bucket.kept[step], non_blocking=True)
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _bucket(self, rows: int, length: int, record: bool) -> Bucket:
        pages = round_up(-(-length // self.cache.block_size), MIN_PAGES)
        key = (round_up_rows(rows), pages, record)
        if key not in self._buckets:
            self._buckets[key] = self._made(*key)
        return self._buckets[key]

    def _made(self, rows: int, pages: int, record: bool) -> Bucket:
        n, V, device = self.max_steps, self.model.config.vocab_size, self.device
        pinned = device.type == "cuda"
        kept = (n, rows, -(-V // 8))
        bucket = Bucket(
            rows=rows,
            pages=pages,
            tokens=torch.zeros(rows, dtype=torch.int64, device=device),
            positions=torch.zeros(rows, dtype=torch.int64, device=device),
            active=torch.zeros(rows, dtype=torch.int64, device=device),
            table=torch.full((rows, pages), self.cache.spare_block, dtype=torch.int32, device=device),
            settings=Settings.empty(rows, device),
            at=torch.zeros(1, dtype=torch.int64, device=device),
            noise=torch.zeros(n, rows, dtype=torch.float64, device=device),
            drawn=torch.zeros(n, 3, rows, dtype=torch.float64, device=device),
            kept=torch.zeros(kept, dtype=torch.uint8, device=device) if record else None,
            host_drawn=torch.zeros(n, 3, rows, dtype=torch.float64, pin_memory=pinned),
            host_kept=torch.zeros(kept, dtype=torch.uint8, pin_memory=pinned) if record else None,
        )
        bucket.replay = self._captured(bucket) if self.captures else lambda: self._step(bucket)
        return bucket

    def _captured(self, bucket: Bucket) -> Callable[[], None]:
        """The step as a graph; it is called twice before with all rows idle, as kernels are compiled and chosen then."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2):
                bucket.at.zero_()
                self._step(bucket)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._step(bucket)
        return graph.replay

    def _step(self, bucket: Bucket) -> None:
        from rorqual.kernels.draw_tokens_triton import draw_tokens

        cache = PagedDecode(self.cache, bucket.table, bucket.positions)
        first = torch.arange(bucket.rows, device=self.device)
        rows = Rows(bucket.tokens, bucket.positions, first, (1, bucket.rows), None, (1,) * bucket.rows, (1,) * bucket.rows)
        trace = self.records.trace()
        states = self.model.run(rows, cache, trace=trace, mode=self.mode)
        self.records.write(cache.written, trace)
        logits = self.model.logits(states.hidden).contiguous()
        each = bucket.settings
        draw_tokens(
            logits, bucket.noise, each.temperature, each.top_k, each.top_p, each.min_p,
            bucket.drawn, bucket.tokens, bucket.kept, bucket.at,
        )  # fmt: skip
        bucket.positions += bucket.active
        bucket.at += 1

    def _fill(self, bucket: Bucket, requests: Sequence[Request], steps: int) -> None:
        """Put the requests into the first rows, the others at rest."""
        idle, count = bucket.rows - len(requests), len(requests)
        table = np.full((bucket.rows, bucket.pages), self.cache.spare_block, dtype=np.int32)
        for row, request in enumerate(requests):
            table[row, : len(request.blocks)] = request.blocks
        noise = np.zeros((steps, bucket.rows))
        places = [each.num_sampled + step for step in range(steps) for each in requests]
        noise[:, :count] = uniforms([each.seed for each in requests] * steps, places).reshape(steps, count)
        tokens = [each.tokens[-1] for each in requests] + [0] * idle
        positions = [len(each.tokens) - 1 for each in requests] + [0] * idle
        for target, values in (
            (bucket.tokens, np.array(tokens)),
            (bucket.positions, np.array(positions)),
            (bucket.active, np.arange(bucket.rows) < count),
            (bucket.table, table),
            (bucket.noise[:steps], noise),
        ):
            target.copy_(torch.from_numpy(values))
        bucket.settings.fill([each.params for each in requests])
        bucket.at.zero_()

    @torch.inference_mode()
    def draw(self, logits: Tensor, requests: Sequence[Request]) -> list[Sampled | None]:
        """Draw one token for each request from logits float32 [N, V] of a forward that is no run of steps."""
        from rorqual.kernels.draw_tokens_triton import draw_tokens

        count, settings = len(requests), Settings.empty(len(requests), self.device)
        settings.fill([each.params for each in requests])
        noise = uniforms([each.seed for each in requests], [each.num_sampled for each in requests])
        drawn = torch.empty(1, 3, count, dtype=torch.float64, device=self.device)
        tokens = torch.empty(count, dtype=torch.int64, device=self.device)
        is_kept = any(request.params.record_kept_tokens for request in requests)
        kept = torch.empty(1, count, -(-logits.shape[1] // 8), dtype=torch.uint8, device=self.device) if is_kept else None
        draw_tokens(
            logits.contiguous(), torch.from_numpy(noise)[None].to(self.device), settings.temperature, settings.top_k,
            settings.top_p, settings.min_p, drawn, tokens, kept,
        )  # fmt: skip
        return self._sampled(drawn[0].cpu(), None if kept is None else kept[0].cpu())

    def _sampled(self, drawn: Tensor, packed: Tensor | None) -> list[Sampled | None]:
        """The draws [3, N] and the bits of their kept sets as the host keeps them. None: the logits are no numbers."""
        tokens, logprobs, plain = drawn.tolist()
        kept = [None] * len(tokens) if packed is None else self._kept_sets(packed)
        return [
            Sampled(int(token), logprob, model, own) if math.isfinite(model) else None
            for token, logprob, model, own in zip(tokens, logprobs, plain, kept, strict=True)
        ]

    def _kept_sets(self, packed: Tensor) -> list[np.ndarray | None]:
        """The ids whose bits are set in each row, uint8 [N, V / 8]; None where all are."""
        bits = np.unpackbits(packed.numpy(), axis=1, bitorder="little")
        sizes, width, V = bits.sum(1, dtype=np.int64).tolist(), bits.shape[1], self.model.config.vocab_size
        ids, ends = np.flatnonzero(bits), itertools.accumulate(sizes)
        return [
            None if size == V else (ids[end - size : end] - row * width).astype(np.int32)
            for row, (size, end) in enumerate(zip(sizes, ends, strict=True))
        ]


def round_up(count: int, least: int) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (count - 1).bit_length())


def round_up_rows(count: int) -> int:
    """Powers of two up to 32, then multiples of 32: idle rows cost little beside what a graph's capture does."""
    return round_up(count, 1) if count <= 32 else -(-count // 32) * 32
