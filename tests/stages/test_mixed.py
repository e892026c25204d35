"""One RL stage over several domains: beta, delta, rewards and sampling weights belong to a domain, all the way through."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rorqual.config import dump, load
from rorqual.rewards.domains import DomainReward, RewardConfig
from rorqual.rollout.archive import Archive
from rorqual.runlog import read_metrics
from rorqual.stages import grpo
from rorqual.stages.task_set import open_tasks
from rorqual.train import policy_step
from rorqual.train.loop import Pace
from rorqual.train.policy_step import DomainObjective, PolicyConfig
from tests.rewards.test_judging import CONFIG as JUDGE
from tests.stages.test_grpo import CONFIG, LETTERS
from tests.stages.test_specialists import ASKED, RIGHT, make_model, make_store, site

STILL = DomainReward(outcome=0.0, format=0.0, length=0.0, language=0.0)
SHORT = replace(CONFIG, pace=Pace(steps=8), policy=PolicyConfig(default=DomainObjective(beta=0.0, off_policy_delta=None)))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    return make_model(root / "init", dict.fromkeys(ASKED, LETTERS)), make_store(root / "tasks")


def train(config, given, directory, tasks=None):
    tasks = tasks or open_tasks(given[1], "inline", "all")
    grpo.main(config, given[0], grpo.pool_of(tasks), site(directory))
    return directory


def ends(directory, name):
    found = [value for _, value in read_metrics(directory, name)]
    return sum(found[:2]) / 2, sum(found[-2:]) / 2


def test_a_domain_s_reward_is_its_own(given, tmp_path):
    """One domain's reward is constant: its groups are flat, and only the other is learnt."""
    run = train(replace(SHORT, rewards=RewardConfig(by_domain={"maths": STILL})), given, tmp_path)
    before, after = ends(run, "rollout/success/logic")
    assert after > before + 0.25
    flat = [value for _, value in read_metrics(run, "rollout/flat_groups")]
    assert min(flat) >= 0.25, "every group of the constant reward is flat"


def test_a_domain_s_beta_and_delta_reach_the_loss_as_its_own():
    """The loss that a step takes of a batch of two domains, against the paper's formula written out for each sample."""
    generator = torch.Generator().manual_seed(0)
    trainer, sampler, reference = -torch.rand(3, 4, 5, generator=generator, dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)
    drift = float((sampler - trainer)[3].mean())
    by_domain = {"a": DomainObjective(beta=2.0, off_policy_delta=None), "b": DomainObjective(0.0, drift - 1e-6)}
    config = PolicyConfig(by_domain=by_domain)
    batch = SimpleNamespace(
        domains=("a", "a", "b", "b"), tokens=torch.zeros(4, 6), sampler_logprobs=sampler, advantages=advantages,
        mask=torch.ones(4, 5, dtype=torch.bool), trajectories=torch.arange(4),
    )  # fmt: skip
    loss, _ = policy_step._loss(batch, SimpleNamespace(logprobs=trainer), reference, config, torch.tensor(4.0))
    ratio, x = (trainer - sampler).exp(), (reference - trainer).exp()
    policy = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None]).mean(1)
    kl = (ratio * (x - x.log() - 1)).mean(1)
    masked = torch.tensor([1.0, 1.0, 1.0, 0.0])
    betas = torch.tensor([2.0, 2.0, 0.0, 0.0])
    assert torch.allclose(loss, (-policy * masked + betas * kl).mean(), atol=1e-12)


@pytest.mark.slow
def test_a_domain_s_delta_masks_its_own_sequences_alone(given, tmp_path):
    """A delta below any drift masks every sequence of negative advantage; None masks none."""
    shares = {}
    for name, delta in (("none", {}), ("maths", {"maths": DomainObjective(0.0, -1e9)})):
        policy = PolicyConfig(default=DomainObjective(0.0, None), by_domain=delta)
        run = train(replace(SHORT, pace=Pace(steps=2), policy=policy), given, tmp_path / name)
        shares[name] = max(value for _, value in read_metrics(run, "train/masked_share"))
    assert shares["none"] == 0.0 and 0.0 < shares["maths"] < 1.0


def test_sampling_weights_are_the_shares_of_prompts(given, tmp_path):
    run = train(replace(SHORT, pace=Pace(steps=2, checkpoint_every=9), domain_weights={"logic": 1.0}), given, tmp_path)
    names = {path.name.partition("-")[0] for path in (run / "rollouts").rglob("*.npz")}
    assert names == {"logic"} and not read_metrics(run, "rollout/success/maths")


class Likes:
    """A judge that likes one letter."""

    asked = 0

    async def reply(self, messages, tools, params):
        from rorqual.policy import ChatReply, StopReason

        Likes.asked += 1
        answer = messages[1]["content"].partition("Answer:\n")[2].partition("\n\nRubric:")[0]
        marks = {"instructions": 10 * (answer == "c"), "substance": 5, "language": 5, "harm": 0}
        return ChatReply({"role": "assistant", "content": json.dumps(marks)}, StopReason.STOP)


def test_alignment_joins_in_with_a_judge_s_score_as_its_outcome(given, tmp_path):
    """The judge likes a letter that the domain's own verifier refuses; its score is the reward there, and asked for once."""
    from rorqual.rewards.judging import Judge

    tasks = open_tasks(given[1], "inline", "all")
    tasks = replace(tasks, judge=Judge(replace(JUDGE, domains=("maths",), pass_mark=0.7), Likes()))
    plain = DomainReward(format=0, length=0, language=0)
    Likes.asked = 0
    run = train(replace(SHORT, pace=Pace(steps=3), rewards=RewardConfig(default=plain)), given, tmp_path, tasks)
    kept = [of(path) for path in (run / "rollouts").rglob("*.npz")]
    found = {"maths": [], "logic": []}
    for directory in sorted((run / "rollouts").iterdir()):
        for path in sorted(directory.glob("*.npz")):
            attempt = Archive(directory).load(*of(path))
            found[attempt.task_id.partition("-")[0]].append(attempt)
    assert len(kept) == 3 * 32 and Likes.asked == sum(bool(t.turns[-1].message["content"].strip()) for t in found["maths"])
    assert {t.verdict.score for t in found["logic"]} <= {0.0, 1.0}
    for attempt in found["maths"]:
        likes = attempt.turns[-1].message["content"] == "c"
        if "judged" in attempt.verdict.measures:
            assert attempt.verdict.score == pytest.approx(5 / 6 if likes else 0.5) and attempt.verdict.passed == likes
    assert any(t.verdict.passed for t in found["maths"]) and any(not t.verdict.passed for t in found["maths"])
    scores = [t.verdict.score for ts in found.values() for t in ts]
    means = [value for _, value in read_metrics(run, "reward/mean")]
    assert sum(means) / 3 == pytest.approx(sum(scores) / len(scores), abs=1e-6)


def of(path):
    """task id and sample of an archived attempt."""
    task, _, sample = path.stem.rpartition(".")
    return task, int(sample)


def test_a_recipe_s_table_sets_them_by_domain(tmp_path):
    table = """
[grpo]
domain_weights = { maths = 0.25, search = 0.5, writing = 0.25 }
[grpo.policy]
by_domain = { maths = { beta = 0.0 }, writing = { beta = 0.01, off_policy_delta = "none" } }
[grpo.rewards.by_domain.writing]
length = 0.0
"""
    (tmp_path / "r.toml").write_text(table)
    config = load(grpo.Config, tmp_path / "r.toml", table="grpo")
    assert config.policy.of("maths").beta == 0.0 and config.policy.of("writing").off_policy_delta is None
    assert config.rewards.of("writing").length == 0.0 and config.rewards.of("maths").length == 0.1
    (tmp_path / "again.toml").write_text(dump(config))
    assert load(grpo.Config, tmp_path / "again.toml") == config
    assert torch.tensor([config.domain_weights[name] for name in ("maths", "search", "writing")]).sum() == 1
    assert RIGHT.keys() == ASKED.keys()
