"""The RL stage in its other forms: several processes, rollouts ahead of training, an external engine; and what comes broken."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from rorqual.engine import EngineConfig
from rorqual.errors import UserError
from rorqual.model.weights import load_model
from rorqual.parallel.apply import ComputeConfig
from rorqual.policy import Completion, StopReason
from rorqual.rewards.advantages import AdvantageConfig
from rorqual.rewards.domains import Reward
from rorqual.rollout.endpoint import EndpointConfig
from rorqual.rollout.remote import RemoteConfig
from rorqual.rollout.trajectory import End, Trajectory, Turn
from rorqual.runlog import read_metrics
from rorqual.serve.app import ServerConfig
from rorqual.serve.main import engine_backend
from rorqual.stages import batches, grpo
from rorqual.tasks.verdict import failed, passed
from rorqual.train.loop import Pace
from rorqual.train.policy_step import PolicyConfig
from rorqual.train.samples import ReplayConfig
from tests.serve.conftest import LiveServer
from tests.stages import test_grpo
from tests.stages.grpo_process import SETTINGS
from tests.stages.test_grpo import CONFIG, POOL, train

init = test_grpo.init  # the fixture
SHORT = replace(CONFIG, pace=Pace(steps=3), compute=ComputeConfig(save_dtype="float32"))
COMPARED = (
    "rollout/success", "rollout/sampled_tokens", "rollout/samples", "rollout/flat_groups", "reward/mean", "train/policy_loss",
    "train/kl_loss", "train/kl", "train/entropy", "train/index_loss", "train/mismatch_abs", "train/ratio_max", "train/clip_share",
    "train/masked_share", "train/tokens", "train/grad_norm", "train/index_grad_norm",
)  # fmt: skip


def weights(directory):
    return load_model(directory / "model", "float32").state_dict()


def run(processes, start, directory):
    launcher = [sys.executable]
    if processes > 1:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
        launcher += ["--module"]
    else:
        launcher += ["-m"]
    command = [*launcher, "tests.stages.grpo_process", str(start), str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=250)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.multi
def test_two_processes_learn_what_one_does(init, tmp_path):
    """Tasks, trajectories and mini-batches are dealt out among ranks; figures to 1e-5, weights to 1e-5."""
    run(1, init, tmp_path / "one")
    run(2, init, tmp_path / "two")
    for name in COMPARED:
        one, two = read_metrics(tmp_path / "one", name), read_metrics(tmp_path / "two", name)
        assert len(one) == len(two) == SETTINGS.pace.steps
        for (step, a), (_, b) in zip(one, two, strict=True):
            assert abs(a - b) <= 1e-5 * max(1.0, abs(a)), f"{name} step {step}: {a} {b}"
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in ours.items():
        gap = float((tensor - theirs[name]).abs().max())
        assert gap <= 1e-5, f"{name}: {gap}"


def test_rollouts_run_ahead_by_at_most_the_stated_number_of_versions(init, tmp_path):
    train(replace(CONFIG, staleness=2, pace=Pace(steps=5)), init, tmp_path)
    behind = [value for _, value in read_metrics(tmp_path, "rollout/staleness")]
    assert len(behind) == 5 and max(behind) <= 2 and max(behind) > 0, behind
    assert behind[0] == 0, "the first batch can only be of the first weights"
    shares = [read_metrics(tmp_path, f"time/{name}") for name in ("sync", "rollout", "train", "idle")]
    for step in range(5):
        assert sum(share[step][1] for share in shares) == pytest.approx(1, abs=1e-6)


def test_an_external_engine_trains_the_same_bits_as_the_embedded_one(init, tmp_path):
    """`rorqual serve` over a socket: ids, log-probs, kept sets, experts and selections out, weights in by disk."""
    train(SHORT, init, tmp_path / "embedded")
    engine = EngineConfig(block_size=8, cache_tokens=2048, record_selection=True)
    live = LiveServer(lambda: engine_backend(str(init), engine, "float32", "cpu"), ServerConfig(port=0, weights_from_disk=True))
    try:
        config = replace(SHORT, external=RemoteConfig("rorqual", EndpointConfig(live.url)))
        train(config, init, tmp_path / "external")
    finally:
        live.stop()
    ours, theirs = weights(tmp_path / "embedded"), weights(tmp_path / "external")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not (tmp_path / "external" / "weights").exists(), "what was written for the engine is cleared"


def test_an_engine_that_cannot_give_what_is_to_be_replayed_is_refused_before_anything_is_played(init, tmp_path):
    external = RemoteConfig("vllm", EndpointConfig("http://127.0.0.1:9"))
    with pytest.raises(UserError, match=r"record_selected_indices.*policy\.replay\.selection=false"):
        train(replace(SHORT, external=external), init, tmp_path / "a")
    policy = PolicyConfig(replay=ReplayConfig(selection=False))
    away = RemoteConfig("vllm", EndpointConfig("http://127.0.0.1:9", max_tries=1))
    with pytest.raises(UserError, match="ConnectError"):
        train(replace(SHORT, external=away, policy=policy), init, tmp_path / "b")


def test_a_task_drawn_twice_is_two_groups_with_attempts_of_their_own(init, tmp_path):
    twice = replace(CONFIG, prompts=3, domain_weights={"more": 1.0}, pace=Pace(steps=1), groups=replace(CONFIG.groups, size=4))
    train(twice, init, tmp_path)
    assert sorted(path.name for path in (tmp_path / "rollouts" / "00000000").iterdir()) == sorted(
        f"u0.{i}.npz" for i in range(12)
    )


# --- what comes broken


def attempt(sample, verdict, end=End.ANSWERED, tokens=(5,)):
    done = Completion((1, 2), tuple(tokens), np.full(len(tokens), -1, np.float32), StopReason.STOP)
    return Trajectory("t0", sample, (Turn({}, done, sampled_tokens=len(tokens)),), end, verdict, ({"role": "user"},))


def learn(*attempts):
    return grpo.learnable([attempts], POOL, CONFIG, 0)


def test_flat_groups_are_left_out_where_asked():
    flat, mixed = [attempt(0, passed()), attempt(1, passed())], [attempt(0, passed()), attempt(1, failed("x"))]
    skipping = replace(CONFIG, advantages=AdvantageConfig(skip_flat=True))
    for config, wanted in ((CONFIG, [0, 1, 2, 3]), (skipping, [2, 3])):
        items, metrics = grpo.learnable([flat, mixed], POOL, config, 0)
        assert [item.trajectory for item in items] == wanted and metrics["rollout/flat_groups"] == 0.5


@pytest.mark.parametrize("broken", ["raises", math.nan, math.inf])
def test_a_reward_that_raises_or_is_no_number_leaves_its_attempt_out_and_harms_no_sibling(monkeypatch, broken):
    real = batches.reward

    def reward(trajectory, config):
        if trajectory.sample != 1:
            return real(trajectory, config)
        if broken == "raises":
            raise ZeroDivisionError("of a term")
        return Reward(broken, {"outcome": broken})

    monkeypatch.setattr(batches, "reward", reward)
    items, metrics = learn(attempt(0, passed()), attempt(1, passed()), attempt(2, failed("x")))
    assert [item.trajectory for item in items] == [0, 2]
    assert metrics["rollout/no_reward"] == pytest.approx(1 / 3) and all(math.isfinite(v) for v in metrics.values())
    assert sum(item.advantage for item in items) == pytest.approx(0), "the mean is of those that have one"


def test_the_only_survivor_of_a_group_teaches_nothing():
    gone = attempt(1, failed("x"), End.POLICY_FAILED, ())
    items, metrics = learn(attempt(0, passed()), gone, replace(gone, sample=2), replace(gone, sample=3, end=End.WORLD_FAILED))
    assert items == [] and metrics["rollout/no_reward"] == 0.75


def test_an_endpoint_that_stayed_away_gives_no_reward_and_no_zero():
    gone = attempt(1, failed("x"), End.POLICY_FAILED, ())
    items, metrics = learn(attempt(0, passed()), gone, attempt(2, failed("x")))
    assert [item.trajectory for item in items] == [0, 2] and metrics["rollout/end/policy_failed"] == pytest.approx(1 / 3)


def test_an_empty_completion_is_counted_and_has_nothing_to_train():
    items, metrics = learn(attempt(0, passed()), attempt(1, failed("x"), End.CUT, ()))
    assert [item.trajectory for item in items] == [0], "its reward counts in the mean, its tokens are none"
    assert items[0].advantage > 0 and metrics["rollout/empty"] == 0.5
