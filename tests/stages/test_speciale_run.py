"""Speciale's recipe end to end on a world of proofs that is three sums wide."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from rorqual.errors import UserError
from rorqual.parallel.world import World
from rorqual.policy import SamplingParams
from rorqual.runlog import read_events, read_metrics
from rorqual.stages import rebuild, speciale
from rorqual.stages.proof_pool import open_judges
from rorqual.stages.task_set import open_tasks
from rorqual.tasks import Store, Task, TaskRow, task_record
from tests.proof_world import store, tasks, taught_model
from tests.stages.test_speciale import CONFIG, CPU, site

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def task_set(tmp_path_factory):
    return open_tasks(store(tmp_path_factory.mktemp("tasks")), "inline", "all")


@pytest.fixture(scope="module")
def init(tmp_path_factory) -> Path:
    return taught_model(tmp_path_factory.mktemp("init") / "model", steps=40)


def test_the_whole_recipe_runs_in_its_order_and_goes_on_where_it_was(init, task_set, tmp_path):
    final = speciale.main(CONFIG, init, task_set, site(tmp_path))
    assert final == tmp_path / "reasoning" / "model"
    for stage in ("iteration-1/verifier", "iteration-1/generator", "iteration-1/merge", "iteration-2/verifier", "reasoning"):
        assert (tmp_path / stage / "model").is_dir(), stage
    labelled = read_events(tmp_path / "iteration-1" / "labels", "labelled")[0]
    assert labelled["checked"] == labelled["right"] == labelled["kept"], "exact judges give the true labels"
    assert {name for name, _ in read_metrics(tmp_path / "iteration-1" / "verifier", "rollout/success")}
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert speciale.main(CONFIG, init, task_set, site(tmp_path)) == final
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}, "nothing was made twice"
    given = [init, *task_set.sources.values(), tmp_path / "iteration-1" / "labels" / "tasks"]
    assert rebuild.main(final, tmp_path / "again", given, World(0, 1, CPU))["same"], "its record says how proofs were judged"
    with pytest.raises(UserError, match="length_share"):
        speciale.main(replace(CONFIG, length_share=0.5), init, task_set, site(tmp_path))


def test_a_trained_verifier_judges_from_its_checkpoint(init, task_set):
    with open_judges(replace(CONFIG.judges, verifier="trained", meta_verifier="trained"), init, CPU) as judges:
        assert judges.verifier is judges.meta_verifier is not None
        for _ in range(2):  # a stage starts an event loop for each of its steps
            message = asyncio.run(
                judges.verifier.reply(task_set_prompt(task_set), (), SamplingParams(max_tokens=4, seed=1))
            ).message
            assert message["role"] == "assistant"
    with open_judges(replace(CONFIG.judges, verifier="trained", meta_verifier="trained"), None, CPU) as judges:
        assert judges.verifier is judges.meta_verifier is None, "before there is one"


def task_set_prompt(task_set):
    return next(iter(task_set.tasks.values())).messages


def test_tasks_with_tools_are_refused(init, tmp_path):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    made = Store(tmp_path / "tasks")
    for number, task in enumerate([Task("m1", "maths", ({"role": "user", "content": "?"},), (tool,)), *tasks()]):
        made.append(task_record(TaskRow(task), (number,)))
    made.seal({})
    found = open_tasks(made.directory, "inline", "all")
    with pytest.raises(UserError, match="reasoning data only: maths has tools"):
        speciale.main(replace(CONFIG, domains=("maths", "proof")), init, found, site(tmp_path / "run"))
