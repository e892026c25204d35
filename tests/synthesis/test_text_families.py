"""Interpreter, maths, logic, programming, writing: the checks tell right from wrong, and a seed gives one store."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from rorqual.synthesis import Request, maker
from rorqual.synthesis.interpreter.puzzles import entry
from rorqual.tasks import Store, Task, open_episode
from rorqual.tasks.answer import as_number, check_answer, final_answer
from rorqual.tasks.interpreter import PYTHON_TOOL
from rorqual.tasks.scorer import READS_CODE


def test_the_answer_is_what_follows_the_last_mark() -> None:
    assert final_answer("Answer: 3\nno wait\n**Answer:** 4 ") == "4"
    assert final_answer("it is 5") == "it is 5"
    assert final_answer(" \n") is None and final_answer(None) is None
    assert [str(as_number(t)) for t in ("$1,200.50", "3/4", "-2e3")] == ["2401/2", "3/4", "-2000"]
    assert as_number("3 or 4") is None and as_number("1/0") is None and as_number("1e999999999") is None


@pytest.mark.parametrize(
    ("body", "is_right"),
    [
        ("return [x + 1 for x in values]", True),
        ("return tuple(x + 1 for x in values)", True),
        ("return values", False),
        ("import os; os._exit(0)", False),
        ('import sys; print(\'{"value": "[2]"}\', file=sys.__stdout__); return values', False),
        ("class E(list):\n        __eq__ = lambda s, o: True\n    return E()", False),
        ("return [True if x == 0 else x + 1 for x in values]", False),
        ("while True: pass", False),
    ],
)
def test_programs_are_compared_outside_their_sandbox(body: str, is_right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rorqual.tasks.answer.CALL_TIMEOUT_S", 1.0)
    check = {"kind": "calls", "entry": "f", "tests": [[[[1]], [2]], [[[0]], [1]], [[[8]], [9]]]}
    verdict = check_answer(check, f"```python\ndef f(values):\n    {body}\n```")
    assert verdict.is_valid and verdict.passed is is_right, verdict


def test_asserts_see_plain_values_of_the_program_only() -> None:
    check = {
        "kind": "asserts",
        "entry": "f",
        "source": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9",
    }
    assert check_answer(check, "def f(x): return x * x").passed
    assert not check_answer(check, "def f(x): return x + x").passed
    equal_to_all = "class E:\n    def __eq__(s, o): return True\n    def __repr__(s): return 'E()'\ndef f(x): return E()"
    assert not check_answer(check, equal_to_all).passed


def test_data_sets_whose_scorers_read_code_are_all_known() -> None:
    from reasoning_gym.factory import DATASETS

    reads = re.compile(r"(?<![_.\w])(?:parse_expr|eval|exec)\((?!.*entry\[)|sympify\(")
    for name, (kind, _) in DATASETS.items():
        method = kind.__dict__.get("score_answer")
        source = inspect.getsource(method) if method else ""
        assert name in READS_CODE or not reads.search(source), name


def test_a_notebook_keeps_its_state_between_cells_and_loses_it_at_a_reset() -> None:
    task = Task(
        "t",
        "interpreter",
        ({"role": "user", "content": "q"},),
        (PYTHON_TOOL,),
        payload={"check": {"kind": "number", "value": "42"}},
    )
    episode = open_episode(task)
    try:
        episode.reset()
        assert episode.call("python", {"code": "x = 6"}) == ""
        assert episode.call("python", '{"code": "print(x * 7)"}') == "42"
        assert "invalid_arguments" in episode.call("python", {"x": 1}) and "unknown_tool" in episode.call("bash", {})
        assert episode.finish("Answer: 42").passed and not episode.finish("Answer: 41").passed and not episode.finish().passed
        episode.reset()
        assert "NameError" in episode.call("python", {"code": "x"})
    finally:
        episode.close()


@pytest.mark.parametrize(("family", "count"), [("writing", 30), ("logic", 8), ("interpreter", 6)])
def test_a_seed_gives_one_store_and_every_gate_holds_again(family: str, count: int, tmp_path: Path) -> None:
    reports = []
    for workers in (1, 2) if family == "writing" else (1,):
        store = Store(tmp_path / str(workers))
        reports.append(maker(family).synthesize(Request(count, store, 7, workers)))
    assert len({r["digest"] for r in reports}) == 1 and reports[0]["tasks"] == count
    if family == "writing":
        assert (tmp_path / "1" / "tasks.jsonl").read_bytes() == (tmp_path / "2" / "tasks.jsonl").read_bytes()
    store, worlds = Store(tmp_path / "1"), Store(tmp_path / "1").worlds()
    for task in store.tasks()[:3]:
        assert all(g.passed for g in maker(family).regate(task, worlds.get(task.world), "bwrap"))
    tampered = store.tasks()[0]
    tampered.payload["check"].update({"kind": "exact", "value": "something else"})
    assert not all(g.passed for g in maker(family).regate(tampered, worlds.get(tampered.world), "bwrap"))


def test_an_answer_that_a_scorer_can_not_read_is_wrong_and_a_broken_scorer_decides_nothing() -> None:
    from rorqual.tasks.answer import check_answer
    from rorqual.tasks.scorer import dataset

    entry = dataset("lcm")[0]
    check = {"kind": "reasoning_gym", "dataset": "lcm", "entry": {**entry, "answer": str(entry["answer"])}}
    assert check_answer(check, f"Answer: {entry['answer']}", "inline").passed
    assert str(check_answer(check, "Answer: none of these", "inline").outcome) == "failed"
    broken = {**check, "entry": {"question": entry["question"]}}
    assert str(check_answer(broken, "Answer: none of these", "inline").outcome) == "invalid"


def test_numbers_that_are_merely_near_are_wrong_where_a_library_gives_them_full_marks() -> None:
    last_digit = re.compile(r"\d(?=\D*$)")
    for name in ("decimal_arithmetic", "time_intervals", "number_sorting"):
        for seed in range(4):
            item = entry(name, seed)
            check = {"kind": "reasoning_gym", "dataset": name, "entry": item, "value": item["answer"]}
            assert check_answer(check, f"Answer: {item['answer']}", "inline").passed, (name, item)
            wrong = last_digit.sub(lambda digit: str((int(digit[0]) + 1) % 10), item["answer"])
            assert wrong != item["answer"] and not check_answer(check, f"Answer: {wrong}", "inline").passed, (name, item, wrong)
