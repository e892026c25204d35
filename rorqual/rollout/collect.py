"""Groups of attempts, many at once: `collect` plays G attempts at each of P tasks and gives back whole groups.

A finished attempt is archived at once and not played again; an attempt that fails is a trajectory with a name for it, and
harms no sibling. Seeds belong to run, iteration, task, sample and turn, so what comes does not depend on what ran beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rorqual.errors import require
from rorqual.policy import ChatPolicy, SamplingParams
from rorqual.rollout.agent import AgentConfig, Episode, play
from rorqual.rollout.archive import Archive
from rorqual.rollout.trajectory import Trajectory


@dataclass(frozen=True)
class GroupConfig:
    """G attempts at each task; how many attempts go on at once."""

    size: int = 8
    concurrency: int = 64

    def __post_init__(self) -> None:
        require(self, size=(self.size >= 1, "at least 1"), concurrency=(self.concurrency >= 1, "at least 1"))


OpenEpisode = Callable[[str], Episode]
"""From a task's id to a fresh episode of it. Its `close`, if it has one, is called when the attempt is over."""


async def collect(
    task_ids: Sequence[str],
    open_episode: OpenEpisode,
    make_speaker: Callable,
    groups: GroupConfig,
    agent: AgentConfig,
    params: SamplingParams,
    run_seed: int,
    archive: Archive | None = None,
    summariser: ChatPolicy | None = None,
    advanced: Callable[[Trajectory], None] = lambda trajectory: None,
    first_samples: Sequence[int] | None = None,
) -> list[list[Trajectory]]:
    """For each task its G trajectories, in order. advanced: called with every trajectory as it is there (progress).
    first_samples: for each task the number of its first attempt, 0 by default; a task that comes twice needs two."""
    slots = asyncio.Semaphore(groups.concurrency)

    async def attempt(task_id: str, sample: int) -> Trajectory:
        found = archive.load(task_id, sample) if archive is not None else None
        if found is None:
            async with slots:
                found = await _played(task_id, sample)
            if archive is not None:
                archive.save(found)
        advanced(found)
        return found

    async def _played(task_id: str, sample: int) -> Trajectory:
        episode = open_episode(task_id)
        try:
            return await play(episode, make_speaker, agent, params, sample=sample, run_seed=run_seed, summariser=summariser)
        finally:
            close = getattr(episode, "close", None)
            if close is not None:
                await close()

    firsts = first_samples or [0] * len(task_ids)
    jobs = [[attempt(t, first + i) for i in range(groups.size)] for t, first in zip(task_ids, firsts, strict=True)]
    flat = await asyncio.gather(*(job for group in jobs for job in group))
    return [list(flat[i : i + groups.size]) for i in range(0, len(flat), groups.size)]
