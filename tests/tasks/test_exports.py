"""A store leaves for Parquet, JSONL, verifiers and Harbor without losing anything, and is judged there as it is here."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rorqual.tasks import GateResult, Store, TaskRow, task_record, world_record
from rorqual.tasks.exports import EXPORTS, flat_rows, read_parquet

from .worlds import task, world


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store")
    for i in range(3):
        row = TaskRow(task(id=f"t{i}", tier=i), (GateResult("gold_passes", True),), {"pass@1": 0.5})
        made.append(task_record(row, (i, 0)))
    made.append(world_record(world(), (0,)))
    made.seal({})
    return made


def test_parquet_and_jsonl_hold_the_same_rows(store: Store, tmp_path: Path) -> None:
    EXPORTS["jsonl"](store, tmp_path / "tasks.jsonl")
    EXPORTS["parquet"](store, tmp_path / "tasks.parquet")
    lines = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text().splitlines()]
    assert lines == list(flat_rows(store)) == read_parquet(tmp_path / "tasks.parquet")
    assert lines[0]["fingerprint"] == "f1" and lines[2]["tier"] == 2 and lines[0]["measures"] == {"pass@1": 0.5}
    assert (tmp_path / "tasks.worlds.parquet").exists()


def test_the_verifiers_package_plays_and_judges_alone(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    EXPORTS["verifiers"](store, tmp_path / "my-tasks")
    monkeypatch.syspath_prepend(tmp_path / "my-tasks")
    package = tmp_path / "my-tasks" / "my_tasks"
    for source in package.glob("*.py"):
        compile(source.read_text(), source.name, "exec")
    (package / "__init__.py").write_text("")  # the taskset itself needs verifiers, which is not a dependency here
    play = importlib.import_module("my_tasks.play")
    assert [t.id for t in play.tasks()] == ["t0", "t1", "t2"]
    assert '"book"' in play.described(play.tasks()[0])
    calls = [["book", '{"slot": "S-3", "seats": 2}'], ["submit", '{"answer": "20"}']]
    assert play.replayed("t1", calls[:1]).startswith('{"booking"')
    assert play.replayed("t1", calls, None, judge=True).passed
    assert play.replayed("t1", calls[:1], "20", judge=True).passed
    assert play.replayed("t1", calls[1:], None, judge=True).reasons == ("booking",)


def run(script: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["/bin/sh", str(script)], env=environment, capture_output=True, text=True, timeout=60)


def test_a_harbor_directory_is_solved_by_its_solution_and_graded_from_its_own_copy(store: Store, tmp_path: Path) -> None:
    EXPORTS["harbor"](store, tmp_path / "harbor")
    directory = tmp_path / "harbor" / "t0"
    assert {p.name for p in directory.iterdir()} == {"task.toml", "instruction.md", "environment", "tests", "solution"}
    binary = tmp_path / "bin"
    binary.mkdir()
    (binary / "world").symlink_to(directory / "environment" / "world")
    environment = {
        "PATH": f"{binary}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "WORLD_HOME": str(directory / "environment"),
        "WORLD_LOG": str(tmp_path / "calls.jsonl"),
        "REWARD_FILE": str(tmp_path / "logs" / "reward.txt"),
    }
    reward = tmp_path / "logs" / "reward.txt"
    assert run(directory / "tests" / "test.sh", environment).returncode == 0
    assert reward.read_text() == "0", "doing nothing fails"
    solved = run(directory / "solution" / "solve.sh", environment)
    assert solved.returncode == 0, solved.stderr
    # The agent owns its container: whatever it does to its copy of the world does not reach the grader's.
    (directory / "environment" / "world.json").write_text("{}")
    assert run(directory / "tests" / "test.sh", environment).returncode == 0
    assert reward.read_text() == "1"


def test_a_harbor_verifier_that_cannot_judge_leaves_no_reward(store: Store, tmp_path: Path) -> None:
    EXPORTS["harbor"](store, tmp_path / "harbor")
    directory = tmp_path / "harbor" / "t1"
    (directory / "tests" / "verify.py").write_text("def verify(initial, final, answer):\n    return 1 // 0\n")
    environment = {"PATH": os.environ["PATH"], "WORLD_LOG": str(tmp_path / "none"), "REWARD_FILE": str(tmp_path / "reward.txt")}
    judged = run(directory / "tests" / "test.sh", environment)
    assert judged.returncode != 0 and "invalid" in judged.stderr
    assert not (tmp_path / "reward.txt").exists()
