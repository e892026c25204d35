"""Reinforcement learning [V3.2, 3.1]: GRPO over mixed domains, with everything the sampler decided replayed.

    P tasks -> G attempts each -> verdicts -> rewards -> advantages -> U updates -> weights to the sampler -> again

The sampler has weights of its own, replaced after every iteration; rollouts may run ahead by `staleness` iterations. A
finished attempt is on disk before anything learns from it, and is there until a checkpoint holds what was learnt: a killed run
plays none twice and trains none twice.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rorqual.chat import Tokenizer
from rorqual.engine import EngineConfig
from rorqual.errors import require
from rorqual.model.transformer import Transformer
from rorqual.parallel.apply import ComputeConfig, parallelize, whole_state
from rorqual.rewards.advantages import AdvantageConfig
from rorqual.rewards.domains import RewardConfig
from rorqual.rollout.agent import AgentConfig
from rorqual.rollout.ahead import Ahead
from rorqual.rollout.collect import GroupConfig
from rorqual.rollout.remote import RemoteConfig
from rorqual.rollout.speaker import ChatMode
from rorqual.stages.batches import averaged, learnable, mini_batches
from rorqual.stages.rollouts import Played, Rollouts, number_of, sampling_params
from rorqual.stages.samplers import Colocated, External, Sampler
from rorqual.stages.stopwatch import Stopwatch
from rorqual.stages.task_set import Split, TaskSet, open_tasks
from rorqual.train.export import open_model, publish_model
from rorqual.train.lineage import Making
from rorqual.train.loop import Pace, Site, run_steps
from rorqual.train.optimizer import Optimizer, OptimizerConfig, learning_rate
from rorqual.train.policy_step import PolicyConfig, PolicyObjective, policy_step, prepare
from rorqual.train.samples import Item
from rorqual.train.setup import begin, training_tensors

__all__ = ["Config", "SamplingConfig", "TaskPool", "learnable", "main", "mini_batches", "number_of", "open_store", "pool_of"]


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
    staleness: int = 0
    """How many iterations rollouts may run ahead of training, in a thread of their own; 0 is repeatable bit for bit."""
    external: RemoteConfig | None = None
    """An engine over HTTP (vLLM, SGLang, rorqual serve) in place of the embedded one. It must see this run's directory."""
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
            staleness=(self.staleness >= 0, "at least 0"),
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
    model = open_model(init)
    reference = copy.deepcopy(model).eval().requires_grad_(False).to(site.world.device) if config.policy.needs_reference else None
    sampler = open_sampler(config, model, init, site)
    rollouts = Rollouts(config, sampler, Tokenizer.open(init), tasks, site)
    model = model.to(site.world.device)
    objective = PolicyObjective(model, config.policy)
    parallelize(objective, model, site.world, config.compute)
    optimizer = Optimizer(model, config.optimizer)
    ahead, watch = Ahead(rollouts.play, config.pace.steps, config.staleness), Stopwatch()

    def one_step(step: int) -> dict[str, float]:
        with watch("sync"):
            sampler.load(whole_state(model), step)
        with watch("rollout"):
            played = ahead.take(step)
        items, metrics = learnable(played.groups, tasks, config, step, site.world)
        with watch("train"):
            metrics |= learn(step, items)
        rollouts.forget(step)
        metrics["train/tokens_per_s"] = config.updates * metrics.get("train/tokens", 0.0) / watch.seconds["train"]
        return metrics | watch.shares() | _pace(played, sampler)

    def learn(step: int, items: list[Item]) -> dict[str, float]:
        rate, seed = learning_rate(config.optimizer, step, config.pace.steps), f"{config.seed}/{step}"
        updates = []
        for batch in mini_batches(items, config.updates, seed, config.prompts * config.groups.size):
            parts = prepare(batch, config.policy, reference, site.world)
            updates.append(policy_step(objective, optimizer, parts, site.world, rate))
        return averaged(updates)

    try:
        run_steps("grpo", config.pace, one_step, optimizer, training_tensors(model, optimizer), site)
    finally:
        ahead.close()
        sampler.close()
    making = Making("grpo", config, {"init": init, **tasks.sources}, tasks.settings)
    return publish_model(model, final, config.compute.save_dtype, init, making, site.world)


def open_sampler(config: Config, model: Transformer, init: Path, site: Site) -> Sampler:
    """The embedded engine, or the external one. Raises UserError where it cannot give what the trainer is to replay."""
    if config.external is None:
        waiting = config.prompts * config.groups.size * (1 + config.staleness)
        sampler: Sampler = Colocated(model, config.engine, site, max(waiting, 256))
    else:
        sampler = External(config.external, model, init, site, config.compute.save_dtype)
    sampler.check(sampling_params(config))
    return sampler


def _pace(played: Played, sampler: Sampler) -> dict[str, float]:
    """Tokens a second of this rank's rollouts, and what went wrong at the sampler's boundary so far."""
    sampled = sum(trajectory.sampled_tokens for group in played.groups for trajectory in group)
    pace = {"rollout/seconds": played.seconds, "rollout/tokens_per_s": sampled / max(played.seconds, 1e-9)}
    return pace | {f"endpoint/{name}": float(count) for name, count in sampler.counts.items()}


def open_store(directories: Path | Sequence[Path], isolation: str, split: Split = "train") -> TaskPool:
    """The tasks of a split of one store or several as a pool; a task's family is its domain."""
    return pool_of(open_tasks(directories, isolation, split))


def pool_of(tasks: TaskSet) -> TaskPool:
    return TaskPool(tasks.by_domain, tasks.open, tasks.sources, tasks.settings)
