"""A stage that is killed and started again ends with the bits of one that was not, whatever the moment."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rorqual.runlog import read_events

STAGES = ("pretrain", "extend", "warm-indexer", "train-sparse")
FASTER = [
    "--post_training=none",
    "--sample.prompts=[]",
    "--prepare.corpora=[{name='python', limit_mb=0.2}]",
    "--prepare.held_out_share=0.3",
]
RUN = [sys.executable, "-m", "rorqual", "run", "smoke", "--quiet", *FASTER]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def run(directory: Path) -> None:
    subprocess.run([*RUN, "--out", str(directory)], check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL)


def weights(directory: Path, stage: str) -> dict[str, bytes]:
    tensors = load_file(directory / stage / "model" / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """A finished run."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    run(directory)
    return directory


# Dies once the stage has logged the step, or some file operations of the checkpoint that follows it later.
DOOMED = """
import os, signal, sys
from rorqual.runlog import RunLog
stage, step, left, metrics = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), RunLog.metrics
doomed = False
def die_at(count):
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
def log(self, at, **values):
    global doomed
    metrics(self, at, **values)
    if (self.directory.name, at) == (stage, step):
        doomed = True
        die_at(left)
def watch(event, arguments):
    global left
    if doomed and event in ("open", "os.rename") and ".part" in str(arguments[0]):
        left -= 1
        die_at(left)
RunLog.metrics = log
sys.addaudithook(watch)
from rorqual.cli import main
sys.exit(main(sys.argv[4:]))
"""
STEPS = {"pretrain": (8, 4), "extend": (4, 2), "warm-indexer": (4, 2), "train-sparse": (4, 2)}
"""Of each stage of the smoke recipe: steps, and steps from one checkpoint to the next."""


@dataclass(frozen=True)
class Kill:
    """A death inside a stage. Moments are counted in what the run does, never in seconds: it dies on a machine of any speed."""

    stage: str
    step: int
    operations: int
    """File operations of the checkpoint after the step before it dies; 0: at once."""

    def resumes_at(self) -> set[int]:
        """The steps at which the next start may go on; 0 is a stage begun anew."""
        every = STEPS[self.stage][1]
        before = self.step // every * every
        return {before, self.step + 1} if self.operations else {before}


def planned(kills: int, seed: int) -> list[Kill]:
    """So many different steps, ascending, so that each is still to come at its turn. A save has some twenty operations."""
    rng = random.Random(seed)
    points = [(stage, step) for stage, (steps, _) in STEPS.items() for step in range(steps)]
    chosen = [points[i] for i in sorted(rng.sample(range(len(points)), kills))]
    return [Kill(s, step, rng.randint(0, 12) if (step + 1) % STEPS[s][1] == 0 else 0) for s, step in chosen]


def kill(directory: Path, plan: list[Kill]) -> dict[str, list[int]]:
    """Start the run and let it die as planned, again and again; then let it finish. Where each stage was resumed."""
    for each in plan:
        doom = [sys.executable, "-c", DOOMED, each.stage, str(each.step), str(each.operations), *RUN[3:]]
        code = subprocess.run(
            [*doom, "--out", str(directory)], env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=False
        ).returncode
        assert code == -signal.SIGKILL, f"{each}: it was to be killed, and ended with {code}"
    run(directory)
    resumed = {stage: [event["step"] for event in read_events(directory / stage, "resumed")] for stage in STAGES}
    for stage, found in resumed.items():
        wanted = [each.resumes_at() for each in plan if each.stage == stage]
        assert len(found) <= len(wanted) and all(step > 0 for step in found)
        assert len(found) >= sum(0 not in steps for steps in wanted), f"{stage}: killed at {wanted}, resumed at {found}"
        assert set(found) <= set().union(*wanted), f"{stage}: killed at {wanted}, resumed at {found}"
    return resumed


def assert_same_bits(a: Path, b: Path) -> None:
    for stage in STAGES:
        one, other = weights(a, stage), weights(b, stage)
        assert one.keys() == other.keys()
        differing = [name for name in one if one[name] != other[name]]
        assert not differing, f"{stage}: {differing[:5]}"


def test_every_stage_resumes_bitwise_after_kill_9(uninterrupted, tmp_path):
    plan = [Kill("pretrain", 5, 0), Kill("warm-indexer", 3, 5)]
    assert kill(tmp_path / "killed", plan)["pretrain"] == [4]
    assert_same_bits(uninterrupted, tmp_path / "killed")


@pytest.mark.slow
def test_every_stage_resumes_bitwise_after_ten_kills(uninterrupted, tmp_path):
    assert kill(tmp_path / "killed", planned(10, seed=3))
    assert_same_bits(uninterrupted, tmp_path / "killed")


def test_each_stage_goes_on_from_its_checkpoint_when_its_end_is_taken_away(uninterrupted, tmp_path):
    """The last checkpoint and the finished model of every stage are removed: each must redo its last steps to the same bits."""
    whole, copy = uninterrupted, tmp_path / "copy"
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "model")
    for stage in STAGES:
        shutil.rmtree(copy / stage / "model")
        shutil.rmtree(max((copy / stage / "checkpoints").glob("step-*")))
    run(copy)
    assert_same_bits(whole, copy)
    for stage in STAGES:
        assert read_events(copy / stage, "resumed"), stage


def test_a_signal_to_stop_saves_the_step_in_hand(tmp_path):
    directory = tmp_path / "run"
    command = [*RUN, "--out", str(directory), "--pretrain.pace.steps=5000", "--pretrain.pace.checkpoint-every=5000"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not read_events(directory / "pretrain", "metrics"):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "stopped by a signal after step" in errors, errors
    assert list((directory / "pretrain" / "checkpoints").glob("step-*"))


def test_another_configuration_in_the_same_directory_is_refused_by_field(uninterrupted, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(uninterrupted, copy)
    command = [*RUN, "--out", str(copy), "--pretrain.optimizer.learning-rate=0.5"]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "belongs to another configuration: optimizer.learning_rate (was 0.004, is 0.5)" in result.stderr
