"""The rollouts of an iteration: which tasks, who plays them, where finished attempts are kept until they are learnt from."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rorqual.chat import Tokenizer
from rorqual.policy import SamplingParams
from rorqual.rollout.agent import speaker_of
from rorqual.rollout.archive import Archive
from rorqual.rollout.collect import collect
from rorqual.rollout.trajectory import Trajectory
from rorqual.rollout.view import RolloutView
from rorqual.stages.samplers import Sampler
from rorqual.train.loop import Site

if TYPE_CHECKING:
    from rorqual.stages.grpo import Config, TaskPool


@dataclass(frozen=True)
class Played:
    """This rank's groups of an iteration, and how long playing took."""

    groups: list[list[Trajectory]]
    seconds: float


@dataclass(frozen=True)
class Rollouts:
    config: Config
    sampler: Sampler
    tokenizer: Tokenizer
    tasks: TaskPool
    site: Site

    def play(self, step: int) -> Played:
        began = time.monotonic()
        groups: list[list[Trajectory]] = []

        async def play() -> None:
            # Not as the task's result: asyncio.run writes its repr twice for a message that nobody reads, and this one is long.
            groups.extend(await self._play(step))

        asyncio.run(play())
        return Played(groups, time.monotonic() - began)

    def forget(self, step: int) -> None:
        """Rollouts go only once a checkpoint holds what was learnt from them: those before the last checkpoint but one."""
        for old in (self.site.directory / "rollouts").glob("[0-9]*"):
            if int(old.name) < step - 2 * self.config.pace.checkpoint_every:
                shutil.rmtree(old, ignore_errors=True)

    async def _play(self, step: int) -> list[list[Trajectory]]:
        config, world = self.config, self.site.world
        drawn = self.tasks.draw(config.prompts, config.domain_weights, f"{config.seed}/{step}/tasks")
        first = [config.groups.size * before for before in occurrences(drawn)]
        mine = slice(world.rank, None, world.size)
        archive = Archive(self.site.directory / "rollouts" / f"{step:08d}")
        # Played ahead, a batch has no bar of its own: the trainer's is on the screen.
        log, total = self.site.log, len(drawn[mine]) * config.groups.size
        with log.progress(f"rollouts {step + 1}", total) if not config.staleness else log.quietly(total) as progress:
            view = RolloutView(lambda line: progress.advance(note=line))
            async with self.sampler.policy() as policy:
                return await collect(
                    drawn[mine], self.tasks.open_episode, speaker_of(policy, self.tokenizer, config.mode), config.groups,
                    config.agent, sampling_params(config), number_of(f"{config.seed}/{step}"), archive, advanced=view,
                    first_samples=first[mine],
                )  # fmt: skip


def sampling_params(config: Config) -> SamplingParams:
    """How messages are sampled, and all that the trainer is to replay."""
    replay = config.policy.replay
    return SamplingParams(
        max_tokens=config.agent.max_turn_tokens, temperature=config.sampling.temperature, top_p=config.sampling.top_p,
        top_k=config.sampling.top_k, record_kept_tokens=True, record_routed_experts=replay.routing,
        record_selected_indices=replay.selection,
    )  # fmt: skip


def occurrences(task_ids: Sequence[str]) -> list[int]:
    """For each task how often it stood there before: a task drawn twice is two groups, with attempts of their own."""
    seen: Counter[str] = Counter()
    found = []
    for task_id in task_ids:
        found.append(seen[task_id])
        seen[task_id] += 1
    return found


def number_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
