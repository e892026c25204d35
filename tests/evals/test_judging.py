"""A policy as judge: it decides where equality can't, and what it fails to decide has no score, by name."""

from __future__ import annotations

import json

import pytest

from rorqual.cli import main
from rorqual.evals.judging import TEMPLATE, filled, verdict_of
from tests.evals.live_endpoint import live_endpoint

ROWS = [
    {"id": "a", "question": "Who sang?", "answer": "the fin whale", "answer_type": "exactMatch"},
    {"id": "b", "question": "Pick. A. x B. y", "answer": "B", "answer_type": "multipleChoice"},
    {"id": "c", "question": "What {gold} is {response}?", "answer": "42", "answer_type": "exactMatch"},
]


@pytest.fixture
def hle(tmp_path):
    (tmp_path / "hle.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "hle.jsonl"


def evaluate(capsys, tmp_path, data, judge, *more, status=0, policy="program:gold"):
    arguments = ["evaluate", "--benchmark", "hle", "--data", str(data), "--policy", policy, "--out", str(tmp_path / "out")]
    assert main([*arguments, "--json", "--judge", judge, "--max-tries", "1", *map(str, more)]) == status
    said = capsys.readouterr()
    return json.loads(said.out) if status == 0 else said.err


def asked(body):
    return body["messages"][-1]["content"]


def test_the_judge_sees_question_right_answer_and_response_and_decides(tmp_path, hle, capsys):
    def judge(body, number):
        return "Same.\nVerdict: right" if "fin whale" in asked(body) else "Other.\n**Verdict:** wrong"

    with live_endpoint(judge) as (url, live):
        found = evaluate(capsys, tmp_path, hle, url)
    assert found["by_task"] == {"a": [1.0], "b": [0.0], "c": [0.0]} and found["accounts"]["judge_tokens"] == 3 * 25
    assert found["outcomes"]["verdicts"] == {"passed": 1, "wrong": 2} and found["judge"].startswith(url)
    texts = sorted(map(asked, live.bodies), key=len)
    assert any("Who sang?" in text and "\\boxed{the fin whale}" in text for text in texts)
    assert any("What {gold} is {response}?" in text for text in texts), "what is inserted is not taken for a field"
    assert all(body["temperature"] == 0.0 for body in live.bodies)


def test_a_judge_that_fails_or_does_not_decide_leaves_the_attempt_without_a_score(tmp_path, hle, capsys):
    def judge(body, number):
        if "Who sang?" in asked(body):
            return 500, b"judge is out"
        return "I can't say." if "Pick." in asked(body) else "Verdict: correct"

    with live_endpoint(judge) as (url, live):
        found = evaluate(capsys, tmp_path, hle, url)
    assert found["outcomes"]["verdicts"] == {"passed": 1, "verifier_failed": 2} and found["unscored_attempts"] == 2
    assert found["outcomes"]["reasons"] == {"judge_unavailable": 1, "judge_undecided": 1}
    assert found["score"]["value"] == 1.0 and len(live.bodies) == 4, "an answer without a verdict is asked for once more"
    assert [b["temperature"] for b in live.bodies if "Pick." in asked(b)] == [0.0, 1.0]


def test_attempts_are_judged_anew_by_another_judge_and_never_mixed(tmp_path, hle, capsys):
    with (
        live_endpoint(lambda body, number: "Verdict: wrong") as (first, _),
        live_endpoint(lambda body, number: "Verdict: right") as (second, _),
    ):
        assert evaluate(capsys, tmp_path, hle, first)["score"]["value"] == 0.0
        assert "--rescore judges them anew" in evaluate(capsys, tmp_path, hle, second, status=1)
        anew = evaluate(capsys, tmp_path, hle, second, "--rescore")
        assert anew["score"]["value"] == 1.0 and anew["rescored"] and anew["judge"].startswith(second)
        assert evaluate(capsys, tmp_path, hle, first)["score"]["value"] == 0.0, "what was stored stays"


def test_an_empty_answer_is_none_without_asking(tmp_path, hle, capsys):
    with live_endpoint(lambda body, number: "Verdict: right") as (url, live):
        found = evaluate(capsys, tmp_path, hle, url, policy="program:silent")
    assert found["outcomes"]["reasons"] == {"no_answer": 3} and not live.bodies


def test_a_template_of_ones_own_and_what_is_wrong_with_one(tmp_path, hle, capsys):
    own, bad = tmp_path / "own.txt", tmp_path / "bad.txt"
    own.write_text("Q {question} G {gold} R {response} {other}")
    bad.write_text("Q {question} G {gold}")
    with live_endpoint(lambda body, number: "Verdict: right") as (url, live):
        evaluate(capsys, tmp_path, hle, url, "--judge-template", own)
        assert "Q Who sang? G the fin whale R \\boxed{the fin whale} {other}" in map(asked, live.bodies)
        assert "needs {response}" in evaluate(capsys, tmp_path, hle, url, "--judge-template", bad, status=1)
    assert "a judge is a checkpoint" in evaluate(capsys, tmp_path, hle, "program:gold", status=2)
    assert main(["evaluate", "--benchmark", "gpqa_diamond", "--policy", "p", "--out", "o", "--judge", "http://x"]) == 2
    assert "decided by its own scorer" in capsys.readouterr().err


def test_answers_in_prose_are_tasks_where_there_is_a_judge(tmp_path, capsys):
    row = {"Problem": "Find all.", "Short Answer": "All primes $p$ such that $p > 2$", "Problem ID": "p1"}
    (tmp_path / "imo.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "Problem ID": "p2", "Short Answer": "7"}))
    common = ["evaluate", "--benchmark", "imo_answerbench", "--data", str(tmp_path / "imo.jsonl"), "--policy", "program:gold"]
    assert main([*common, "--out", str(tmp_path / "without"), "--json"]) == 0
    without = json.loads(capsys.readouterr().out)
    with live_endpoint(lambda body, number: "Verdict: right") as (url, _):
        assert main([*common, "--out", str(tmp_path / "with"), "--json", "--judge", url]) == 0
        judged = json.loads(capsys.readouterr().out)
    assert (without["tasks"], len(without["defective_rows"])) == (1, 1) and (judged["tasks"], judged["defective_rows"]) == (2, [])


@pytest.mark.parametrize(
    "text, verdict",
    [("Verdict: right", True), ("verdict: INCORRECT.", False), ("**Verdict:** correct", True), ("Verdict: not right", None),
     ("Verdict: wrong\nno:\nVerdict: right", True), ("It is right.", None), ("", None)],
)  # fmt: skip
def test_the_last_verdict_counts_and_nothing_else_is_one(text, verdict):
    assert verdict_of(text) is verdict


def test_our_template_has_every_field():
    text = filled(TEMPLATE, question="<q {gold}>", gold="<g>", response="<r {question}>")
    assert "<q {gold}>" in text and "<g>" in text and "<r {question}>" in text
