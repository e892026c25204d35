"""Contests from many samples: filtered on the statement's samples, submitted by the paper's rule, scored by subtask."""

from __future__ import annotations

import json

import pytest

from rorqual.cli import main
from rorqual.evals import contests
from rorqual.evals.benchmark import Options
from rorqual.rollout.trajectory import End, Trajectory, Turn
from rorqual.tasks import Task
from rorqual.tasks.verdict import failed, invalid, passed
from tests.evals.live_endpoint import reply

POINTS = (30.0, 70.0)


def attempt(sample, solved, thought, samples_passed=1.0, end=End.ANSWERED, task="p"):
    measures = {f"subtask_{i}": value if i in solved else 0.0 for i, value in enumerate(POINTS, 1)}
    measures |= {"samples_passed": samples_passed, "points": sum(measures.values())}
    verdict = passed(measures) if len(solved) == 2 else failed("points_lost", score=0.5, measures=measures)
    turn = Turn({"role": "assistant", "content": "x", "reasoning_content": "t" * thought}, None, sampled_tokens=7)
    return Trajectory(task, sample, (turn,), end, verdict)


def suite(*names):
    from rorqual.evals.benchmark import given_suite

    payload = {"subtasks": [{"points": points, "cases": [["", ""]]} for points in POINTS]}
    return given_suite("contest", [Task(name, "text", (), payload=payload) for name in names], lambda task: None)


def test_the_longest_thinking_among_the_fit_is_submitted():
    cut, unjudged = attempt(4, {1, 2}, 99, end=End.CUT), Trajectory("p", 5, (), End.ANSWERED, invalid("no sandbox"))
    attempts = [
        attempt(0, {1}, 10),
        attempt(1, {2}, 30),
        attempt(2, {1, 2}, 90, samples_passed=0.0),
        attempt(3, {1}, 30),
        cut,
        unjudged,
    ]
    assert [each.sample for each in contests.submissions(attempts, 50)] == [1, 3, 0]
    assert [each.sample for each in contests.submissions(attempts, 2)] == [1, 3]


def test_ioi_adds_the_best_of_each_subtask_over_what_was_submitted():
    attempts = {"p": [attempt(0, {1}, 50), attempt(1, {2}, 40), attempt(2, set(), 60)], "q": [attempt(0, {2}, 1, task="q")]}
    found = contests.contest_table(suite("p", "q"), attempts, Options(submissions=3))
    assert found["problems"]["p"] == {
        "attempts": 3, "submitted": 3, "subtasks": [30.0, 70.0], "points": 100.0, "of": 100.0, "accepted_at": None,
    }  # fmt: skip
    assert (found["points"], found["of"], found["solved"]) == (170.0, 200.0, 0)
    assert found["published"] == {"IOI 2025": "492 of 600 points, gold"}
    two = contests.contest_table(suite("p", "q"), attempts, Options(submissions=2))
    assert two["problems"]["p"]["points"] == 30.0, "the third by thinking is not submitted"


def test_icpc_counts_submissions_until_the_accepted_one():
    attempts = {"p": [attempt(0, {1}, 50), attempt(1, {1, 2}, 40), attempt(2, {1, 2}, 30)], "q": [attempt(0, {2}, 1, task="q")]}
    found = contests.contest_table(suite("p", "q"), attempts, Options(rule="icpc"))
    assert found["problems"]["p"]["accepted_at"] == 2 and found["problems"]["p"]["submitted"] == 2
    assert found["problems"]["q"]["accepted_at"] is None and found["solved"] == 1 and "points" not in found


PROBLEMS = [
    {"id": "double", "statement": "Double it. #double", "samples": [["1\n", "2"]],
     "subtasks": [{"points": 40, "cases": [["2\n", "4"]]}, {"points": 60, "cases": [["1000\n", "2000"]]}]},
    {"id": "negate", "statement": "Negate it. #negate", "samples": [["1\n", "-1"]],
     "subtasks": [{"points": 100, "cases": [["5\n", "-5"]]}]},
    {"id": "bad", "statement": "s", "samples": [["1"]], "subtasks": [{"points": 1, "cases": [["1", "2"]]}]},
]  # fmt: skip
SMALL = "n = int(input())\nprint(2 * n if n < 9 else 0)"
WAYS = {
    "double": [("print(2 * int(input()))", 3), (SMALL, 9), ("print(2)", 5), ("print(7)", 99)],
    "negate": [("print(int(input()))", 80), ("print(-1)", 60), ("print(-int(input()))", 40), ("no program", 20)],
}


@pytest.mark.parametrize(
    "rule, points, at", [("ioi", 100.0, {"double": 3, "negate": 2}), ("icpc", None, {"double": 3, "negate": 2})]
)
def test_a_contest_is_played_filtered_submitted_and_scored_by_one_command(tmp_path, capsys, rule, points, at):
    """Four programs for each problem by the sample's seed order: wrong, partial, right and none."""
    from tests.evals.live_endpoint import live_endpoint

    count = dict.fromkeys(WAYS, 0)

    def answer(body, number):
        name = next(name for name in WAYS if f"#{name}" in body["messages"][-1]["content"])
        code, thought = WAYS[name][count[name]]
        count[name] += 1
        said = reply(f"```python\n{code}\n```" if code != "no program" else "```python\nI can't")
        said["choices"][0]["message"]["reasoning_content"] = "t" * thought
        return 200, json.dumps(said).encode()

    path = tmp_path / "contest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    with live_endpoint(answer) as (url, _):
        arguments = ["evaluate", "--benchmark", "contest", "--data", str(path), "--policy", url, "--n", "4", "--rule", rule]
        assert main([*arguments, "--submissions", "3", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    problems = found["extra"]["problems"]
    assert [defect["what"] for defect in found["defective_rows"]] == ["a case or sample is no pair of input and output"]
    assert {name: problem["accepted_at"] for name, problem in problems.items()} == at
    assert problems["double"]["submitted"] == 3 and problems["double"]["subtasks"] == [40.0, 60.0], problems
    assert found["extra"].get("points") == (200.0 if points else None) and "2 of 2 problems solved" in out and "published" in out
    assert found["outcomes"]["reasons"]["no_program"] == 1 and found["unscored_attempts"] == 0
