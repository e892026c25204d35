"""Speciale [V3.2, 3.4; DeepSeekMath-V2]: RL on reasoning data only, with a reduced length penalty and rewards for proofs.

    each iteration   verifier    GRPO on verification and meta-verification: R_V, R_meta by the verifier of the iteration before
                     generator   GRPO on proofs, begun from the verifier and judged by it, frozen
                     labels      proofs by the generator, labelled by majority, join the verification tasks
                     merge       rejection fine-tuning on what both do well: where the next verifier begins
    then             reasoning   GRPO on reasoning data and proofs, from the checkpoint given, the last verifier judging

No task has tools. Each part is a stage in a directory of its own, and is skipped when it has finished.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from rorqual.data.accepted import Accepted, trained_messages, write_accepted
from rorqual.errors import UserError, require
from rorqual.policy import SamplingParams
from rorqual.rewards.domains import DomainReward, RewardConfig
from rorqual.rewards.labelling import Label, LabelConfig, label
from rorqual.rewards.proof_judges import Judges
from rorqual.rollout.trajectory import Trajectory
from rorqual.stages import grpo, sft
from rorqual.stages.proof_pool import DOMAINS, PROOF_REWARD, JudgeConfig, open_judges, proof_pool
from rorqual.stages.sampling import AttemptConfig, attempts
from rorqual.stages.task_set import TaskSet, open_tasks
from rorqual.tasks import Store, TaskRow, task_record
from rorqual.tasks.derivations import check, score_of
from rorqual.tasks.proof_tasks import DERIVATION, Role, proof_task
from rorqual.tasks.proofs import Proof, read_proof
from rorqual.train.loop import Site
from rorqual.train.setup import begin

REASONING = ("maths", "logic", "programming")
PROOF, VERIFICATION, META_VERIFICATION = DOMAINS.values()


@dataclass(frozen=True)
class DataConfig:
    """Attempts between the iterations: proofs to label, and what the merged checkpoint is fine-tuned on."""

    tasks: int = 256
    """Of each domain, the first so many."""
    attempts: AttemptConfig = field(default_factory=AttemptConfig)
    kept_from: float = 1.0
    """An attempt with at least this reward is trained on in the merge; the best of each task."""


@dataclass(frozen=True)
class Config:
    iterations: int = 1
    """Of verifier and generator; 0 goes straight to reasoning, with judges that are given."""
    verifier: grpo.Config = field(default_factory=grpo.Config)
    generator: grpo.Config = field(default_factory=grpo.Config)
    reasoning: grpo.Config | None = field(default_factory=grpo.Config)
    """None ends with the last generator."""
    domains: tuple[str, ...] = (*REASONING, PROOF)
    """Of the reasoning stage."""
    length_share: float = 0.1
    """What is left of the standard recipe's length penalty in the reasoning stage; the paper says it is reduced, not to what."""
    judges: JudgeConfig = field(default_factory=JudgeConfig)
    labels: LabelConfig | None = field(default_factory=LabelConfig)
    """None: no automatic labels."""
    data: DataConfig = field(default_factory=DataConfig)
    merge: sft.Config | None = field(default_factory=sft.Config)
    """None: the next verifier begins from the last generator."""
    begin_reasoning_from: Literal["init", "generator"] = "init"
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            self,
            iterations=(self.iterations >= 0, "at least 0"),
            length_share=(0 <= self.length_share <= 1, "in [0, 1]"),
            domains=(bool(self.domains), "at least one domain"),
        )


def main(config: Config, init: Path, tasks: TaskSet, site: Site) -> Path:
    """Train `init` by the recipe; the finished checkpoint's directory. tasks: of the reasoning families and of proofs."""
    begin(config, site, init)
    _refuse_tools(tasks, config)
    verifier: Path | None = None
    start = generator = init
    for number in range(1, config.iterations + 1):
        verifier = _verifier(config, start, verifier, tasks, number, site)
        generator = _generator(config, verifier, tasks, number, site)
        if number < config.iterations:
            tasks = _labelled(config, generator, verifier, tasks, number, site)
            start = _merged(config, init, generator, verifier, tasks, number, site)
    if config.reasoning is None:
        return generator
    return _reasoning(config, init if config.begin_reasoning_from == "init" else generator, verifier, tasks, site)


def reduced(rewards: RewardConfig, share: float) -> RewardConfig:
    """The rewards with every length penalty at `share` of its weight."""

    def of(domain: DomainReward) -> DomainReward:
        return replace(domain, length=domain.length * share)

    return RewardConfig(of(rewards.default), {name: of(domain) for name, domain in rewards.by_domain.items()})


def with_proof_rewards(config: grpo.Config) -> grpo.Config:
    """The roles of proofs rewarded by their verdict alone, where the config does not say otherwise."""
    own = {**dict.fromkeys(DOMAINS.values(), PROOF_REWARD), **config.rewards.by_domain}
    return replace(config, rewards=replace(config.rewards, by_domain=own))


def _verifier(config: Config, start: Path, before: Path | None, tasks: TaskSet, number: int, site: Site) -> Path:
    place = _below(site, number, "verifier")
    with open_judges(config.judges, before, site.world.device) as judges:
        pool = proof_pool(tasks, judges, (VERIFICATION, META_VERIFICATION), config.judges, before)
        return grpo.main(with_proof_rewards(config.verifier), start, pool, place)


def _generator(config: Config, verifier: Path, tasks: TaskSet, number: int, site: Site) -> Path:
    place = _below(site, number, "generator")
    with open_judges(config.judges, verifier, site.world.device) as judges:
        pool = proof_pool(tasks, judges, (PROOF,), config.judges, verifier)
        return grpo.main(with_proof_rewards(config.generator), verifier, pool, place)


def _reasoning(config: Config, start: Path, verifier: Path | None, tasks: TaskSet, site: Site) -> Path:
    place = site.below("reasoning")
    assert config.reasoning is not None
    stage = replace(config.reasoning, rewards=reduced(config.reasoning.rewards, config.length_share))
    with open_judges(config.judges, verifier, site.world.device) as judges:
        pool = proof_pool(tasks, judges, config.domains, config.judges, verifier)
        return grpo.main(with_proof_rewards(stage), start, pool, place)


def _refuse_tools(tasks: TaskSet, config: Config) -> None:
    """Reasoning data only [V3.2, 3.4]."""
    with_tools = sorted({task.family for task in tasks.tasks.values() if task.tools and task.family in config.domains})
    if with_tools:
        raise UserError(f"Speciale learns from reasoning data only: {', '.join(with_tools)} has tools; leave it out of domains")


# --- between the iterations


def _labelled(config: Config, generator: Path, verifier: Path, tasks: TaskSet, number: int, site: Site) -> TaskSet:
    """The tasks with more to verify: the generator's proofs, labelled by the verifier in both of its roles."""
    if config.labels is None:
        return tasks
    place = _below(site, number, "labels")
    store = Store(place.directory / "tasks")
    if not store.is_sealed:
        played = _attempts(config, generator, verifier, tasks, PROOF, place)
        if site.world.is_main:
            with open_judges(config.judges, verifier, site.world.device) as judges:
                labels = asyncio.run(_labels(config, judges, played, tasks))
            _store(store, labels, tasks, config, place)
    site.world.barrier()
    more = [*tasks.sources.values(), store.directory] if store.tasks() else list(tasks.sources.values())
    judge = tasks.judge.config if tasks.judge else None
    return open_tasks(more, tasks.isolation, tasks.split, judge)  # type: ignore[arg-type]


Labelled = list[tuple[str, str, Label]]
"""(id of the task that asked for the proof, the proof, its label)."""


async def _labels(config: Config, judges: Judges, played: Iterable[Trajectory], tasks: TaskSet) -> Labelled:
    assert config.labels is not None and judges.verifier is not None
    meta = judges.meta_verifier or judges.verifier
    params = SamplingParams(config.judges.max_tokens, config.judges.temperature, seed=config.seed)
    found: Labelled = []
    for trajectory in played:
        proof = read_proof(trajectory.turns[-1].message.get("content")) if trajectory.turns else None
        if isinstance(proof, Proof):
            problem, name = tasks.tasks[trajectory.task_id].payload["problem"], f"{trajectory.task_id}/{trajectory.sample}"
            given = await label(problem, proof.solution, judges.verifier, meta, config.labels, params, name)
            found.append((trajectory.task_id, proof.solution, given))
    return found


def _store(store: Store, labels: Labelled, tasks: TaskSet, config: Config, site: Site) -> None:
    """Labelled proofs as tasks, and in the log what became of each; in the formal system, how many labels are the true ones."""
    grounds: dict[str, int] = {}
    kept = right = exact = 0
    for number, (task_id, solution, given) in enumerate(labels):
        grounds[given.ground] = grounds.get(given.ground, 0) + 1
        if given.score is None:
            continue
        asked = tasks.tasks[task_id].payload
        payload = {"problem": asked["problem"], "solution": solution, "score": given.score}
        store.append(task_record(TaskRow(proof_task(Role.VERIFY, payload, config.judges.words)), (number,)))
        kept += 1
        if asked.get("system") == DERIVATION:
            exact, right = exact + 1, right + (given.score == score_of(check(asked["problem"], solution)))
    store.seal({"labelled": kept})
    site.log.event("labelled", proofs=len(labels), kept=kept, grounds=grounds, checked=exact, right=right)


def _merged(config: Config, init: Path, generator: Path, verifier: Path, tasks: TaskSet, number: int, site: Site) -> Path:
    """One checkpoint that proves and verifies: `init` fine-tuned on the best attempts of both."""
    if config.merge is None:
        return generator
    place = _below(site, number, "merge")
    data = place.directory / sft.CONVERSATIONS
    if not data.exists():
        rows = [
            row
            for model, domain in ((generator, PROOF), (verifier, VERIFICATION), (verifier, META_VERIFICATION))
            for row in _accepted(_attempts(config, model, verifier, tasks, domain, place), tasks, config, domain)
        ]
        if not rows:
            raise UserError(f"{place.directory}: no attempt was good enough to merge; lower data.kept_from, or set merge=none")
        if site.world.is_main:
            write_accepted(data, rows)
        site.world.barrier()
    return sft.main(config.merge, init, data, place)


def _attempts(
    config: Config, model: Path, verifier: Path, tasks: TaskSet, domain: str, place: Site
) -> list[Trajectory]:  # fmt: skip
    with open_judges(config.judges, verifier, place.world.device) as judges:
        pool = proof_pool(tasks, judges, (domain,))
        ids = list(pool.by_domain[domain])[: config.data.tasks]
        archive = place.directory / "attempts" / domain
        groups = attempts(
            config.data.attempts, model, ids, pool.open_episode, config.generator.mode.thinking, archive, config.seed, place
        )
    return [trajectory for group in groups for trajectory in group]


def _accepted(played: Iterable[Trajectory], tasks: TaskSet, config: Config, domain: str) -> list[Accepted]:
    """The best attempt at each task, where its reward is high enough."""
    best: dict[str, Trajectory] = {}
    for each in played:
        score = each.verdict.score if each.verdict and each.answered else None
        if score is not None and score >= config.data.kept_from and score > _score(best.get(each.task_id)):
            best[each.task_id] = each
    thinking = config.generator.mode.thinking
    return [
        Accepted(
            trained_messages(each.messages), (), thinking, "sampled", domain, "reasoning", each.task_id, each.sample, _score(each)
        )
        for each in best.values()
    ]


def _score(trajectory: Trajectory | None) -> float:
    verdict = trajectory.verdict if trajectory else None
    return -1.0 if verdict is None or verdict.score is None else verdict.score


def _below(site: Site, number: int, name: str) -> Site:
    return site.below(f"iteration-{number}/{name}")
