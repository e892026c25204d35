"""Which requests are computed in the next step, and how many tokens of each: continuous batching with chunked prefill.

The scheduler decides, the runner computes, the engine acts on what came. Requests being computed come first, in order of
arrival; what is left of the step's token budget goes to waiting ones, prompts in chunks. When blocks run out, the latest
arrival gives its own up and is computed again later (from the prefix cache, as far as that still reaches).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from rorqual.engine.blocks import BlockPool, chain_hashes
from rorqual.engine.request import Request
from rorqual.errors import require
from rorqual.policy import StopReason


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one step. All counts are in tokens or requests."""

    max_step_tokens: int = 2048
    """Tokens computed in one step; a longer prompt is computed in chunks of at most this."""
    max_running: int = 64
    """Requests computed side by side."""
    prefix_cache: bool = True
    draft_tokens: int = 0
    """1 reserves a slot for the MTP layer's guess in every decode."""

    def __post_init__(self) -> None:
        require(
            self,
            max_step_tokens=(self.max_step_tokens >= 1 + self.draft_tokens, "at least 1, or 2 with a draft"),
            max_running=(self.max_running >= 1, "at least 1"),
            draft_tokens=(self.draft_tokens in (0, 1), "0 or 1 (the MTP module has depth 1)"),
        )


@dataclass(frozen=True)
class Work:
    """Compute tokens[start : start + count] of a request; where `is_last` a token is sampled after them.

    With a draft, count includes one token beyond `tokens`: the guess.
    """

    request: Request
    start: int
    count: int
    is_last: bool
    has_draft: bool = False


class Scheduler:
    """Owns the queue and the books of blocks; knows no tensors."""

    def __init__(self, config: SchedulerConfig, pool: BlockPool):
        self.config, self.pool = config, pool
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.salt = b""
        """Changes with the weights' version, so that no stale block is found."""

    def add(self, request: Request) -> None:
        """Queue a request. One that could never fit is finished at once, with the reason."""
        if self.pool.blocks_for(len(request.tokens) + 1 + self.config.draft_tokens) > self.pool.num_blocks:
            request.stop_reason = StopReason.TOO_LONG
        else:
            self.waiting.append(request)

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def num_started(self) -> int:
        """Requests that have sampled tokens and no end yet, computed now or waiting to be computed again."""
        return sum(request.num_sampled > 0 or request in self.running for request in [*self.running, *self.waiting])

    def schedule(self, only_started: bool = False) -> list[Work]:
        """The work of the next step. A request that cannot go on (out of blocks, alone) is left with a stop reason.

        only_started: admit no request that has not sampled a token yet.
        """
        budget, work = self.config.max_step_tokens, []
        for request in list(self.running):
            if request in self.running and budget:  # it may have been preempted for an earlier one
                item = self._grow(request, budget)
                if item is not None:
                    work.append(item)
                    budget -= item.count
        preempted = {id(r) for r in self.waiting}
        work = [item for item in work if id(item.request) not in preempted]
        return work + self._admissions(budget, only_started)

    def _admissions(self, budget: int, only_started: bool) -> list[Work]:
        """Waiting requests to begin with, within the budget, first come first served. One whose next block of prompt is being
        computed for another lets the others pass, and finds it in the prefix cache a step or so later."""
        work, coming = [], self._coming() if self.waiting else set()
        for request in list(self.waiting):
            if not budget or len(self.running) >= self.config.max_running or (only_started and not request.num_sampled):
                break
            if request.awaited in coming:
                continue
            item = self._admit(request, budget, coming)
            if item is not None:
                work.append(item)
                budget -= item.count
            elif request.awaited is None:
                break
        return work

    def _coming(self) -> set[bytes]:
        """The names of the blocks that running requests are about to fill."""
        size = self.pool.block_size
        return {name for request in self.running for name in request.names[request.computed_len // size :]}

    def finish(self, request: Request) -> None:
        """Let go of a request's blocks; full ones stay findable."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._release(request)

    def computed(self, request: Request, length: int) -> None:
        """Record that the first `length` tokens of a request are in the cache, and publish the blocks that became full."""
        before, request.computed_len = request.computed_len, length
        size = self.pool.block_size
        if not self.config.prefix_cache or length // size == before // size:
            return
        request.names = chain_hashes(request.tokens[:length], size, self.salt, request.names[: before // size])
        for index in range(before // size, len(request.names)):
            self.pool.publish(request.blocks[index], request.names[index])

    def renew(self, salt: bytes) -> None:
        """The weights have changed: nothing that is cached may be found again."""
        self.salt = salt
        self.pool.forget_all()
        for request in [*self.running, *self.waiting]:
            request.names = []

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks and put it first in the queue; its tokens are kept and computed again."""
        self.running.remove(request)
        self._release(request)
        request.draft = None
        request.preemptions += 1
        self.waiting.appendleft(request)

    def reserve(self, wanted: Mapping[Request, int], most: int) -> int:
        """Take blocks so that each running request may get its number of further tokens, or n of them where that is less; returns
        n: at most `most`, as large as the longest wants and free blocks admit, at least 1 (for that the blocks are held)."""
        n = min(most, max(wanted.values()))
        while n > 1:
            missing = {
                request: self.pool.blocks_for(len(request.tokens) + min(n, count) - 1) - len(request.blocks)
                for request, count in wanted.items()
            }
            fresh = self.pool.allocate(sum(count for count in missing.values() if count > 0))
            if fresh is not None:
                for request, count in missing.items():
                    request.blocks += [fresh.pop() for _ in range(count)]
                break
            n //= 2
        return max(n, 1)

    def _grow(self, request: Request, budget: int) -> Work | None:
        item = self._work(request, budget)
        missing = self.pool.blocks_for(item.start + item.count) - len(request.blocks)
        while missing > 0:
            fresh = self.pool.allocate(missing)
            if fresh is not None:
                request.blocks += fresh
                break
            victim = self.running[-1]
            if victim is request and len(self.running) == 1:
                request.stop_reason = StopReason.OUT_OF_MEMORY
                return None
            self.preempt(victim)
            if victim is request:
                return None
        return item

    def _admit(self, request: Request, budget: int, coming: set[bytes]) -> Work | None:
        """Begin with a waiting request; None where blocks are missing, or where it awaits one that is coming."""
        # The last known token is always computed: its logits are what the request is here for.
        if self.config.prefix_cache:
            known = request.names[: (len(request.tokens) - 1) // self.pool.block_size]
            request.names = chain_hashes(request.tokens[:-1], self.pool.block_size, self.salt, known)
        found = self.pool.find_prefix(request.names)
        following = request.names[len(found) : len(found) + 1]
        request.awaited = following[0] if coming.intersection(following) else None
        if request.awaited is not None:
            self.pool.release(found)
            return None
        fresh = self.pool.allocate(self.pool.blocks_for(len(request.tokens)) - len(found))
        if fresh is None:
            self.pool.release(found)
            return None
        self.waiting.remove(request)
        self.running.append(request)
        coming.update(request.names[len(found) :])
        request.blocks = found + fresh
        request.computed_len = len(found) * self.pool.block_size
        if not request.preemptions:
            request.cached_len = request.computed_len
        return self._work(request, budget)

    def _work(self, request: Request, budget: int) -> Work:
        count = min(request.remaining_len, budget)
        is_last = count == request.remaining_len
        has_draft = request.draft is not None and is_last and count < budget
        return Work(request, request.computed_len, count + has_draft, is_last, has_draft)

    def _release(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks, request.computed_len = [], 0
