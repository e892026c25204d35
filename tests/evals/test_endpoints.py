"""A live endpoint that fails, hangs up, stalls or never stops: counted as what it is, never as wrong answers."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter

import pytest

from rorqual.cli import main
from tests.evals.live_endpoint import live_endpoint

QUESTIONS = 60


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    rows = [{"question": f"{i}+{i}?", "answer": f"#### {2 * i}"} for i in range(QUESTIONS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def right(body):
    number = int(re.match(r"(\d+)\+", body["messages"][-1]["content"]).group(1))
    return f"\\boxed{{{2 * number}}}"


FAILURES = [(503, b"busy"), (500, b"{}"), (200, b"no json"), None, (429, b""), (200, b'{"choices": []}')]


def failing_tenth(body, number):
    """Every tenth call fails, in each way in turn; all others are right."""
    return FAILURES[number // 10 % len(FAILURES)] if number % 10 == 0 else right(body)


def evaluate(capsys, data, out, url, *more):
    arguments = ["evaluate", "--benchmark", "gsm8k", "--data", str(data), "--policy", url, "--out", str(out), "--json"]
    assert main([*arguments, "--concurrency", "8", *map(str, more)]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_tenth_of_the_calls_failing_costs_attempts_and_never_score(tmp_path, data, capsys):
    with live_endpoint(failing_tenth) as (url, live):
        found = evaluate(capsys, data, tmp_path / "once", url, "--max-tries", 1)
        assert len(live.bodies) == QUESTIONS
        assert found["outcomes"]["verdicts"] == {"passed": 54, "policy_failed": 6} and found["unscored_attempts"] == 6
        assert found["score"]["value"] == 1.0 and found["score_if_unscored_fail"] == pytest.approx(0.9)
        named = Counter(re.search(r"status \d+|no JSON|choices|Error", text).group() for text in found["outcomes"]["failures"])
        assert set(named) == {"status 503", "status 500", "status 429", "no JSON", "choices", "Error"}, found["outcomes"]
        again = evaluate(capsys, data, tmp_path / "once", url, "--max-tries", 1)
        assert again["unscored_attempts"] == 6 and len(live.bodies) == QUESTIONS, "what failed is not tried behind one's back"
        mended = evaluate(capsys, data, tmp_path / "once", url, "--max-tries", 3, "--retry-failures")
        assert mended["unscored_attempts"] == 0 and mended["score"]["value"] == 1.0
        assert QUESTIONS + 6 <= len(live.bodies) <= QUESTIONS + 8


def test_calls_are_retried_as_configured(tmp_path, data, capsys):
    with live_endpoint(failing_tenth) as (url, live):
        found = evaluate(capsys, data, tmp_path / "out", url, "--max-tries", 3)
        assert found["unscored_attempts"] == 0 and found["score"]["value"] == 1.0
        assert len(live.bodies) == QUESTIONS + len(live.bodies) // 10, "one call more for each that failed"


def test_what_an_endpoint_refuses_for_good_is_not_retried(tmp_path, data, capsys):
    with live_endpoint(lambda body, number: (400, b"context too long")) as (url, live):
        found = evaluate(capsys, data, tmp_path / "out", url, "--limit", 5)
        assert found["outcomes"]["verdicts"] == {"policy_failed": 5} and len(live.bodies) == 5
        assert found["score"]["value"] is None and "context too long" in next(iter(found["outcomes"]["failures"]))


def test_an_endpoint_that_stalls_is_given_up_after_the_timeout(tmp_path, data, capsys):
    released = threading.Event()

    def stalls(body, number):
        released.wait(60)
        return "late"

    with live_endpoint(stalls) as (url, _):
        found = evaluate(capsys, data, tmp_path / "out", url, "--limit", 3, "--timeout", 0.5, "--max-tries", 1)
        released.set()
    assert found["outcomes"]["verdicts"] == {"policy_failed": 3}
    assert [text.partition("/v1: ")[2] for text in found["outcomes"]["failures"]] == ["no answer within 0.5 s"]


def test_an_endpoint_that_calls_tools_for_ever_is_unfinished_by_name(tmp_path, capsys):
    from rorqual.evals import browse

    def calls(body, number):
        call = {"id": f"c{number}", "type": "function", "function": {"name": "search", "arguments": '{"query": "x"}'}}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        return 200, json.dumps({"choices": [{"finish_reason": "tool_calls", "message": message}]}).encode()

    browse.made(tmp_path / "data", people=10, questions=4)
    with live_endpoint(calls) as (url, live):
        for context in ("none", "discard-all"):
            arguments = [
                "evaluate",
                "--benchmark",
                "browse",
                "--data",
                str(tmp_path / "data"),
                "--policy",
                url,
                "--max-turns",
                "7",
            ]
            assert main([*arguments, "--context", context, "--window", "600", "--out", str(tmp_path / context), "--json"]) == 0
            found = json.loads(capsys.readouterr().out)
            assert found["outcomes"]["verdicts"] == {"unfinished": 4} and found["score"]["value"] == 0.0
            if context == "discard-all":
                assert found["outcomes"]["ends"] == {"max_turns": 4} and found["accounts"]["steps"] == 28
        assert live.bodies


def test_tau2_retail_with_the_user_behind_an_endpoint(tmp_path, capsys, shared_data):
    """The user's part is asked for with its instructions; one that fails leaves the attempt without a score."""
    from rorqual.tasks.retail import STOP

    def user(body, number):
        assert "Play the part below" in body["messages"][0]["content"]
        return (500, b"") if "Anna" in body["messages"][-1]["content"] else f"Yes, that is all. {STOP}"

    arguments = ["evaluate", "--benchmark", "tau2_retail", "--data", str(shared_data / "tau2_retail"), "--limit", "4"]
    arguments += ["--policy", "program:gold", "--out", str(tmp_path), "--isolation", "inline", "--json"]
    with live_endpoint(user) as (url, live):
        assert main([*arguments, "--user", url]) == 0
        found = json.loads(capsys.readouterr().out)
    assert len(live.bodies) == 4, "each gold attempt tells its user once"
    assert found["score"]["value"] == 1.0 and found["unscored_attempts"] == 0
    with live_endpoint(lambda body, number: (400, b"no user today")) as (url, _):
        assert main([*arguments, "--seed", "1", "--user", url]) == 0
        found = json.loads(capsys.readouterr().out)
    assert found["unscored_attempts"] == 4 and found["outcomes"]["verdicts"] == {"world_failed": 4}
    assert "no user today" in next(iter(found["outcomes"]["failures"]))
