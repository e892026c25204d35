"""The proof family: tasks of every role and score, proven by execution, the same from the same seed; files of proofs in words."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from rorqual.errors import UserError
from rorqual.synthesis.reasoning.derivations import ProofConfig, proof
from rorqual.tasks.proof_tasks import exact_verdict


def made(config, count):
    return [row.task for number in range(count) if (row := proof(config, number).row) is not None and row.is_accepted]


def test_candidates_of_every_role_and_score_pass_their_gates():
    tasks = made(ProofConfig(seed=3), 300)
    assert len(tasks) > 150
    assert set(Counter(task.tags["kind"] for task in tasks)) == {"prove", "verify", "meta_verify"}
    scores = Counter(task.payload["score"] for task in tasks if "score" in task.payload)
    qualities = Counter(task.payload["quality"] for task in tasks if "quality" in task.payload)
    assert min(scores[s] for s in (0, 0.5, 1)) > 5 and min(qualities[q] for q in (0, 0.5, 1)) > 5
    assert all(exact_verdict(task, task.payload["gold"]).passed for task in tasks)
    assert [task.id for task in made(ProofConfig(seed=3), 40)] == [
        task.id for task in tasks[: len(made(ProofConfig(seed=3), 40))]
    ]


def test_brief_prompts_and_single_roles_are_settings():
    tasks = made(ProofConfig(roles="prove", words="brief", most_steps=2), 20)
    assert {task.payload["role"] for task in tasks} == {"prove"} and all(task.prompt.startswith("Prove.\n") for task in tasks)


def test_a_file_of_proofs_in_words_becomes_tasks_by_what_its_rows_hold(tmp_path):
    rows = [
        {"problem": "p"}, {"problem": "p", "solution": "s", "score": 0.5},
        {"problem": "p", "solution": "s", "evaluation": "e", "quality": 1},
    ]  # fmt: skip
    path = tmp_path / "proofs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    tasks = made(ProofConfig(problems=str(path)), 3)
    assert [task.payload["role"] for task in tasks] == ["prove", "verify", "meta_verify"]
    assert not exact_verdict(tasks[0], "anything").is_valid


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no row"), ("{", "JSONDecodeError"), ('{"problem": "p", "score": 1}', "lacks solution"),
     ('{"problem": "p", "solution": "s", "score": 0.7}', "must be 0, 0.5 or 1")],
)  # fmt: skip
def test_a_file_that_holds_no_proofs_is_refused_by_row(tmp_path, text, message):
    path = tmp_path / "proofs.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        proof(ProofConfig(problems=str(path)), 0)
    with pytest.raises(UserError, match="nowhere"):
        proof(ProofConfig(problems="nowhere.jsonl"), 0)
