"""Reinforcement learning [V3.2, 3.1]: GRPO over mixed domains, with everything the sampler decided replayed.

    P tasks -> G attempts each -> verdicts -> rewards -> advantages -> U updates -> weights to the sampler -> again

The sampler is the embedded engine with weights of its own, replaced after every iteration. A finished attempt is on disk
before anything learns from it, and is there until a checkpoint holds what was learnt: a killed run plays none twice and
trains none twice.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rorqual.chat import Tokenizer
from rorqual.engine import Engine, EngineConfig
from rorqual.engine.service import EngineService
from rorqual.errors import require
from rorqual.parallel.apply import ComputeConfig, parallelize, whole_state
from rorqual.policy import SamplingParams
from rorqual.rewards.advantages import AdvantageConfig, group_advantages
from rorqual.rewards.domains import RewardConfig, reward
from rorqual.rollout.agent import AgentConfig, speaker_of
from rorqual.rollout.archive import Archive
from rorqual.rollout.collect import GroupConfig, collect
from rorqual.rollout.speaker import ChatMode
from rorqual.rollout.trajectory import Trajectory, samples
from rorqual.stages.task_set import Split, TaskSet, open_tasks
from rorqual.train.export import open_model, publish_model
from rorqual.train.lineage import Making
from rorqual.train.loop import Pace, Site, run_steps
from rorqual.train.optimizer import Optimizer, OptimizerConfig, learning_rate
from rorqual.train.policy_step import PolicyConfig, PolicyObjective, policy_step, prepare
from rorqual.train.samples import Item
from rorqual.train.setup import begin, training_tensors


@dataclass(frozen=True)
class SamplingConfig:
    """Of rollouts. temperature must be above 0: a greedy choice has no log-probability to train."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        require(self, temperature=(self.temperature > 0, "more than 0"), top_p=(0 < self.top_p <= 1, "in (0, 1]"))


@dataclass(frozen=True)
class Config:
    pace: Pace = field(default_factory=lambda: Pace(steps=100, checkpoint_every=5))
    """Steps are iterations: a batch of rollouts and the updates on it."""
    prompts: int = 16
    """Tasks of an iteration, of all ranks together."""
    updates: int = 1
    """Optimiser steps on each batch of rollouts; more than 1 is staleness by design, which the masks are for."""
    groups: GroupConfig = field(default_factory=GroupConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    mode: ChatMode = field(default_factory=ChatMode)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    advantages: AdvantageConfig = field(default_factory=AdvantageConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-6, schedule="constant", weight_decay=0.0)
    )
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(record_selection=True))
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    domain_weights: Mapping[str, float] = field(default_factory=dict)
    """Share of each domain among the prompts; empty: by their numbers of tasks."""
    shuffle_rewards: bool = False
    """The control: every group's rewards are dealt out anew among its attempts; nothing can be learnt from them."""
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            self,
            prompts=(self.prompts >= 1, "at least 1"),
            updates=(self.updates >= 1, "at least 1"),
            agent=(self.agent.time_s is None or self.agent.time_s > 0, "a positive time_s, or none"),
        )


@dataclass(frozen=True)
class TaskPool:
    """What is played: task ids by domain, and how an episode of one is opened (an asynchronous one, with `close`)."""

    by_domain: Mapping[str, Sequence[str]]
    open_episode: Callable[[str], Any]
    sources: Mapping[str, Path] = field(default_factory=dict)
    """Where the tasks lie, by role, and how they are opened: for the lineage record."""
    settings: Mapping[str, str] = field(default_factory=dict)

    def domain_of(self, task_id: str) -> str:
        return next(domain for domain, ids in self.by_domain.items() if task_id in ids)

    def draw(self, count: int, weights: Mapping[str, float], seed: str) -> list[str]:
        """`count` tasks for one iteration: a pure function of the seed; no task twice while there are enough."""
        draw = random.Random(seed)
        shares = {name: weights.get(name, 0.0) if weights else float(len(ids)) for name, ids in self.by_domain.items()}
        names = draw.choices(list(shares), list(shares.values()), k=count)
        picked: list[str] = []
        for name in sorted(set(names)):
            ids, wanted = list(self.by_domain[name]), names.count(name)
            picked += draw.sample(ids, wanted) if wanted <= len(ids) else draw.choices(ids, k=wanted)
        return picked


def main(config: Config, init: Path, tasks: TaskPool, site: Site) -> Path:
    """Train the checkpoint `init` on the tasks; the finished checkpoint's directory."""
    begin(config, site, init)
    final = site.directory / "model"
    if final.is_dir():
        return final
    tokenizer = Tokenizer.open(init)
    model = open_model(init)
    reference = copy.deepcopy(model).eval().requires_grad_(False).to(site.world.device) if config.policy.needs_reference else None
    sampler = Engine(copy.deepcopy(model).eval().requires_grad_(False).to(site.world.device), config.engine)
    model = model.to(site.world.device)
    objective = PolicyObjective(model, config.policy)
    parallelize(objective, model, site.world, config.compute)
    optimizer = Optimizer(model, config.optimizer)
    rollouts = site.directory / "rollouts"

    def one_step(step: int) -> dict[str, float]:
        sampler.update_weights(whole_state(model).items(), version=step)
        played = asyncio.run(_rollout(config, step, sampler, tokenizer, tasks, rollouts, site))
        items, metrics = learnable(played, tasks, config, step)
        rate = learning_rate(config.optimizer, step, config.pace.steps)
        for batch in mini_batches(items, config.updates, f"{config.seed}/{step}"):
            parts = prepare(batch, config.policy, reference, site.world)
            metrics |= policy_step(objective, optimizer, parts, site.world, rate) if parts else {}
        _forget_trained(rollouts, step, config.pace)
        return metrics

    run_steps("grpo", config.pace, one_step, optimizer, training_tensors(model, optimizer), site)
    making = Making("grpo", config, {"init": init, **tasks.sources}, tasks.settings)
    return publish_model(model, final, config.compute.save_dtype, init, making, site.world)


async def _rollout(
    config: Config, step: int, engine: Engine, tokenizer: Tokenizer, tasks: TaskPool, rollouts: Path, site: Site
) -> list[list[Trajectory]]:
    """This rank's groups of the iteration."""
    world, seed = site.world, number_of(f"{config.seed}/{step}")
    drawn = tasks.draw(config.prompts, config.domain_weights, f"{config.seed}/{step}/tasks")[world.rank :: world.size]
    params = SamplingParams(
        max_tokens=config.agent.max_turn_tokens, temperature=config.sampling.temperature, top_p=config.sampling.top_p,
        top_k=config.sampling.top_k, record_kept_tokens=True, record_routed_experts=config.policy.replay.routing,
        record_selected_indices=config.policy.replay.selection,
    )  # fmt: skip
    total = len(drawn) * config.groups.size
    with site.log.progress(f"rollouts {step + 1}", total) as progress:
        async with EngineService(engine, max_waiting=max(total, 256)) as service:
            return await collect(
                drawn, tasks.open_episode, speaker_of(service, tokenizer, config.mode), config.groups, config.agent, params,
                seed, Archive(rollouts / f"{step:08d}"), advanced=lambda trajectory: progress.advance(),
            )  # fmt: skip


def learnable(
    groups: Sequence[Sequence[Trajectory]], tasks: TaskPool, config: Config, step: int
) -> tuple[list[Item], dict[str, float]]:
    """Items with advantages, and what the rollouts were like. Attempts without a reward, and flat groups, teach nothing."""
    items: list[Item] = []
    measured: dict[str, list[float]] = {}
    number = 0
    for index, group in enumerate(groups):
        domain = tasks.domain_of(group[0].task_id)
        found = [reward(trajectory, config.rewards.of(domain)) for trajectory in group]
        values = [each.value for each in found]
        if config.shuffle_rewards:
            random.Random(f"{config.seed}/{step}/{index}").shuffle(values)
        compared = group_advantages(values, config.advantages)
        _measure(measured, group, found, compared.is_flat, domain)
        for trajectory, advantage in zip(group, compared.advantages, strict=True):
            number += 1
            if advantage is not None:
                items += [Item(sample, advantage, number, domain) for sample in samples(trajectory)]
    metrics = {name: sum(values) / len(values) for name, values in measured.items() if values}
    return items, metrics | {"rollout/samples": float(len(items))}


def _measure(
    measured: dict[str, list[float]], group: Sequence[Trajectory], found: Sequence[Any], is_flat: bool, domain: str
) -> None:
    def add(name: str, value: float) -> None:
        measured.setdefault(name, []).append(value)

    add("rollout/flat_groups", float(is_flat))
    for trajectory, each in zip(group, found, strict=True):
        passed = trajectory.verdict.passed if trajectory.verdict else False
        add("rollout/success", float(passed))
        add(f"rollout/success/{domain}", float(passed))
        add("rollout/no_reward", float(each.value is None))
        add("rollout/steps", float(trajectory.steps))
        add("rollout/sampled_tokens", float(trajectory.sampled_tokens))
        add("rollout/answered", float(trajectory.answered))
        if each.value is not None:
            add("reward/mean", each.value)
            for name, value in each.terms.items():
                add(f"reward/{name}", value)


def mini_batches(items: Sequence[Item], count: int, seed: str) -> list[list[Item]]:
    """Whole trajectories dealt into `count` mini-batches, in an order that the seed gives."""
    order = sorted({item.trajectory for item in items})
    random.Random(seed).shuffle(order)
    dealt = [set(order[index::count]) for index in range(count)]
    return [batch for batch in ([i for i in items if i.trajectory in mine] for mine in dealt) if batch]


def _forget_trained(rollouts: Path, step: int, pace: Pace) -> None:
    """Rollouts go only once a checkpoint holds what was learnt from them: those before the last checkpoint but one."""
    for old in rollouts.glob("[0-9]*"):
        if int(old.name) < step - 2 * pace.checkpoint_every:
            shutil.rmtree(old, ignore_errors=True)


def number_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


def open_store(directories: Path | Sequence[Path], isolation: str, split: Split = "train") -> TaskPool:
    """The tasks of a split of one store or several as a pool; a task's family is its domain."""
    return pool_of(open_tasks(directories, isolation, split))


def pool_of(tasks: TaskSet) -> TaskPool:
    return TaskPool(tasks.by_domain, tasks.open, tasks.sources, tasks.settings)
