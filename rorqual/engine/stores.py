"""One layer's entries and index keys in slots, as they are or packed to FP8 (656 and 132 bytes a token in the release)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.kernels import unpack_index_key, unpack_latent
from rorqual.kernels.cache_writers import index_key_parts
from rorqual.kernels.fp8 import dequantize_activation, quantize_activation


@dataclass(frozen=True)
class Entries:
    """data [slots, L + R] in the model's dtype, or uint8 [slots, L + 4 L / 128 + 2 R]."""

    data: Tensor
    latent_dim: int
    dtype: torch.dtype
    """What packed entries are widened to."""

    @property
    def is_packed(self) -> bool:
        return self.data.dtype == torch.uint8

    def take(self, at: Tensor | slice) -> Tensor:
        """Entries [n, L + R] of some slots, int64 [n] or consecutive."""
        found = self.data[at]
        return torch.cat(unpack_latent(found, self.latent_dim, self.dtype), -1) if self.is_packed else found

    def take_blocks(self, blocks: Tensor, block_size: int) -> Tensor:
        """The entries of whole blocks: blocks int64 [B, n] -> [B, n * block_size, L + R]."""
        pages = self.data.view(-1, block_size * self.data.shape[1])
        found = pages.index_select(0, blocks.flatten()).view(len(blocks), -1, self.data.shape[1])
        return torch.cat(unpack_latent(found, self.latent_dim, self.dtype), -1) if self.is_packed else found


@dataclass(frozen=True)
class IndexKeys:
    """data [slots, C], or uint8 [slots, C + 4]: in each block of `block_size` slots first all values, then their scales."""

    data: Tensor
    block_size: int
    dtype: torch.dtype

    @property
    def is_packed(self) -> bool:
        return self.data.dtype == torch.uint8

    @property
    def pages(self) -> Tensor:
        """[blocks, block_size, entry]."""
        return self.data.view(-1, self.block_size, self.data.shape[1])

    def take(self, at: Tensor | slice) -> Tensor:
        """Keys [n, C] of some slots, int64 [n] or consecutive."""
        if not self.is_packed:
            return self.data[at]
        slots = torch.arange(at.start, at.stop, device=self.data.device) if isinstance(at, slice) else at
        values, scales = index_key_parts(self.pages)
        block, offset = slots // self.block_size, slots % self.block_size
        return unpack_index_key(torch.cat([values[block, offset], scales[block, offset]], -1), self.dtype)

    def take_blocks(self, blocks: Tensor, block_size: int) -> Tensor:
        """The keys of whole blocks: blocks int64 [B, n] -> [B, n * block_size, C]."""
        if not self.is_packed:
            pages = self.data.view(-1, block_size * self.data.shape[1])
            return pages.index_select(0, blocks.flatten()).view(len(blocks), -1, self.data.shape[1])
        slots = blocks[..., None] * block_size + torch.arange(block_size, device=blocks.device)
        return self.take(slots.flatten()).view(len(blocks), -1, self.data.shape[1] - 4)

    def rounded(self, query: Tensor) -> Tensor:
        """An index query [N, I, C] as it is compared with these keys: rounded to FP8 where they are."""
        if not self.is_packed:
            return query
        values, scale = quantize_activation(query.contiguous(), block=query.shape[-1])
        return dequantize_activation(values, scale, query.dtype, block=query.shape[-1])
