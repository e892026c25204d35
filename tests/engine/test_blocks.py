"""The block pool keeps its books under any order of requests, and finds a prefix only where it is the same."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from rorqual.engine.blocks import BlockPool, chain_hashes
from rorqual.errors import UserError


class PoolMachine(RuleBasedStateMachine):
    """Random allocation, prefix hits, publishing and release against a plain count of who holds what."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(7, 2)
        self.held: list[list[int]] = []
        self.content: dict[bytes, int] = {}

    @rule(count=st.integers(0, 5))
    def allocate(self, count):
        taken = self.pool.allocate(count)
        if taken is None:
            assert count > self.pool.num_free
        else:
            assert len(set(taken)) == count
            for blocks in self.held:
                assert not set(taken) & set(blocks), "a held block was given away"
            self.content = {name: block for name, block in self.content.items() if block not in taken}
            self.held.append(taken)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=4, max_size=8))
    def publish_or_find(self, tokens):
        names = chain_hashes(tokens, 2)
        found = self.pool.find_prefix(names)
        assert found == [self.content[n] for n in names[: len(found)]]
        assert len(found) == len(names) or names[len(found)] not in self.content
        fresh = self.pool.allocate(len(names) - len(found))
        if fresh is None:
            self.pool.release(found)
            return
        self.content = {name: block for name, block in self.content.items() if block not in fresh}
        for block, name in zip(found + fresh, names, strict=True):
            self.pool.publish(block, name)
            self.content.setdefault(name, block)
        self.held.append(found + fresh)

    @rule(data=st.data())
    def release(self, data):
        if self.held:
            self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def counts_agree(self):
        assert self.pool.num_held == len({b for blocks in self.held for b in blocks})


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


def test_a_block_is_named_by_all_that_came_before_it_and_by_the_salt():
    a, b = chain_hashes([1, 2, 3, 4, 5], 2), chain_hashes([9, 2, 3, 4], 2)
    assert len(a) == 2, "the part-filled block has no name"
    assert a[1] != b[1] and a != chain_hashes([1, 2, 3, 4], 2, salt=b"v2")


def test_released_prefixes_are_found_until_their_block_is_taken_and_the_first_blocks_last_longest():
    pool = BlockPool(3, 1)
    names = chain_hashes([1, 2, 3], 1)
    blocks = pool.allocate(3)
    for block, name in zip(blocks, names, strict=True):
        pool.publish(block, name)
    pool.release(blocks)
    other = pool.allocate(1)
    assert pool.find_prefix(names) == blocks[:2], "the end of a sequence is given up before its start"
    assert pool.allocate(1) is None
    pool.release(other)
    pool.forget_all()
    assert pool.find_prefix(names) == []


def test_releasing_twice_and_a_pool_of_nothing_are_refused():
    pool = BlockPool(1, 1)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(blocks)
    with pytest.raises(UserError, match="at least 1 block"):
        BlockPool(0, 64)
