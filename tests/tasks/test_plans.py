"""A gold plan, played as it is through the task's episode, passes the task's verifier; its parts are the task's own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rorqual.tasks import Task, TaskError, World, open_episode
from rorqual.tasks.plans import DONE, Move, changed_lines, gold_plan
from tests.tasks.worlds import SOLUTION, task, world

TEXT = Task(
    "m1", "maths", ({"role": "user", "content": "2 + 2?"},),
    payload={"check": {"kind": "number", "value": "4"}, "gold": "Answer: 4", "work": "2 and 2 are 4."},
)  # fmt: skip


def test_the_plan_of_a_world_is_what_its_solution_calls_and_passes_when_played():
    plan = gold_plan(task(), world(), "inline")
    assert plan.moves == (
        Move("list_slots", {}), Move("book", {"slot": "S-3", "seats": 2}),
        Move("submit", {"answer": "20"}, "hand in the answer"),
    )  # fmt: skip
    assert plan.ends_by_call
    episode = open_episode(task(), world(), "inline")
    episode.reset()
    for move in plan.moves:
        episode.call(move.name, move.arguments)
    assert episode.finish(None).passed
    episode.close()


def test_a_task_without_a_submit_tool_has_its_answer_as_the_last_message():
    given = task()
    plain = replace(given, tools=tuple(t for t in given.tools if t["function"]["name"] != "submit"))
    plan = gold_plan(plain, world(), "inline")
    assert not plan.ends_by_call and plan.answer == "20"
    silent = task(solution=SOLUTION.replace('return str(best["price"])', "return None"))
    assert gold_plan(silent, world(), "inline").answer == DONE


def test_a_text_has_no_moves_and_keeps_its_work():
    plan = gold_plan(TEXT, None)
    assert plan.moves == () and plan.answer == "Answer: 4" and plan.work == "2 and 2 are 4."


def test_a_search_reads_each_piece_of_evidence_once():
    payload = {
        "clauses": [{"value": "red"}, {"of": [{"value": "tall"}]}], "check": {"value": "oak"},
        "evidence": [{"url": "u1", "line": 3}, {"url": "u2", "line": 1}, {"url": "u1", "line": 3}],
    }  # fmt: skip
    plan = gold_plan(Task("s", "search", (), payload=payload), None)
    assert plan.moves[0] == Move("search", {"query": "red tall"}, "find where these facts stand")
    assert [(m.arguments["id"], m.arguments["loc"]) for m in plan.moves[1:]] == [("u1", 3), ("u2", 1)]
    assert plan.answer == "Answer: oak"


@pytest.mark.parametrize(
    ("before", "after"),
    [("a\nb\nc", "a\nB\nc"), ("a\nb\nc", "a\nc"), ("a\nc", "a\nb\nc"), ("a\na\na", "a\na"), ("x", "y\nz"), ("a\nb\n", "a\nb")],
)
def test_changed_lines_turn_one_text_into_the_other(before, after):
    first, last, right = changed_lines(before, after)
    lines = before.split("\n")
    lines[first - 1 : last] = right
    assert "\n".join(lines) == after and last - first + 1 <= len(lines) + 2


def test_what_can_t_be_planned_is_refused_with_the_reason():
    with pytest.raises(TaskError, match="no gold plan is known for the family chess"):
        gold_plan(Task("c", "chess", ()), None)
    with pytest.raises(TaskError, match=r"its payload has no 'gold'"):
        gold_plan(Task("m", "maths", (), payload={}), None)
    with pytest.raises(TaskError, match="its solution fails"):
        gold_plan(task(solution="def solution(tools):\n    return [][1]\n"), world(), "inline")
    with pytest.raises(TaskError, match="is missing from the store"):
        gold_plan(task(), None)


def test_a_code_plan_played_in_the_sandbox_mends_the_fault():
    good = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n"
    bad = good.replace("return a - b", "return a + b")
    files = {"calc/__init__.py": "", "calc/ops.py": good}
    project = World("p", "code", {"files": files, "name": "calc", "path": ".", "sources": ["calc"], "tests": []})
    given = Task("c", "code", (), (), "p", {"changes": {"calc/ops.py": bad}, "fail_to_pass": [], "pass_to_pass": []})
    plan = gold_plan(given, project)
    episode = open_episode(given, project, "bwrap")
    episode.reset()
    seen = [episode.call(move.name, move.arguments) for move in plan.moves]
    assert "return a + b\n\n[exit 0]" in seen[0] and "return a - b" in seen[2] and plan.answer == DONE
    assert episode.submitted()["calc/ops.py"] == good
    episode.close()
