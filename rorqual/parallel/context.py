"""Context parallelism: the ranks of a group share the same sequences. Each computes some of the rows; keys are gathered.

Only latents, rope keys and index keys travel (L + R + C numbers a token and layer), since every head reads the same entry.
Rows are dealt out in two runs, one from the front and one from the back, so that the triangle of causal work divides evenly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from rorqual.model.cache import Fresh
from rorqual.model.keys import Keys, Reach, Segment, Segments
from rorqual.model.rows import Rows
from rorqual.parallel.collectives import GatherRows


def share_of_rows(count: int, rank: int, size: int) -> Tensor:
    """int64: which of `count` packed rows a rank computes, ascending; together the ranks compute each row once."""
    runs = torch.arange(count).tensor_split(2 * size)
    return torch.cat([runs[rank], runs[2 * size - 1 - rank]])


def local_rows(rows: Rows, mine: Tensor) -> Rows:
    """The rows `mine`, which know their place among all: `starts` still counts over all rows."""
    return Rows(rows.tokens[mine], rows.positions[mine], rows.starts[mine], (1, len(mine)))


class GatheredKeys:
    """A cache for one forward over a share of the rows: `update` gathers the keys of all of them, in their order."""

    def __init__(self, rows: Rows, rank: int, group: dist.ProcessGroup):
        size, count, device = dist.get_world_size(group), len(rows.tokens), rows.tokens.device
        shares = [share_of_rows(count, r, size) for r in range(size)]
        self.group, self.mine = group, shares[rank].to(device)
        self._padded = max(map(len, shares))
        place = torch.empty(count, dtype=torch.int64)
        for r, share in enumerate(shares):
            place[share] = r * self._padded + torch.arange(len(share))
        self._place = place.to(device)
        ends = self.mine + 1
        self._reach = Reach(rows.starts[self.mine], ends, 1, max(rows.lengths, default=0))

    @property
    def lengths(self) -> Sequence[int]:
        return ()

    def begin(self, rows: Rows) -> None:
        """Nothing to make room for: keys live for one forward."""

    def update(self, layer: int, fresh: Fresh) -> Keys:
        kv, own = fresh.entries(), fresh.index_keys()
        index_keys = None if own is None else self._gather(own)
        return Segments([Segment(slice(0, len(kv)), self._reach, self._gather(kv), index_keys)])

    def _gather(self, x: Tensor) -> Tensor:
        """[my rows, ...] -> [all rows, ...]; the gradient of a key is the sum over the ranks that read it."""
        missing = self._padded - len(x)
        padded = torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x
        return GatherRows.apply(padded, self.group)[self._place]  # type: ignore[index]
