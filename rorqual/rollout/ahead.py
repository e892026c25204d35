"""Batches of rollouts played ahead of training, at most so many versions of the weights.

staleness 0     load 0 | play 0 | train 0 | load 1 | play 1 | train 1 | ...          repeatable
staleness 1     load 0 | play 0 | train 0 | load 1 | train 1 | ...
                         play 1 .........| play 2 ........|                          never more than one version behind
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """`take(step)` gives play(step). With staleness above 0 batches are played in a thread of their own, in order, and the batch
    of a step is begun when the weights of step - staleness are there; with 0 it is played when it is asked for."""

    def __init__(self, play: Callable[[int], T], steps: int, staleness: int):
        self.play, self.steps, self.staleness = play, steps, staleness
        self._queue: dict[int, Future[T]] = {}
        self._thread = ThreadPoolExecutor(1, "rorqual-rollouts") if staleness else None

    def take(self, step: int) -> T:
        """The batch of a step; those that may be begun now are queued. Raises what playing raised."""
        if self._thread is None:
            return self.play(step)
        begun = max(self._queue, default=step - 1)
        for later in range(begun + 1, min(step + self.staleness, self.steps - 1) + 1):
            self._queue[later] = self._thread.submit(self.play, later)
        return self._queue.pop(step).result()

    def close(self) -> None:
        """Begin no further batch, and let the one under way end."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
