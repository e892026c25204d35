"""From played groups to what an optimiser step learns from: rewards, advantages, mini-batches, and figures about all of them.

Every number belongs to the iteration, not to the rank that computes it: N processes learn what one would.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from rorqual.parallel.world import World
from rorqual.rewards.advantages import group_advantages
from rorqual.rewards.domains import Reward, reward
from rorqual.rollout.trajectory import End, Trajectory, samples
from rorqual.train.samples import Item

if TYPE_CHECKING:
    from rorqual.stages.grpo import Config, TaskPool

Sums = dict[str, tuple[float, float]]
"""Name -> (sum, count)."""


def learnable(
    groups: Sequence[Sequence[Trajectory]], tasks: TaskPool, config: Config, step: int, world: World | None = None
) -> tuple[list[Item], dict[str, float]]:
    """This rank's items with advantages, and what all ranks' rollouts were like. Attempts without a reward teach nothing; flat
    groups teach the policy nothing. An item's trajectory is its place in the iteration."""
    rank, size = (world.rank, world.size) if world else (0, 1)
    items: list[Item] = []
    measured: Sums = {}
    for index, group in zip(range(rank, rank + size * len(groups), size), groups, strict=True):
        domain = tasks.domain_of(group[0].task_id)
        found = [rewarded(trajectory, config, domain) for trajectory in group]
        values = [each.value for each in found]
        if config.shuffle_rewards:
            random.Random(f"{config.seed}/{step}/{index}").shuffle(values)
        compared = group_advantages(values, config.advantages)
        _add(measured, _figures(group, found, compared.is_flat, domain, step))
        if compared.is_flat and config.advantages.skip_flat:
            continue
        for place, (trajectory, advantage) in enumerate(zip(group, compared.advantages, strict=True)):
            if advantage is not None:
                number = index * len(group) + place
                items += [Item(sample, advantage, number, domain) for sample in samples(trajectory)]
    _add(measured, [("rollout/samples", float(len(items)))])
    return items, _means(gathered(measured, world))


def rewarded(trajectory: Trajectory, config: Config, domain: str) -> Reward:
    """The reward; one that raises, or is no number, is an attempt without a reward, with the reason, and harms no sibling."""
    try:
        found = reward(trajectory, config.rewards.of(domain))
    except Exception as error:
        return Reward(None, {}, f"the reward raised {type(error).__name__}: {error}")
    if found.value is not None and not math.isfinite(found.value):
        return Reward(None, {}, f"the reward is {found.value}")
    return found


def mini_batches(items: Sequence[Item], count: int, seed: str, trajectories: int | None = None) -> list[list[Item]]:
    """Whole trajectories dealt into `count` mini-batches, in an order that the seed gives.

    trajectories: of all ranks together; each rank then has its part of each mini-batch, which may be empty. None: these are all.
    """
    order = sorted({item.trajectory for item in items}) if trajectories is None else list(range(trajectories))
    random.Random(seed).shuffle(order)
    dealt = [set(order[index::count]) for index in range(count)]
    batches = [[item for item in items if item.trajectory in mine] for mine in dealt]
    return batches if trajectories is not None else [batch for batch in batches if batch]


def gathered(measured: Sums, world: World | None) -> Sums:
    """The sums of all ranks."""
    if world is None or world.size == 1:
        return measured
    parts: list[Any] = [None] * world.size
    dist.all_gather_object(parts, measured)
    whole: Sums = {}
    for name in sorted({name for part in parts for name in part}):
        own = [part[name] for part in parts if name in part]
        whole[name] = (sum(total for total, _ in own), sum(count for _, count in own))
    return whole


SUMMED = {"rollout/samples"}


def _means(measured: Sums) -> dict[str, float]:
    return {name: total if name in SUMMED else total / count for name, (total, count) in measured.items() if count}


def _add(measured: Sums, figures: Iterable[tuple[str, float]]) -> None:
    for name, value in figures:
        total, count = measured.get(name, (0.0, 0.0))
        measured[name] = (total + value, count + 1)


def _figures(
    group: Sequence[Trajectory], found: Sequence[Reward], is_flat: bool, domain: str, step: int
) -> Iterable[tuple[str, float]]:
    yield "rollout/flat_groups", float(is_flat)
    for trajectory, each in zip(group, found, strict=True):
        passed = float(trajectory.verdict.passed if trajectory.verdict else False)
        yield "rollout/success", passed
        yield f"rollout/success/{domain}", passed
        yield "rollout/no_reward", float(each.value is None)
        yield "rollout/steps", float(trajectory.steps)
        yield "rollout/sampled_tokens", float(trajectory.sampled_tokens)
        yield "rollout/answered", float(trajectory.answered)
        yield "rollout/empty", float(trajectory.sampled_tokens == 0)
        yield from ((f"rollout/end/{end}", float(trajectory.end is end)) for end in End)
        oldest = trajectory.policy_versions[0]
        if oldest >= 0:
            yield "rollout/staleness", float(step - oldest)
        if each.value is not None:
            yield "reward/mean", each.value
            yield from ((f"reward/{name}", value) for name, value in each.terms.items())


def averaged(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of an iteration's optimiser steps: their means, and of a maximum the largest."""
    names = {name for update in updates for name in update}
    found = {}
    for name in sorted(names):
        values = [update[name] for update in updates if name in update]
        found[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    return found
