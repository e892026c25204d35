"""Two gloo processes give one process's losses and weights, and read each other's checkpoints."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rorqual.runlog import read_metrics

STAGES = ("pretrain", "extend", "warm-indexer", "train-sparse")
# Larger weights keep gradients far above rounding, where Adam would turn noise into full steps; and so does epsilon.
RECIPE = [
    "run",
    "smoke",
    "--quiet",
    "--post_training=none",
    "--model.init-std=0.1",
    "--sample.prompts=[]",
    "--prepare.corpora=[{name='python', limit_mb=0.2}]",
    "--prepare.held_out_share=0.3",
    *(f"--{stage.replace('-', '_')}.optimizer.epsilon=1e-5" for stage in STAGES),
    "--train_sparse.optimizer.learning-rate=1e-4",
    "--warm_indexer.optimizer.learning-rate=1e-3",
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
PROGRAM = str(Path(__file__).with_name("two_processes.py"))


def run(directory: Path, processes: int, *extra: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable]
    if processes > 1:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
    command = [*launcher, PROGRAM, *RECIPE, *extra, "--out", str(directory)]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 0 or not check, result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "alone"
    run(directory, 1)
    return directory


def with_data(alone: Path, directory: Path) -> Path:
    """A fresh run directory with the text prepared already."""
    directory.mkdir()
    shutil.copytree(alone / "data", directory / "data")
    return directory


def assert_same(alone: Path, other: Path) -> None:
    for stage in STAGES:
        for name in ("train/loss", "train/mtp_loss", "train/balance_loss", "train/index_loss"):
            one, two = read_metrics(alone / stage, name), read_metrics(other / stage, name)
            assert len(one) == len(two)
            for (step, a), (_, b) in zip(one, two, strict=True):
                assert abs(a - b) <= 1e-5, f"{stage} {name} step {step}: {a} {b}"
        ours, theirs = (load_file(run / stage / "model" / "model.safetensors") for run in (alone, other))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            gap = float((tensor - theirs[name]).abs().max())
            assert gap <= 1e-4, f"{stage} {name}: {gap}"


@pytest.mark.multi
@pytest.mark.parametrize(
    "extra",
    [
        pytest.param([], id="fsdp"),
        pytest.param(["--parallel.expert=2", "--parallel.context=2"], id="expert and context"),
        pytest.param(["--parallel.expert=2"], id="expert", marks=pytest.mark.slow),
        pytest.param(["--parallel.context=2"], id="context", marks=pytest.mark.slow),
    ],
)
def test_two_processes_give_one_processs_losses_and_weights(alone, tmp_path, extra):
    directory = with_data(alone, tmp_path / "two")
    run(directory, 2, *extra)
    assert_same(alone, directory)


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2])
def test_a_checkpoint_of_one_is_read_by_two_and_the_reverse(alone, tmp_path, first):
    """The run stops after pre-training's first checkpoint under `first` processes and goes on under the other number."""
    directory = with_data(alone, tmp_path / "mixed")
    run(directory, first)
    for stage in STAGES[1:]:
        shutil.rmtree(directory / stage)
    shutil.rmtree(directory / "model")
    shutil.rmtree(directory / "pretrain" / "model")
    shutil.rmtree(directory / "pretrain" / "checkpoints" / "step-00000008")
    run(directory, 3 - first)
    assert_same(alone, directory)


@pytest.mark.multi
def test_a_layout_that_the_processes_do_not_divide_into_is_refused(alone, tmp_path):
    directory = with_data(alone, tmp_path / "two")
    result = run(directory, 2, "--parallel.expert=3", check=False)
    assert result.returncode != 0 and "parallel.expert 3: expected 1 or the number of processes, 2" in result.stderr
