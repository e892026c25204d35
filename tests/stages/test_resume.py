"""A stage that is killed and started again ends with the bits of one that was not, whatever the moment."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rorqual.runlog import read_events

STAGES = ("pretrain", "extend", "warm-indexer", "train-sparse")
FASTER = ["--sample.prompts=[]", "--prepare.corpora=[{name='python', limit_mb=0.2}]", "--prepare.held_out_share=0.3"]
RUN = [sys.executable, "-m", "rorqual", "run", "smoke", "--quiet", *FASTER]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def run(directory: Path) -> None:
    subprocess.run([*RUN, "--out", str(directory)], check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL)


def weights(directory: Path, stage: str) -> dict[str, bytes]:
    tensors = load_file(directory / stage / "model" / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, float]:
    """A finished run, and how long it took."""
    directory, began = tmp_path_factory.mktemp("runs") / "whole", time.monotonic()
    run(directory)
    return directory, time.monotonic() - began


def kill_at_random(directory: Path, kills: int, seconds: float, seed: int) -> int:
    """Start the run, kill -9 it after a random time, again and again; then let it finish. How many kills hit it."""
    rng, hits = random.Random(seed), 0
    for _ in range(kills):
        process = subprocess.Popen([*RUN, "--out", str(directory)], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            hits += 1
    run(directory)
    return hits


def assert_same_bits(a: Path, b: Path) -> None:
    for stage in STAGES:
        one, other = weights(a, stage), weights(b, stage)
        assert one.keys() == other.keys()
        differing = [name for name in one if one[name] != other[name]]
        assert not differing, f"{stage}: {differing[:5]}"


def test_every_stage_resumes_bitwise_after_kill_9(uninterrupted, tmp_path):
    whole, seconds = uninterrupted
    hits = kill_at_random(tmp_path / "killed", kills=2, seconds=0.8 * seconds, seed=3)
    assert hits, "no kill came in time"
    assert_same_bits(whole, tmp_path / "killed")


@pytest.mark.slow
def test_every_stage_resumes_bitwise_after_ten_kills(uninterrupted, tmp_path):
    whole, seconds = uninterrupted
    hits = kill_at_random(tmp_path / "killed", kills=10, seconds=0.6 * seconds, seed=4)
    assert hits >= 5
    assert_same_bits(whole, tmp_path / "killed")


def test_each_stage_goes_on_from_its_checkpoint_when_its_end_is_taken_away(uninterrupted, tmp_path):
    """The last checkpoint and the finished model of every stage are removed: each must redo its last steps to the same bits."""
    whole, copy = uninterrupted[0], tmp_path / "copy"
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
    shutil.copytree(uninterrupted[0], copy)
    command = [*RUN, "--out", str(copy), "--pretrain.optimizer.learning-rate=0.5"]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "belongs to another configuration: optimizer.learning_rate (was 0.004, is 0.5)" in result.stderr
