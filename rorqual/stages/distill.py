"""Distillation [V3.2, 3.1]: what the specialists can do, in one model.

    data       specialists attempt their domains' tasks -> verifiers and rewards filter -> one model is fine-tuned on the mixture
    on_policy  the student attempts them itself, and at every token moves towards its domain's specialist (reverse KL)

The former is the paper's ("data distillation, not weight averaging"); the latter is an option. Both leave one checkpoint.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rorqual.data.accepted import Accepted, read_given, trained_messages, write_accepted
from rorqual.errors import UserError, require
from rorqual.rewards.domains import RewardConfig, reward
from rorqual.rollout.trajectory import Trajectory
from rorqual.stages import on_policy, sft
from rorqual.stages.sampling import AttemptConfig, attempts
from rorqual.stages.specialists import Specialist, read_specialists
from rorqual.stages.task_set import TaskSet
from rorqual.train.lineage import Making, publish
from rorqual.train.loop import Site
from rorqual.train.setup import begin

DATA = "data"


@dataclass(frozen=True)
class Config:
    method: Literal["data", "on_policy"] = "data"
    attempts: AttemptConfig = field(default_factory=AttemptConfig)
    tasks_per_domain: int | None = None
    """Tasks that a specialist attempts; None: all."""
    rewards: RewardConfig = field(default_factory=RewardConfig)
    least_reward: float | None = None
    """Accepted attempts also reach this reward; None: the verifier's word is enough."""
    kept_per_task: int = 1
    """Of the accepted attempts at one task: those of highest reward, then the shortest."""
    most_per_specialist: int | None = None
    """Conversations, so that no domain drowns the others; None: all that were accepted."""
    merge_given: tuple[Path, ...] = ()
    """Files of conversations that are trained on along with the rest, such as the cold start's."""
    sft: sft.Config = field(default_factory=sft.Config)
    on_policy: on_policy.Config = field(default_factory=on_policy.Config)
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            self,
            kept_per_task=(self.kept_per_task >= 1, "at least 1"),
            tasks_per_domain=((self.tasks_per_domain or 1) >= 1, "at least 1, or none"),
            most_per_specialist=((self.most_per_specialist or 1) >= 1, "at least 1, or none"),
        )


def main(config: Config, init: Path, specialists: Path, tasks: TaskSet, site: Site) -> Path:
    """Train `init` towards the specialists in a directory that `rorqual specialists` made; the checkpoint's directory."""
    begin(config, site, init)
    teachers = read_specialists(specialists)
    if config.method == "on_policy":
        return on_policy.main(config.on_policy, init, teachers, tasks, site.below("on-policy"))
    data = conversations(config, teachers, tasks, site)
    return sft.main(config.sft, init, data / sft.CONVERSATIONS, site.below("sft"))


def conversations(config: Config, teachers: Sequence[Specialist], tasks: TaskSet, site: Site) -> Path:
    """The directory of the mixture, with its lineage; made once."""
    final = site.directory / DATA
    if not final.is_dir():
        rows = [row for teacher in teachers for row in _of(config, teacher, tasks, site)]
        given = [record for path in config.merge_given for record in read_given(path)]
        if not rows:
            raise UserError(f"{site.directory}: no attempt of any specialist was accepted; train them longer, or lower the bar")
        if site.world.is_main:
            part = final.with_name(f".{DATA}.made")
            site.log.event("conversations made", **write_accepted(part / sft.CONVERSATIONS, rows, given))
            parents = {f"specialist {t.name}": t.model for t in teachers} | dict(tasks.sources)
            parents |= {f"given {n}": path for n, path in enumerate(config.merge_given)}
            publish(part, final, Making("distill", config, parents, tasks.settings))
        site.world.barrier()
    return final


def _of(config: Config, teacher: Specialist, tasks: TaskSet, site: Site) -> list[Accepted]:
    """The accepted attempts of one specialist on its domain."""
    own = tasks.of([teacher.domain])
    groups = attempts(
        config.attempts, teacher.model, own.by_domain[teacher.domain][: config.tasks_per_domain], own.open, teacher.thinking,
        site.directory / "attempts" / teacher.name, config.seed, site,
    )  # fmt: skip
    rows = [row for group in groups for row in accepted(config, teacher, group, own)]
    if config.most_per_specialist is not None and len(rows) > config.most_per_specialist:
        chosen = set(random.Random(f"{config.seed}/{teacher.name}").sample(range(len(rows)), config.most_per_specialist))
        rows = [row for n, row in enumerate(rows) if n in chosen]
    played = [t for group in groups for t in group]
    passed = sum(bool(t.verdict and t.verdict.passed) for t in played)
    site.log.event(
        "attempts", specialist=teacher.name, played=len(played), passed=passed, kept=len(rows),
        ends=dict(Counter(str(t.end) for t in played)),
    )  # fmt: skip
    return rows


def accepted(config: Config, teacher: Specialist, group: Sequence[Trajectory], tasks: TaskSet) -> list[Accepted]:
    """Rejection sampling: what the verifier passed and the reward deems good enough, best first."""
    settings = config.rewards.of(teacher.domain)
    scored = [(reward(t, settings).value, t) for t in group if t.answered and t.verdict is not None and t.verdict.passed]
    kept = [(v, t) for v, t in scored if v is not None and (config.least_reward is None or v >= config.least_reward)]
    kept.sort(key=lambda pair: (-pair[0], pair[1].sampled_tokens, pair[1].sample))
    return [_row(teacher, value, trajectory, tasks) for value, trajectory in kept[: config.kept_per_task]]


def _row(teacher: Specialist, value: float, trajectory: Trajectory, tasks: TaskSet) -> Accepted:
    task = tasks.tasks[trajectory.task_id]
    return Accepted(
        trained_messages(trajectory.messages), task.tools, teacher.thinking, "sampled", task.family, teacher.mode, task.id,
        trajectory.sample, value, teacher.name,
    )  # fmt: skip
