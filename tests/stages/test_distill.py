"""Distillation: one model that does what its specialists do, from their verified attempts or on its own samples."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rorqual.chat import encode_tokens
from rorqual.errors import FieldErrors, UserError
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer
from rorqual.model.weights import load_model, save_model
from rorqual.rewards.domains import DomainReward, RewardConfig
from rorqual.rollout.collect import GroupConfig
from rorqual.runlog import read_events, read_metrics
from rorqual.stages import distill, on_policy, sft
from rorqual.stages.grpo import SamplingConfig
from rorqual.stages.sampling import AttemptConfig
from rorqual.stages.specialists import Specialist
from rorqual.stages.task_set import open_tasks
from rorqual.train.lineage import read_lineage
from rorqual.train.loop import Pace
from rorqual.train.optimizer import OptimizerConfig
from tests.stages.test_cold_start import TUNE
from tests.stages.test_grpo import CONFIG as GRPO
from tests.stages.test_grpo import LETTERS, SHAPE
from tests.stages.test_specialists import ASKED, RIGHT, TOKENIZER, make_model, make_store, site, weights

ATTEMPTS = AttemptConfig(groups=GroupConfig(4), agent=GRPO.agent, engine=GRPO.engine)
CONFIG = distill.Config(attempts=ATTEMPTS, kept_per_task=2, sft=replace(TUNE, rows=2, length=64))
WRONG = {"logic": "g", "maths": "h"}
ON_POLICY = on_policy.Config(
    pace=Pace(steps=14, checkpoint_every=5), prompts=6, groups=GroupConfig(4), agent=GRPO.agent, engine=GRPO.engine,
    optimizer=OptimizerConfig(learning_rate=0.004, schedule="constant", weight_decay=0.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A base that says any letter, a store of two domains, and a specialist for each that is right two times in three."""
    root = tmp_path_factory.mktemp("distil")
    base = make_model(root / "base", dict.fromkeys(ASKED, LETTERS))
    rows = []
    for domain, right in RIGHT.items():
        other = {name: LETTERS for name in ASKED if name != domain}
        make_model(root / "specialists" / f"{domain}-direct" / "model", {domain: right + right + WRONG[domain]} | other)
        rows.append({"domain": domain, "mode": "direct", "model": f"{domain}-direct/model"})
    (root / "specialists" / "specialists.json").write_text(json.dumps(rows))
    return base, make_store(root / "tasks"), root / "specialists"


def run(config, given, directory) -> Path:
    tasks = open_tasks(given[1], "inline", "all")
    return distill.main(config, given[0], given[2], tasks, site(directory))


def success(model: Path, given, directory: Path) -> dict[str, float]:
    """By domain, of 36 attempts each."""
    from rorqual.stages.sampling import attempts

    tasks = open_tasks(given[1], "inline", "all")
    config = replace(ATTEMPTS, groups=GroupConfig(12))
    found = {}
    for domain, ids in tasks.by_domain.items():
        groups = attempts(config, model, ids, tasks.open, False, directory / domain, 7, site(directory))
        found[domain] = sum(t.verdict.passed for group in groups for t in group) / (12 * len(ids))
    return found


@pytest.fixture(scope="module")
def from_data(given, tmp_path_factory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("data")
    return directory, run(CONFIG, given, directory)


def test_the_generalist_does_what_each_specialist_does(given, from_data, tmp_path):
    before, after = success(given[0], given, tmp_path / "before"), success(from_data[1], given, tmp_path / "after")
    assert max(before.values()) < 0.35, before
    assert min(after.values()) > 0.85, "rejection sampling leaves the specialists' errors out, so it may exceed them"


def test_only_what_verifier_and_reward_accept_is_kept_and_says_whose_it_is(given, from_data):
    rows = [json.loads(line) for line in (from_data[0] / "data" / sft.CONVERSATIONS).read_text().splitlines()]
    assert rows and all(row["messages"][-1]["content"] == RIGHT[row["domain"]] for row in rows)
    assert {(row["model"], row["source"], row["thinking"]) for row in rows} == {(f"{d}-direct", "sampled", False) for d in ASKED}
    per_task = {row["task"]: 0 for row in rows}
    for row in rows:
        per_task[row["task"]] += 1
    assert max(per_task.values()) == 2
    events = read_events(from_data[0], "attempts")
    assert [e["played"] for e in events] == [12, 12] and all(e["kept"] <= e["passed"] < e["played"] for e in events)
    own, records = read_lineage(from_data[1])
    data = next(records[p["id"]] for p in records[own]["parents"] if p["role"] == "data")
    assert [p["role"] for p in data["parents"]] == ["specialist logic-direct", "specialist maths-direct", "tasks"]


def test_the_reward_is_a_bar_of_its_own_and_shares_can_be_capped(given, tmp_path):
    with pytest.raises(UserError, match="no attempt of any specialist was accepted"):
        run(replace(CONFIG, least_reward=99.0), given, tmp_path / "high")
    generous = RewardConfig(by_domain={"maths": DomainReward(outcome=200.0)})
    config = replace(CONFIG, least_reward=99.0, rewards=generous, most_per_specialist=1, sft=replace(CONFIG.sft, epochs=1))
    run(config, given, tmp_path / "one")
    rows = [json.loads(line) for line in (tmp_path / "one" / "data" / sft.CONVERSATIONS).read_text().splitlines()]
    assert [row["domain"] for row in rows] == ["maths"] and rows[0]["reward"] > 199


@pytest.mark.parametrize("estimator", ["vocabulary", pytest.param("sampled", marks=pytest.mark.slow)])
def test_on_its_own_samples_the_student_comes_to_its_teachers(given, tmp_path, estimator):
    """It takes over their errors too, where the verifier would have left them out: two right answers in three."""
    steps = {"vocabulary": 14, "sampled": 40}[estimator]  # one token's word is a noisy one
    settings = replace(ON_POLICY, estimator=estimator, pace=Pace(steps=steps, checkpoint_every=5))
    config = replace(CONFIG, method="on_policy", on_policy=settings)
    model = run(config, given, tmp_path / "run")
    divergence = [value for _, value in read_metrics(tmp_path / "run" / "on-policy", "train/reverse_kl")]
    assert len(divergence) == steps
    # The estimate from single tokens has a heavy tail: a token that the teacher would hardly say weighs a lot.
    assert estimator == "sampled" or sum(divergence[-3:]) < 0.8 * sum(divergence[:3]), divergence
    for domain in RIGHT:
        teacher = first_token(given[2] / f"{domain}-direct" / "model", domain)
        before, after = (divergence_of(first_token(path, domain), teacher) for path in (given[0], model))
        assert before > 0.7 and after < 0.7 * before, (domain, before, after)
    assert len(read_metrics(tmp_path / "run" / "on-policy", "rollout/success/maths-direct")) >= 6


@torch.no_grad()
def first_token(model: Path, domain: str) -> torch.Tensor:
    """Log-probabilities of the answer's first token."""
    prompt = encode_tokens([{"role": "user", "content": ASKED[domain]}], TOKENIZER, thinking=False)
    return load_model(model, "float32")(torch.tensor([prompt]))[0, -1].log_softmax(0)


def divergence_of(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.exp() * (p - q)).sum())


def test_a_truncated_student_and_a_teacher_of_another_vocabulary_are_refused(given, tmp_path):
    with pytest.raises(FieldErrors, match="no truncation"):
        replace(ON_POLICY, sampling=SamplingConfig(top_p=0.9))
    assert replace(ON_POLICY, sampling=SamplingConfig(top_p=0.9), estimator="sampled")
    shape = ModelConfig(**{**vars(SHAPE), "vocab_size": SHAPE.vocab_size + 1})
    save_model(Transformer(shape), tmp_path / "other", dtype="float32")
    TOKENIZER.backend.save(str(tmp_path / "other" / "tokenizer.json"))
    teachers = [Specialist("maths", "direct", tmp_path / "other")]
    with pytest.raises(UserError, match="reverse KL needs one vocabulary"):
        on_policy.main(ON_POLICY, given[0], teachers, open_tasks(given[1], "inline", "all"), site(tmp_path / "run"))


RUN = """
import sys, pathlib, torch
from tests.stages.test_distill import *
torch.set_num_threads(1)
base, tasks, specialists, out = map(pathlib.Path, sys.argv[1:])
config = replace(CONFIG, method=METHOD, on_policy=replace(ON_POLICY, pace=Pace(steps=4, checkpoint_every=2)),
                 sft=replace(CONFIG.sft, epochs=3, checkpoint_every=1))
run(config, (base, tasks, specialists), out)
"""


def start(given, directory, method):
    command = [sys.executable, "-c", RUN.replace("METHOD", repr(method)), *map(str, given), str(directory)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": "."})


@pytest.mark.parametrize(
    ("method", "until", "model"),
    [
        pytest.param("data", "attempts/*/*.npz", "sft/model", marks=pytest.mark.slow),
        pytest.param("on_policy", "on-policy/rollouts/*1/*/*.npz", "on-policy/model", marks=pytest.mark.slow),
        pytest.param("on_policy", "on-policy/checkpoints/step-*", "on-policy/model", marks=pytest.mark.slow),
    ],
)
def test_killed_it_ends_with_the_same_bits_and_plays_nothing_twice(given, tmp_path, method, until, model):
    process = start(given, tmp_path / "killed", method)
    while process.poll() is None and not list((tmp_path / "killed").glob(until)):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.npz")}
    assert written and start(given, tmp_path / "killed", method).wait(240) == 0
    assert all(path.stat().st_mtime_ns == when for path, when in written.items() if path.exists()), "played twice"
    assert start(given, tmp_path / "whole", method).wait(240) == 0
    a, b = (weights(tmp_path / name / model) for name in ("whole", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
