"""Evaluation as a stage: shares of the tasks add up to the whole, in this process or in several, and are played once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rorqual.errors import FieldErrors, UserError
from rorqual.evals.evaluation import evaluate, read_results
from rorqual.runlog import RunLog
from rorqual.stages import held_out
from tests.stages.test_specialists import make_model, make_store

CONFIG = held_out.Config(split="all", max_turn_tokens=8, max_turns=1, window=64, isolation="inline", cache_tokens=4096)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("held-out")
    return make_model(directory / "model", {"logic": "ab", "maths": "ab"}, steps=20), make_store(directory / "tasks")


def planned(world, out, share=(1, 1)):
    return held_out.evaluation(CONFIG, world[0], world[1], out, thinking=False, share=share)


def test_shares_side_by_side_are_the_whole(world, tmp_path):
    whole = evaluate(planned(world, tmp_path / "whole"), quiet=True)
    shares = [planned(world, tmp_path / f"share-{i}", (i, 4)) for i in (1, 2, 3, 4)]
    held_out.measure(shares, 2, RunLog(tmp_path, quiet=True))
    found = [read_results(each.out) for each in shares]
    assert [len(each["by_task"]) for each in found] == [2, 2, 1, 1], "six tasks in four shares"
    assert {name: score for each in found for name, score in each["by_task"].items()} == whole["by_task"]
    assert 0 < sum(score for (score,) in whole["by_task"].values()) < 6, "a model that is right now and then"
    with pytest.raises(UserError, match="share 7 of 7: no task"):
        evaluate(planned(world, tmp_path / "none", (7, 7)), quiet=True)
    with pytest.raises(FieldErrors, match="share"):
        planned(world, tmp_path / "none", (3, 2))


def test_every_checkpoint_is_measured_once_and_the_last_under_every_strategy(world, tmp_path):
    config = replace(CONFIG, strategies=("none", "discard-all"))
    model, store = world
    for _ in range(2):
        held_out.main(config, {"first": model, "last": model}, [store], tmp_path, RunLog(tmp_path, quiet=True))
        results = {path.parent.name: path for path in tmp_path.glob("*/results.json")}
        assert set(results) == {"first-tasks", "last-tasks", "last-tasks-discard-all"}
    assert json.loads(results["last-tasks-discard-all"].read_text())["context"] == "discard-all"
    assert len((results["first-tasks"].parent / "events.jsonl").read_text().split('"evaluated"')) == 2, "measured once"


def test_one_family_alone(world, tmp_path):
    asked = held_out.evaluation(CONFIG, world[0], world[1], tmp_path / "logic", thinking=False, families=("logic",))
    assert set(evaluate(asked, quiet=True)["by_task"]) == {"logic-0", "logic-1", "logic-2"}
