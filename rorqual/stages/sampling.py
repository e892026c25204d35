"""Attempts at tasks by a checkpoint under the embedded engine: what the cold start and the distillation draw their data from."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rorqual.chat import Tokenizer
from rorqual.engine import Engine, EngineConfig
from rorqual.engine.service import EngineService
from rorqual.model.weights import load_model
from rorqual.policy import SamplingParams
from rorqual.rollout.agent import AgentConfig, speaker_of
from rorqual.rollout.archive import Archive
from rorqual.rollout.collect import GroupConfig, collect
from rorqual.rollout.speaker import ChatMode
from rorqual.rollout.trajectory import Trajectory
from rorqual.stages.grpo import SamplingConfig
from rorqual.train.loop import Site


@dataclass(frozen=True)
class AttemptConfig:
    """How attempts are made that become training data."""

    groups: GroupConfig = field(default_factory=lambda: GroupConfig(size=4))
    """Attempts at each task, and how many at one time."""
    agent: AgentConfig = field(default_factory=AgentConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


def attempts(
    config: AttemptConfig,
    model: Path,
    task_ids: Sequence[str],
    open_episode: Callable[[str], Any],
    thinking: bool,
    archive: Path,
    seed: int,
    site: Site,
) -> list[list[Trajectory]]:
    """For each task its attempts. This rank's share of the tasks is played; what the archive holds is not played again."""
    mine = list(task_ids)[site.world.rank :: site.world.size]
    if mine:
        asyncio.run(_play(config, model, mine, open_episode, thinking, archive, seed, site))
    site.world.barrier()
    found = Archive(archive)
    return [[t for n in range(config.groups.size) if (t := found.load(name, n)) is not None] for name in task_ids]


async def _play(
    config: AttemptConfig, model: Path, mine: list[str], open_episode: Callable[[str], Any], thinking: bool,
    archive: Path, seed: int, site: Site,
) -> None:  # fmt: skip
    tokenizer = Tokenizer.open(model)
    engine = Engine(load_model(model, "float32").requires_grad_(False).to(site.world.device), config.engine)
    params = SamplingParams(
        max_tokens=config.agent.max_turn_tokens, temperature=config.sampling.temperature, top_p=config.sampling.top_p,
        top_k=config.sampling.top_k,
    )  # fmt: skip
    total = len(mine) * config.groups.size
    with site.log.progress(f"attempts by {model.parent.name}", total) as progress:
        async with EngineService(engine, max_waiting=max(total, 256)) as service:
            make_speaker = speaker_of(service, tokenizer, ChatMode(thinking))
            await collect(
                mine, open_episode, make_speaker, config.groups, config.agent, params, seed, Archive(archive),
                advanced=lambda trajectory: progress.advance(),
            )  # fmt: skip
