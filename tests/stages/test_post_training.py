"""A recipe's second half: tasks, cold start, specialists, mixed RL, evaluation; killed, it goes on with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rorqual.stages.recipe import load_recipe
from tests.stages.test_resume import DOOMED, weights

FASTER = [
    "--sample.prompts=[]", "--prepare.corpora=[{name='python', limit_mb=0.2}]", "--prepare.held_out_share=0.3",
    "--extend=none", "--pretrain.pace.steps=2", "--warm_indexer.pace.steps=1", "--train_sparse.pace.steps=1",
    "--warm_indexer.batch.length=64", "--train_sparse.batch.length=64", "--model.max_positions=128",
]  # fmt: skip
RUN = ["run", "smoke", "--quiet", *FASTER]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("post") / "run"
    subprocess.run(
        [sys.executable, "-m", "rorqual", *RUN, "--out", str(directory)], check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL
    )
    return directory


def test_every_stage_leaves_a_checkpoint_and_a_measurement_on_held_out_tasks(finished):
    stages = {"cold-start/sft", "specialists/maths-thinking", "specialists/logic-thinking", "mixed"}
    assert all((finished / stage / "model" / "config.json").is_file() for stage in stages)
    measured = {path.parent.name: json.loads(path.read_text()) for path in finished.glob("evaluation/*/results.json")}
    assert set(measured) == {
        "train-sparse-primer", "cold-start-primer", "specialist-maths-thinking-primer", "specialist-logic-thinking-primer",
        "mixed-primer",
    }  # fmt: skip
    assert all(len(found["by_task"]) >= 1 for found in measured.values())
    assert weights(finished, ".") == weights(finished, "mixed"), "the run's model is the last stage's"
    page = (finished / "report.html").read_text()
    assert "Held-out success" in page and "evaluated no checkpoint" not in page


def test_a_recipe_without_the_table_ends_with_the_sparse_model():
    assert load_recipe("smoke", ["--post_training=none"]).post_training is None


@pytest.mark.slow
def test_killed_in_three_stages_it_ends_with_the_same_bits(finished, tmp_path):
    out = tmp_path / "killed"
    for stage, step in (("sft", 1), ("logic-thinking", 1), ("mixed", 0)):
        doom = [sys.executable, "-c", DOOMED, stage, str(step), "0", *RUN, "--out", str(out)]
        assert subprocess.run(doom, env=ENVIRONMENT, stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
    subprocess.run(
        [sys.executable, "-m", "rorqual", *RUN, "--out", str(out)], check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL
    )
    for stage in ("cold-start/sft", "specialists/maths-thinking", "specialists/logic-thinking", "mixed"):
        assert weights(finished, stage) == weights(out, stage), stage
