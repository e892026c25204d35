"""Cache blocks: who holds which, and which of them already hold the start of a prompt.

A block is a page of `block_size` token slots in every layer's cache. Blocks are counted by reference, since requests with a
common prefix share them. A full block is named by a chain hash of all tokens up to its end (and of the weights' version), so
that a later request finds it: the prefix cache. A block that nobody holds stays findable until it is taken for new use, the
one released longest ago first.

Numbers only: the tensors behind the blocks live in `engine.cache`.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from rorqual.errors import UserError


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int):
        if num_blocks < 1 or block_size < 1:
            raise UserError(f"the cache needs at least 1 block of at least 1 token, found {num_blocks} of {block_size}")
        self.num_blocks, self.block_size = num_blocks, block_size
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # released longest ago first
        self._block_by_hash: dict[bytes, int] = {}
        self._hash_by_block: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds; a prefix may still be found in them."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` free blocks, or none at all where there are fewer. What they held is no longer found."""
        if count > len(self._free):
            return None
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._references[block] = 1
            self._forget(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of blocks: those that nobody else holds become free, the last of a sequence to be reused first."""
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise AssertionError(f"block {block} was released more often than held")
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None

    def find_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """Hold the longest run of blocks from the start whose chain hashes are known; the caller releases them."""
        found = []
        for name in hashes:
            block = self._block_by_hash.get(name)
            if block is None:
                break
            found.append(block)
        for block in found:
            self._references[block] += 1
            self._free.pop(block, None)
        return found

    def publish(self, block: int, name: bytes) -> None:
        """Make a full block findable. Where its content is known already under another block, that one stays the known one."""
        if name not in self._block_by_hash:
            self._block_by_hash[name] = block
            self._hash_by_block[block] = name

    def forget_all(self) -> None:
        """Nothing is found any more: after the weights changed, every cached activation is stale."""
        self._block_by_hash.clear()
        self._hash_by_block.clear()

    def _forget(self, block: int) -> None:
        name = self._hash_by_block.pop(block, None)
        if name is not None:
            del self._block_by_hash[name]


def chain_hashes(tokens: Sequence[int], block_size: int, salt: bytes = b"", known: Sequence[bytes] = ()) -> list[bytes]:
    """The name of each full block of a token sequence: a hash of the name before it and the block's tokens.

    known: the names of its first blocks, if they were made before; only the others are hashed.
    """
    names = list(known)
    ids = np.asarray(tokens[len(names) * block_size :], dtype=np.int64)
    parent = names[-1] if names else salt
    for start in range(0, len(ids) - block_size + 1, block_size):
        parent = hashlib.blake2b(parent + ids[start : start + block_size].tobytes(), digest_size=16).digest()
        names.append(parent)
    return names
