"""The held-out split of stores that `rorqual synthesize` made, of every family: stored solutions score one, wrong ones zero."""

from __future__ import annotations

import json

import pytest

from rorqual.cli import main
from rorqual.tasks import Store, splits
from tests.synthesis.test_search import cache, corpus  # noqa: F401 - fixtures

PROJECT = {
    "sums/__init__.py": "def total(values, least=0):\n    found = 0\n    for value in values:\n        if value >= least:\n"
    "            found += value\n    return found\n\n\ndef spread(values):\n    return max(values) - min(values)\n",
    "tests/test_sums.py": "from sums import spread, total\n\n\ndef test_total():\n    assert total([1, 2, 3]) == 6\n\n\n"
    "def test_least():\n    assert total([1, 2, 3], 2) == 5\n\n\ndef test_spread():\n    assert spread([4, 9]) == 5\n",
}
FAST = {"writing": 8, "proof": 4}
SLOW = {"general": 3, "maths": 3, "logic": 3, "programming": 3, "interpreter": 2, "search": 4, "code": 1}


def settings(family, machines, tmp_path):
    """For the two families that draw from what this machine has: material of the tests' own."""
    if family == "search":
        return ["--set", f"corpus={machines}", "--set", "max_links=3", "--set", "common=4"]
    if family == "code":
        for path, text in PROJECT.items():
            (tmp_path / "project" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "project" / path).write_text(text)
        return ["--set", f'projects=["{tmp_path}/project"]']
    return []


def evaluate(capsys, store, split, program, out):
    arguments = ["evaluate", "--benchmark", "heldout", "--data", str(store), "--split", split, "--policy", f"program:{program}"]
    assert main([*arguments, "--out", str(out), "--json", "--concurrency", "4"]) == 0
    return json.loads(capsys.readouterr().out)


FAMILIES = [*FAST, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)]


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_solutions_score_one_and_wrong_answers_zero(family, corpus, tmp_path, capsys):  # noqa: F811
    count, made = (FAST | SLOW)[family], tmp_path / "store"
    arguments = ["synthesize", "--family", family, "--count", str(count), "--out", str(made), "--json"]
    assert main([*arguments, *settings(family, corpus, tmp_path)]) == 0
    capsys.readouterr()
    for program, score in (("gold", 1.0), ("corrupted", 0.0), ("silent", 0.0)):
        found = evaluate(capsys, made, "all", program, tmp_path / program)
        assert (found["tasks"], found["unscored_attempts"], found["score"]["value"]) == (count, 0, score), (
            program,
            found["outcomes"],
        )


def test_only_the_tasks_of_the_split_are_played(tmp_path, capsys):
    made = tmp_path / "store"
    assert main(["synthesize", "--family", "writing", "--count", "30", "--out", str(made), "--json"]) == 0
    capsys.readouterr()
    by_split = splits(Store(made).tasks(), Store(made).worlds())
    assert set(by_split) == {"train", "test"} and 1 <= len(by_split["test"]) <= 9
    for split, names in by_split.items():
        assert set(evaluate(capsys, made, split, "gold", tmp_path / split)["by_task"]) == set(names)
    arguments = [
        "evaluate",
        "--benchmark",
        "heldout",
        "--data",
        str(made),
        "--split",
        "test_mechanism",
        "--policy",
        "program:gold",
    ]
    assert main([*arguments, "--out", str(tmp_path / "x")]) == 1
    assert "its split test_mechanism holds no task; --split names another; there are all 30" in capsys.readouterr().err
