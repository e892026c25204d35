"""On-policy distillation from several teachers: the student's own attempts, each token judged by its domain's specialist.

    tasks -> the student attempts them in each teacher's mode -> the teachers' distributions there -> reverse KL -> again

No reward and no verifier is needed; success is measured all the same. The objective is rorqual/train/distillation.py's, exact
over the vocabulary, or estimated from the sampled tokens alone. Attempts are archived as in `grpo`, so that a killed run plays
none twice and trains none twice.
"""

from __future__ import annotations

import asyncio
import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rorqual.chat import Tokenizer
from rorqual.engine import Engine, EngineConfig
from rorqual.engine.service import EngineService
from rorqual.errors import UserError, require
from rorqual.model.transformer import Transformer
from rorqual.model.weights import load_model
from rorqual.parallel.apply import ComputeConfig, parallelize, whole_state
from rorqual.policy import SamplingParams
from rorqual.rollout.agent import AgentConfig, speaker_of
from rorqual.rollout.archive import Archive
from rorqual.rollout.collect import GroupConfig, collect
from rorqual.rollout.speaker import ChatMode
from rorqual.rollout.trajectory import Trajectory, samples
from rorqual.stages.grpo import SamplingConfig, TaskPool, number_of, pool_of
from rorqual.stages.specialists import Specialist
from rorqual.stages.task_set import TaskSet
from rorqual.train.distillation import DistillationObjective, distillation_step, scored_by, taught
from rorqual.train.export import open_model, publish_model
from rorqual.train.lineage import Making
from rorqual.train.loop import Pace, Site, run_steps
from rorqual.train.optimizer import Optimizer, OptimizerConfig, learning_rate
from rorqual.train.policy_step import DomainObjective, PolicyConfig, PolicyObjective, Prepared, policy_step
from rorqual.train.samples import BatchLimits, Item, ReplayConfig, blank_item
from rorqual.train.setup import begin, training_tensors

Attempt = tuple[str, Trajectory]
"""A teacher's name, and the student's attempt in its mode."""


@dataclass(frozen=True)
class Config:
    pace: Pace = field(default_factory=lambda: Pace(steps=100, checkpoint_every=5))
    prompts: int = 16
    """Tasks of a step, of all ranks together, each played in the mode of every teacher of its domain."""
    groups: GroupConfig = field(default_factory=lambda: GroupConfig(size=1))
    agent: AgentConfig = field(default_factory=AgentConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    estimator: Literal["vocabulary", "sampled"] = "vocabulary"
    """vocabulary: the KL over all tokens at each position; sampled: its unbiased estimate from the sampled one."""
    domain_weights: Mapping[str, float] = field(default_factory=dict)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-5, schedule="constant", weight_decay=0.0)
    )
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(record_selection=True))
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    limits: BatchLimits = field(default_factory=BatchLimits)
    index_weight: float = 1.0
    """Of the restricted indexer loss; 0 freezes the indexers."""
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            self,
            prompts=(self.prompts >= 1, "at least 1"),
            index_weight=(self.index_weight >= 0, "at least 0"),
            sampling=(
                self.estimator == "sampled" or (self.sampling.top_p == 1 and self.sampling.top_k == 0),
                "no truncation (top_p 1, top_k 0): the divergence over the vocabulary is that of whole distributions",
            ),
        )

    @property
    def policy(self) -> PolicyConfig:
        """The sampled estimator is GRPO's KL term alone, with a teacher as the reference."""
        only_kl = DomainObjective(beta=1.0, off_policy_delta=None)
        return PolicyConfig(
            kl="unbiased", reduction="token", default=only_kl, replay=self.replay, index_weight=self.index_weight,
            limits=self.limits,
        )  # fmt: skip


def main(config: Config, init: Path, teachers: Sequence[Specialist], tasks: TaskSet, site: Site) -> Path:
    """Train the checkpoint `init` towards the teachers; the finished checkpoint's directory."""
    begin(config, site, init)
    final = site.directory / "model"
    if final.is_dir():
        return final
    tokenizer, device = Tokenizer.open(init), site.world.device
    pool = pool_of(tasks.of(sorted({teacher.domain for teacher in teachers})))
    model = open_model(init)
    minds = {teacher.name: _teacher(teacher, model, config).to(device) for teacher in teachers}
    sampler = Engine(copy.deepcopy(model).eval().requires_grad_(False).to(device), config.engine)
    model = model.to(device)
    exact = config.estimator == "vocabulary"
    objective = DistillationObjective(model, config.index_weight) if exact else PolicyObjective(model, config.policy)
    parallelize(objective, model, site.world, config.compute)
    optimizer = Optimizer(model, config.optimizer)
    rollouts = site.directory / "rollouts"

    def one_step(step: int) -> dict[str, float]:
        sampler.update_weights(whole_state(model).items(), version=step)
        played = asyncio.run(_rollout(config, step, sampler, tokenizer, teachers, pool, rollouts, site))
        metrics = _measured(played)
        by_teacher = _items(played)
        rate = learning_rate(config.optimizer, step, config.pace.steps)
        if isinstance(objective, DistillationObjective):
            parts = [
                p for n, items in by_teacher.items() for p in taught(items, minds[n], config.limits, config.replay, site.world)
            ]
            blank = next(iter(minds.values()))
            parts = parts or taught([blank_item(model.config)], blank, config.limits, config.replay, site.world)
            metrics |= distillation_step(objective, optimizer, parts, site.world, rate)
        else:
            metrics |= _sampled_step(objective, optimizer, by_teacher, minds, config, site, rate)
        _forget(rollouts, step, config.pace)
        return metrics

    run_steps("on-policy distillation", config.pace, one_step, optimizer, training_tensors(model, optimizer), site)
    parents = {"init": init} | {f"specialist {t.name}": t.model for t in teachers} | dict(tasks.sources)
    making = Making("on_policy", config, parents, tasks.settings)
    return publish_model(model, final, config.compute.save_dtype, init, making, site.world)


def _teacher(teacher: Specialist, student: Transformer, config: Config) -> Transformer:
    model = load_model(teacher.model, "float32").requires_grad_(False)
    if model.config.vocab_size != student.config.vocab_size:
        raise UserError(
            f"{teacher.model}: has {model.config.vocab_size} tokens, the student {student.config.vocab_size}; "
            "reverse KL needs one vocabulary"
        )
    return model.eval()


def _sampled_step(objective, optimizer, by_teacher, minds, config: Config, site: Site, rate: float) -> dict[str, float]:
    """The estimator from sampled tokens: the KL term of GRPO with each teacher as the reference of its domain."""
    parts: list[Prepared] = []
    for name, items in by_teacher.items():
        parts += scored_by(items, minds[name], config.limits, config.replay, site.world)
    found = policy_step(objective, optimizer, parts, site.world, rate)
    return found | {"train/reverse_kl": found["train/kl"]}


async def _rollout(
    config: Config, step: int, engine: Engine, tokenizer: Tokenizer, teachers: Sequence[Specialist], pool: TaskPool,
    rollouts: Path, site: Site,
) -> list[Attempt]:  # fmt: skip
    """This rank's attempts of the step, each with the teacher whose mode it was played in."""
    world, seed = site.world, number_of(f"{config.seed}/{step}")
    drawn = pool.draw(config.prompts, config.domain_weights, f"{config.seed}/{step}/tasks")[world.rank :: world.size]
    params = SamplingParams(
        max_tokens=config.agent.max_turn_tokens, temperature=config.sampling.temperature, top_p=config.sampling.top_p,
        top_k=config.sampling.top_k, record_kept_tokens=True, record_routed_experts=config.replay.routing,
        record_selected_indices=config.replay.selection,
    )  # fmt: skip
    found: list[Attempt] = []
    async with EngineService(engine, max_waiting=max(len(drawn) * config.groups.size, 256)) as service:
        for teacher in teachers:
            mine = [name for name in drawn if pool.domain_of(name) == teacher.domain]
            groups = await collect(
                mine, pool.open_episode, speaker_of(service, tokenizer, ChatMode(teacher.thinking)), config.groups,
                config.agent, params, seed, Archive(rollouts / f"{step:08d}" / teacher.name),
            )  # fmt: skip
            found += [(teacher.name, trajectory) for group in groups for trajectory in group]
    return found


def _items(played: Sequence[Attempt]) -> dict[str, list[Item]]:
    """teacher -> samples. There is no advantage: every attempt teaches, won or lost."""
    found: dict[str, list[Item]] = {}
    for number, (name, trajectory) in enumerate(played):
        found.setdefault(name, []).extend(Item(sample, 0.0, number) for sample in samples(trajectory))
    return {name: items for name, items in found.items() if items}


def _measured(played: Sequence[Attempt]) -> dict[str, float]:
    def rate(attempts: Sequence[Trajectory]) -> float:
        return sum(bool(t.verdict and t.verdict.passed) for t in attempts) / max(len(attempts), 1)

    names = dict.fromkeys(name for name, _ in played)
    by_name = {f"rollout/success/{name}": rate([t for owner, t in played if owner == name]) for name in names}
    return {"rollout/success": rate([t for _, t in played]), **by_name}


def _forget(rollouts: Path, step: int, pace: Pace) -> None:
    """Attempts go once a checkpoint holds what was learnt from them."""
    for old in rollouts.glob("[0-9]*"):
        if int(old.name) < step - 2 * pace.checkpoint_every:
            shutil.rmtree(old, ignore_errors=True)
