"""Speciale's recipe: its settings, its domains, its judges, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rorqual.config import load
from rorqual.engine import EngineConfig
from rorqual.errors import FieldErrors, UserError
from rorqual.parallel.world import World
from rorqual.rewards.domains import DomainReward, RewardConfig
from rorqual.rewards.labelling import LabelConfig
from rorqual.rollout.agent import AgentConfig
from rorqual.rollout.collect import GroupConfig
from rorqual.rollout.speaker import ChatMode
from rorqual.runlog import RunLog
from rorqual.stages import grpo, sft, speciale
from rorqual.stages.proof_pool import JudgeConfig, open_judges, proof_pool
from rorqual.stages.sampling import AttemptConfig
from rorqual.stages.task_set import open_tasks
from rorqual.train.loop import Pace, Site
from rorqual.train.optimizer import OptimizerConfig
from rorqual.train.policy_step import DomainObjective, PolicyConfig
from tests.proof_world import store

CPU = torch.device("cpu")
ENGINE = EngineConfig(block_size=16, cache_tokens=4096)
AGENT = AgentConfig(max_turns=1, max_turn_tokens=40, window=200)
RL = grpo.Config(
    pace=Pace(steps=1, checkpoint_every=1),
    prompts=2,
    groups=GroupConfig(3),
    agent=AGENT,
    mode=ChatMode(thinking=False),
    optimizer=OptimizerConfig(learning_rate=0.003, schedule="constant", weight_decay=0.0),
    engine=replace(ENGINE, record_selection=True),
    policy=PolicyConfig(default=DomainObjective(beta=0.0)),
)
CONFIG = speciale.Config(
    iterations=2,
    verifier=RL,
    generator=RL,
    reasoning=replace(RL, rewards=RewardConfig(default=DomainReward(length=0.4))),
    domains=("proof", "verification"),
    judges=JudgeConfig(verifier="program", meta_verifier="program", words="brief", max_tokens=40, thinking=False),
    labels=LabelConfig(analyses=2, checks=1, needed=1, words="brief"),
    data=speciale.DataConfig(tasks=3, attempts=AttemptConfig(GroupConfig(4), AGENT, engine=ENGINE), kept_from=0.2),
    merge=sft.Config(epochs=1, rows=2, length=128, held_out_share=0.0),
)


@pytest.fixture(scope="module")
def task_set(tmp_path_factory):
    return open_tasks(store(tmp_path_factory.mktemp("tasks")), "inline", "all")


def site(directory: Path) -> Site:
    return Site(directory, World(0, 1, CPU), RunLog(directory, quiet=True))


def test_the_shipped_recipe_is_one():
    config = load(speciale.Config, "speciale", table="speciale")
    assert config.iterations == 2 and config.reasoning is not None and config.labels is not None
    standard = config.reasoning.rewards
    assert speciale.reduced(standard, config.length_share).default.length == pytest.approx(0.1 * standard.default.length)


def test_the_length_penalty_is_reduced_and_nothing_else():
    given = RewardConfig(DomainReward(length=0.5), {"maths": DomainReward(length=0.25, outcome=2.0)})
    found = speciale.reduced(given, 0.25)
    assert found == RewardConfig(DomainReward(length=0.125), {"maths": DomainReward(length=0.0625, outcome=2.0)})
    own = speciale.with_proof_rewards(grpo.Config()).rewards
    assert own.of("proof") == own.of("verification") == DomainReward(1.0, 0.0, 0.0, 0.0) and own.of("maths") == DomainReward()


def test_roles_are_domains_of_their_own_and_a_missing_one_is_named(task_set):
    with open_judges(CONFIG.judges, None, CPU) as judges:
        pool = proof_pool(task_set, judges, ("proof", "verification", "meta_verification"))
        assert {domain: len(ids) for domain, ids in pool.by_domain.items()} == {
            "proof": 3, "verification": 6, "meta_verification": 6,
        }  # fmt: skip
        with pytest.raises(UserError, match=r"no task .* for maths"):
            proof_pool(task_set, judges, ("proof", "maths"))


def test_judges_that_are_nothing_are_refused_by_name():
    with pytest.raises(UserError, match="nowhere"), open_judges(JudgeConfig(verifier="nowhere"), None, CPU):
        pass
    with pytest.raises(FieldErrors, match="tries"):
        JudgeConfig(tries=0)
